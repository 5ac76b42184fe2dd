"""An accelerated UNet in two gloo processes gives a stock one's gradients in one, averaged once."""

from pathlib import Path

import pytest
import torch
from checks import relative_error
from processes import launch, saved

WORKER = Path(__file__).with_name("two_processes_worker.py")


# sampling/test_ddp.py has whole chains on two processes.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    launch(WORKER, folder)
    return saved(folder)


def test_two_processes_equal_one(ranks):
    alone, first, second = ranks
    assert len(alone) == 10
    for case, expected in alone.items():
        assert len(expected) > 20 and expected.keys() == first[case].keys()
        for name, gradient in expected.items():
            assert torch.equal(first[case][name], second[case][name]), f"{case}: {name} differs between the ranks"
            error = relative_error(first[case][name], gradient)
            assert error <= 1e-11, f"{case}: {name} is off by {error}"


def test_no_sync_is_respected(ranks):
    _, first, second = ranks
    cases = [case for case in first if case.endswith("not synchronised")]
    assert len(cases) == 5
    for case in cases:
        assert all(not torch.equal(first[case][name], second[case][name]) for name in first[case])
