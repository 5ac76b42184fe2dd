"""A run stopped anywhere and resumed is, bit for bit, the run that was never stopped."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from rftcore.rewards import declare
from rftcore.training import Interrupted, Trainer, UsageError, checkpoint

HERE = Path(__file__).parent


def config(model, folder, **groups):
    """Prompts run out in mid-batch, noise is drawn in every step, evaluations and checkpoints fall in between."""
    train = {"max_train_steps": 5, "gradient_accumulation_steps": 2, "lr_scheduler": "linear", "lr_warmup_steps": 2}
    fixed = {"train": train, "sampling": {"eta": 1.0}, "eval": {"validation_steps": 2}, "checkpointing_steps": 3}
    return tiny.config(model, folder, **(fixed | groups))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """Folder of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "output"
    Trainer(config(model, folder)).train()
    return folder


def metrics(folder):
    """Every line of metrics.jsonl, without what the clock and the machine decide."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if not key.startswith(("time/", "mem/"))} for line in lines]


def assert_same_run(folder, whole, step=5):
    for name in ("trainable.safetensors", "pytorch_lora_weights.safetensors"):
        ours, theirs = (load_file(path / f"checkpoint-{step}" / name) for path in (folder, whole))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = (torch.load(path / f"checkpoint-{step}" / "state.pt", weights_only=True) for path in (folder, whole))
    assert ours["lr_scheduler"] == theirs["lr_scheduler"]
    for index, state in theirs["optimizer"]["state"].items():
        assert all(torch.equal(ours["optimizer"]["state"][index][key], state[key]) for key in state)
    assert metrics(folder) == metrics(whole)
    results = [json.loads((path / "results.json").read_text()) for path in (folder, whole)]
    for key in ("rewards", "samples", "reward_queries", "unet_evaluations"):
        assert results[0][key] == results[1][key]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_in_mid_step(model, tmp_path, whole, number):
    calls = []

    @declare(differentiable=True, unit="points")
    def brightness(images, prompts, metadata):
        calls.append(1)
        # One call an evaluation (before, and after step 2), two a step: this is in the middle of step 3.
        if len(calls) == 1 + 2 + 2 + 1 + 1:
            os.kill(os.getpid(), number)
        return tiny.brightness(images, prompts)

    folder = tmp_path / "run"
    with pytest.raises(Interrupted, match="checkpoint-3.*--resume_from_checkpoint latest") as stopped:
        Trainer(config(model, folder, reward={"images_per_call": 2}), reward=brightness).train()
    assert stopped.value.signal_number == number
    assert (folder / "pytorch_lora_weights.safetensors").exists()
    Trainer(config(model, folder, resume_from_checkpoint="latest")).train()
    assert_same_run(folder, whole)


def test_crash_between_checkpoints(model, tmp_path, whole):
    """Lines written after the last checkpoint, and half a line, are written anew: no gap and no repeat."""
    calls = []

    @declare(differentiable=True)
    def brightness(images, prompts, metadata):
        calls.append(1)
        if len(calls) > 1 + 2 * 4 + 2:
            raise MemoryError
        return tiny.brightness(images, prompts)

    folder = tmp_path / "run"
    with pytest.raises(MemoryError):
        Trainer(config(model, folder), reward=brightness).train()
    assert metrics(folder)[-1]["step"] == 4
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "reward/bri')
    (folder / ".checkpoint-4.partial").mkdir()
    Trainer(config(model, folder, resume_from_checkpoint=str(folder / "checkpoint-3"))).train()
    assert_same_run(folder, whole)


def test_ctrl_c_on_the_command_line(model, tmp_path):
    """Exits 130 with one message and no traceback; what follows equals the run that was never interrupted."""
    folder = tmp_path / "run"
    values = tiny.values(model, folder, train={"max_train_steps": 100_000})
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parents[1]}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "rftcore", "train", "draft", "--config", str(tmp_path / "run.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if (folder / "metrics.jsonl").exists() and len(metrics(folder)) > 2:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "saving after this step" in stderr and "--resume_from_checkpoint latest" in stderr
    assert "Traceback" not in stderr
    (saved,) = checkpoint.folders(folder)
    last = int(saved.name.removeprefix("checkpoint-")) + 2
    runs = {}
    for name, output, resume in (("resumed", folder, "latest"), ("whole", tmp_path / "whole", None)):
        train = {"max_train_steps": last}
        runs[name] = Trainer(tiny.config(model, output, train=train, resume_from_checkpoint=resume)).train()
    assert_same_run(folder, tmp_path / "whole", step=last)


def test_other_config_is_refused_with_the_differences(model, whole):
    other = config(model, whole, resume_from_checkpoint="latest", seed=3)
    other.lora = dataclasses.replace(other.lora, rank=4)
    with pytest.raises(UsageError, match="lora.rank: 2 there, 4 here; seed: 0 there, 3 here"):
        Trainer(other)


def test_half_written_checkpoint_is_refused_and_is_not_the_latest(model, whole):
    half = whole / "checkpoint-9"
    half.mkdir()
    try:
        with pytest.raises(UsageError, match="half-written.*checkpoint-3, .*checkpoint-5"):
            Trainer(config(model, whole, resume_from_checkpoint=str(half)))
        assert Trainer(config(model, whole, resume_from_checkpoint="latest")).progress.step == 5
    finally:
        half.rmdir()


def test_resumed_at_its_last_step_it_only_reports(model, tmp_path):
    folder = tmp_path / "run"
    first = Trainer(tiny.config(model, folder, checkpointing_steps=2)).train()
    train = {"max_train_steps": 3}
    again = Trainer(tiny.config(model, folder, train=train, resume_from_checkpoint="latest")).train()
    assert again["rewards"] == first["rewards"]
    early = tiny.config(
        model, folder, train={"max_train_steps": 2}, resume_from_checkpoint=str(folder / "checkpoint-2")
    )
    assert Trainer(early).train()["steps"] == 2
    with pytest.raises(UsageError, match="train.max_train_steps=1 lies before .*checkpoint-2"):
        Trainer(
            tiny.config(
                model, folder, train={"max_train_steps": 1}, resume_from_checkpoint=early.resume_from_checkpoint
            )
        )


def test_checkpoint_of_another_folder_is_refused(model, tmp_path, whole):
    with pytest.raises(UsageError, match="lies outside output_dir.*set --output_dir"):
        Trainer(config(model, tmp_path / "run", resume_from_checkpoint=str(whole / "checkpoint-3")))


def test_checkpoint_that_cannot_be_written_leaves_the_earlier_ones(model, tmp_path, monkeypatch):
    trainer = Trainer(config(model, tmp_path / "run", checkpointing_steps=2))
    write = checkpoint.torch.save

    def disk_full_at_4(content, path):
        if "checkpoint-4" in str(path):
            raise OSError(28, "No space left on device")
        write(content, path)

    monkeypatch.setattr(checkpoint.torch, "save", disk_full_at_4)
    with pytest.raises(Exception, match="checkpoint-4 could not be written.*No space left.*earlier checkpoints"):
        trainer.train()
    assert [path.name for path in checkpoint.folders(tmp_path / "run")] == ["checkpoint-2"]
    assert not list((tmp_path / "run").glob(".*"))
