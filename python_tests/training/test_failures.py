"""Rewards that are not a number are told, or dropped; and what the command says and returns where a run cannot go on."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from same_run import metrics

from rftcore.rewards import declare
from rftcore.training import RunError, Trainer, checkpoint
from rftcore.training.algorithm_configs import ALGORITHMS
from rftcore.training.parsing import build

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}", "OMP_NUM_THREADS": "1"}


def broken_reward(breaks):
    """NaN for what `breaks(call, prompt)` says; calls are those of one image."""
    calls = []

    @declare(differentiable=True, unit="points")
    def brightness(images, prompts, metadata=None):
        calls.append(len(prompts))
        rewards = tiny.brightness(images, prompts)
        broken = torch.tensor([breaks(len(calls), prompt) for prompt in prompts])
        return rewards.masked_fill(broken, float("nan"))

    return brightness


TRAIN = {
    "draft": {"backprop_steps": 1},
    "ddpo": {"samples_per_epoch": 3, "batch_size": 3},
    "dpok": {"samples_per_epoch": 3, "policy_steps": 1, "gradient_accumulation_steps": 1, "value_batch_size": 4},
    "rwr": {"samples_per_epoch": 3, "inner_epochs": 1},
}


def config(model, folder, algorithm, on_nan, **more):
    values = tiny.values(
        model, folder, eval={"lora_scales": []}, reward={"on_nan": on_nan}, sampling={"eta": 1.0}, **more
    )
    values["train"] = {"max_train_steps": 4, "batch_size": 3, "learning_rate": 1e-3, **TRAIN[algorithm]}
    return build(ALGORITHMS[algorithm], values)


def test_nan_stops_with_prompt_and_step_and_may_be_dropped_on_resume(model, tmp_path):
    """One call of the evaluation, then 3 a step: from the 8th on it is step 3."""
    folder, reward = tmp_path / "run", broken_reward(lambda call, prompt: call >= 8 and prompt.endswith("two"))
    with pytest.raises(RunError, match="after step 2: reward 'brightness' returned nan for the prompt 'a handwritten "
                                       "two'.*reward.on_nan=drop.*checkpoint-2 is the last checkpoint"):  # fmt: skip
        Trainer(config(model, folder, "draft", "stop", checkpointing_steps=2), reward=reward).train()
    assert [path.name for path in checkpoint.folders(folder)] == ["checkpoint-2"]
    resumed = config(model, folder, "draft", "drop", checkpointing_steps=2, resume_from_checkpoint="latest")
    Trainer(resumed, reward=broken_reward(lambda call, prompt: prompt.endswith("two"))).train()
    dropped = {line["step"]: line["train/dropped_samples"] for line in metrics(folder) if "train/loss" in line}
    assert dropped == {1: 0, 2: 0, 3: 1, 4: 1}


@pytest.mark.parametrize(
    "algorithm", ["draft", "ddpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dpok", "rwr"))]
)
def test_dropped_samples_are_counted_and_the_others_train(model, tmp_path, algorithm):
    reward = broken_reward(lambda call, prompt: prompt.endswith("two"))
    trainer = Trainer(config(model, tmp_path / "run", algorithm, "drop"), reward=reward)
    trainer.train()
    lines = [line for line in metrics(tmp_path / "run") if "train/dropped_samples" in line]
    assert [line["train/dropped_samples"] for line in lines] == [1] * 4
    assert all(math.isfinite(line["reward/brightness/mean"]) for line in lines)
    weights = [p for p in trainer.engine.model.parameters() if p.requires_grad]
    assert all(bool(p.isfinite().all()) for p in weights) and any(bool(p.any()) for p in weights)


@pytest.mark.parametrize("algorithm", TRAIN)
def test_all_samples_dropped_is_an_epoch_without_learning(model, tmp_path, algorithm):
    """Three of them in a row end the run; nothing was updated, and no NaN was written."""
    trainer = Trainer(config(model, tmp_path / "run", algorithm, "drop"), reward=broken_reward(lambda *_: True))
    before = [p.detach().clone() for p in trainer.engine.model.parameters() if p.requires_grad]
    with pytest.raises(RunError, match="three epochs in a row had nothing to learn from"):
        trainer.train()
    after = [p for p in trainer.engine.model.parameters() if p.requires_grad]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert [line["train/dropped_samples"] for line in metrics(tmp_path / "run") if "train/lr" in line] == [3] * 3


def test_exit_statuses_and_messages_of_the_command(model, tmp_path):
    """1 for a run that fails, 2 for what was asked wrongly; one line that says what to do, and never a traceback."""
    values = tiny.values(model, tmp_path / "run", train={"max_train_steps": 1}, eval={"lora_scales": []})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "half" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "file").touch()
    run = ["train", "draft", "--config", str(tmp_path / "run.yaml")]
    latest, done = ["--resume_from_checkpoint", "latest"], str(tmp_path / "run")
    commands = [
        (run, 0, ""),
        ([*run, *latest, "--seed", "3"], 2, "belongs to a run with another config (seed: 0 there, 3 here)"),
        ([*run, *latest, "--reward.on_nan", "drop"], 0, ""),
        ([*run, "--output_dir", str(tmp_path / "none"), *latest], 2, "holds no complete checkpoint"),
        ([*run, "--output_dir", str(tmp_path / "half"), "--resume_from_checkpoint",
          str(tmp_path / "half" / "checkpoint-3")], 2, "is half-written"),
        ([*run, "--output_dir", str(tmp_path / "file")], 2, "is a file; give a folder"),
        ([*run, "--output_dir", str(tmp_path / "p"), "--prompts", str(tmp_path / "empty.txt")], 2, "are empty"),
        ([*run, "--output_dir", str(tmp_path / "p"), "--prompts", str(tmp_path / "no.txt")], 2, "cannot be read"),
        ([*run, "--output_dir", str(tmp_path / "p"), "--train.gradient_accumulation_steps", "3"], 2,
         "train.batch_size=2 does not divide into 1 process(es) x train.gradient_accumulation_steps=3; the nearest"),
        ([*run, "--output_dir", str(tmp_path / "nan"), "--reward.function", "tiny.not_a_number"], 1,
         "no checkpoint was saved yet"),
        ([*run, "--output_dir", f"{done}/config.yaml/deeper"], 1, "could not be written"),
    ]  # fmt: skip
    command = [sys.executable, str(HERE / "command_lines.py")]
    lines = json.dumps([line for line, *_ in commands])
    result = subprocess.run(command, input=lines, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    for (line, status, message), (got, errors) in zip(commands, json.loads(result.stdout), strict=True):
        assert got == status and message in errors and "Traceback" not in errors, f"{line}: {got}\n{errors}"
        assert ("rftcore: error: " in errors) == bool(status)
