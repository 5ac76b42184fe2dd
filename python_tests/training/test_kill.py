"""A run killed by SIGKILL at any moment, in mid-save too, and resumed is the run that was never killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from same_run import assert_same_run

HERE = Path(__file__).parent
STEPS = {"draft": 30, "ddpo": 8, "dpok": 8}
# Statistics, several updates an epoch, a buffer that overflows and a value function are kept by the policy gradients.
TRAIN = {
    "draft": {"backprop_steps": 2, "lr_scheduler": "linear", "lr_warmup_steps": 2, "ema_decay": 0.9},
    "ddpo": {"batch_size": 2, "samples_per_epoch": 4, "statistics_buffer_size": 4, "statistics_min_count": 2},
    "dpok": {"samples_per_epoch": 2, "batch_size": 4, "gradient_accumulation_steps": 2, "policy_steps": 2,
             "buffer_size": 10, "value_batch_size": 8, "value_minibatches": 2},
}  # fmt: skip


def write_configs(model, folder):
    for algorithm, train in TRAIN.items():
        values = tiny.values(
            model, folder / "unused",
            sampling={"eta": 1.0}, reward={"function": "kill_worker.brightness"}, checkpointing_steps=5,
            checkpoints_total_limit=2, eval={"validation_steps": 4, "lora_scales": []},
        )  # fmt: skip
        values["train"] = {"max_train_steps": STEPS[algorithm], "batch_size": 2, "learning_rate": 1e-2, **train}
        (folder / f"{algorithm}.yaml").write_text(yaml.safe_dump(values))


def kill_and_resume(model, folder, plan):
    """Checks every killed run against the one of its algorithm that was not."""
    write_configs(model, folder)
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "kill_worker.py"), str(folder), json.dumps(plan)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    runs = json.loads((folder / "runs.json").read_text())
    assert len(runs) == sum(1 + len(kinds) for kinds in plan.values())
    for run in runs:
        algorithm, log = run["folder"].split("-")[0], (folder / f"{run['folder']}.log").read_text()
        killed = -signal.SIGKILL
        # By the clock, a run may have come to its end.
        expected = {"never": ([0],)}.get(
            run["moment"], ([killed, 0], [0, 0]) if "after" in run["moment"] else ([killed, 0],)
        )
        assert run["status"] in expected, f"{run}\n{log[-4000:]}"
        try:
            assert_same_run(folder / run["folder"], folder / f"{algorithm}-whole", STEPS[algorithm])
        except AssertionError as error:
            raise AssertionError(f"{run}: {error}\n{log[-4000:]}") from error


def test_killed_and_resumed(model, tmp_path):
    kill_and_resume(model, tmp_path, {"dpok": ["saving"]})


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", TRAIN)
def test_killed_at_five_moments_and_resumed(model, tmp_path, algorithm):
    kill_and_resume(model, tmp_path, {algorithm: ["any", "saving", "clock", "any", "clock"]})
