"""Two gloo processes give one process's gradients, averaged once."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("ddp_worker.py")


def launch(world_size, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world_size):
        environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
        if world_size > 1:
            environment |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        command = [sys.executable, str(WORKER), str(folder / f"{world_size}-{rank}.pt")]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output.decode()
    return [torch.load(folder / f"{world_size}-{rank}.pt", weights_only=True) for rank in range(world_size)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    (alone,) = launch(1, folder)
    return alone, *launch(2, folder)


def test_two_processes_equal_one(ranks):
    alone, first, second = ranks
    for case, expected in alone.items():
        assert len(expected) > 20
        for name, gradient in expected.items():
            assert torch.equal(first[case][name], second[case][name]), f"{case}: {name} differs between the ranks"
            error = (first[case][name] - gradient).norm() / gradient.norm()
            assert error <= 1e-11, f"{case}: {name} is off by {error}"


def test_no_sync_is_respected(ranks):
    _, first, second = ranks
    for unused in (False, True):
        mine, theirs = (rank[f"not synchronised, unused={unused}"] for rank in (first, second))
        assert all(not torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_sharded_unet_is_refused(ranks):
    _, *both = ranks
    assert all("is sharded or wrapped in FSDPUNet2DConditionModel" in rank["sharded"] for rank in both)
