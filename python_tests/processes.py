"""Runs a worker's `main(folder, rank)` on one process and on two that find each other through gloo, forked from one.

    python processes.py <worker module> <folder> [<further arguments of main>]

Importing PyTorch and diffusers takes a process longer than the work of a test: here one does it for all.
"""

import functools
import importlib
import os
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import shared_simulations
import torch

WORLD_SIZES = (1, 2)


def launch(worker, folder, *arguments):
    """One process works in `folder / "1"`, two in `folder / "2"`."""
    # A worker imports what its tests import.
    paths = [str(Path(__file__).parent), str(worker.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    of_workers = {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, __file__, worker.stem, str(folder), *arguments]
    done = subprocess.run(command, env={**os.environ, **of_workers}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


def saved(folder):
    """What the process alone and then each of the two saved as its rank's file."""
    paths = [folder / str(size) / f"{rank}.pt" for size in WORLD_SIZES for rank in range(size)]
    return [torch.load(path, weights_only=True) for path in paths]


def main(worker, folder, *arguments):
    module = importlib.import_module(worker)
    # A DistributedDataParallel imports it.
    importlib.import_module("torch._dynamo")
    torch.set_num_threads(1)
    shared_simulations.share(pytest.MonkeyPatch())
    for size in WORLD_SIZES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        own = Path(folder, str(size))
        own.mkdir()
        work = functools.partial(module.main, own)
        ranks = [_fork(size, rank, port, functools.partial(work, rank, *arguments)) for rank in range(size)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
        if any(statuses):
            sys.exit(f"statuses of {size} process(es): {statuses}")


def _fork(size, rank, port, work):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if size > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        work()
        status = 0
    except BaseException:  # noqa: BLE001  Told, and the status says it: nothing may go on in a fork.
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
