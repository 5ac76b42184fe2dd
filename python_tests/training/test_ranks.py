"""What fails on one of two processes ends both, with the reason, and a resumed run on two is the one that did not fail."""

import gc
import json
import os
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import tiny
import yaml
from same_run import assert_same_run
from torch import distributed

from rftcore.training import UsageError
from rftcore.training.ranks import check_joined, end

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def found(model, tmp_path_factory):
    """What became of runs on two processes, by what failed in their 3rd step on the second of them."""
    folder, configs = tmp_path_factory.mktemp("ranks"), []
    for name in ("whole", "raise", "kill", "nan", "signal"):
        values = tiny.values(
            model, folder / name, train={"max_train_steps": 4, "batch_size": 8}, checkpointing_steps=2,
            sampling={"eta": 1.0}, eval={"lora_scales": []}, reward={"function": "rank_worker.noisy"},
        )  # fmt: skip
        configs.append(folder / f"{name}.yaml")
        configs[-1].write_text(yaml.safe_dump(values))
    command = [sys.executable, str(HERE / "rank_worker.py"), str(folder), *map(str, configs)]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder, json.loads((folder / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "statuses", "first", "second"),
    [
        ("raise", [1, 1], "process 1 failed: the reward is broken; this is process 0", "ZeroDivisionError: the reward"),
        ("kill", [1, -signal.SIGKILL], "another process ended, or cannot be reached", ""),
        ("nan", [1, 1], "process 1 failed: after step 2: reward 'noisy' returned nan for", "checkpoint-2 is the last"),
        ("signal", [128 + signal.SIGTERM] * 2, "SIGTERM: saved", "saving after this step"),
    ],
)
def test_one_process_fails_and_both_end(found, how, statuses, first, second):
    _, all_found = found
    run = all_found[how]
    assert run["status"] == statuses, run["stderr"]
    assert first in run["stderr"][0] and second in run["stderr"][1], run["stderr"]
    assert "Traceback" not in run["stderr"][0]
    assert run["seconds"] < 60


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "signal"])
def test_two_processes_stopped_and_resumed_are_two_that_were_not(found, how):
    """Each draws from its own global generator in every step: the random numbers of both go on as they were."""
    folder, all_found = found
    assert all_found["whole"]["status"] == [0, 0], all_found["whole"]["stderr"]
    assert all_found[f"{how}, resumed"]["status"] == [0, 0], all_found[f"{how}, resumed"]["stderr"]
    assert_same_run(folder / how, folder / "whole", step=4)


def test_processes_that_did_not_join_are_told(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = type("Alone", (), {"num_processes": 1})
    with pytest.raises(UsageError, match="started 2 processes .*joined none.*ACCELERATE_USE_CPU=true"):
        check_joined(alone)


def test_the_group_outlives_the_run():
    """Its destructor joins gloo's threads; under the interpreter's lock, which DDP holds, one may wait for that lock."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    group = weakref.ref(distributed.group.WORLD)
    end(type("Alone", (), {"end_training": staticmethod(distributed.destroy_process_group)}))
    gc.collect()
    assert not distributed.is_initialized() and group() is not None
