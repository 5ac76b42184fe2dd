"""Two gloo processes give one process's gradients, averaged once."""

import os
from pathlib import Path

import pytest
import torch
from processes import launch, saved

WORKER = Path(__file__).with_name("ddp_worker.py")
# With True it takes as long again.
FIND_UNUSED = ("False", "True") if os.environ.get("RFTCORE_TEST_ALL") == "1" else ("False",)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    launch(WORKER, folder, *FIND_UNUSED)
    return saved(folder)


def test_two_processes_equal_one(ranks):
    alone, first, second = ranks
    for case, expected in alone.items():
        assert len(expected) > 20
        for name, gradient in expected.items():
            assert torch.equal(first[case][name], second[case][name]), f"{case}: {name} differs between the ranks"
            error = (first[case][name] - gradient).norm() / gradient.norm()
            assert error <= 1e-11, f"{case}: {name} is off by {error}"


def test_steps_of_each_ranks_own_are_scored_alike(ranks):
    """One evaluation of all transitions, and one of each column of steps."""
    for rank in ranks:
        for unused in FIND_UNUSED:
            columns, together = (rank[f"own steps, transitions={single}, unused={unused}"] for single in (False, True))
            for name, gradient in columns.items():
                assert (gradient - together[name]).norm() <= 1e-11 * gradient.norm(), name


def test_no_sync_is_respected(ranks):
    _, first, second = ranks
    for unused in FIND_UNUSED:
        mine, theirs = (rank[f"not synchronised, unused={unused}"] for rank in (first, second))
        assert all(not torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_sharded_unet_is_refused(ranks):
    _, *both = ranks
    assert all("is sharded or wrapped in FSDPUNet2DConditionModel" in rank["sharded"] for rank in both)
