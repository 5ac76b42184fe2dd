"""A run stopped anywhere and resumed is, bit for bit, the run that was never stopped."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import yaml
from same_run import assert_same_run, metrics

from rftcore.rewards import declare
from rftcore.training import Interrupted, RunError, Trainer, UsageError, checkpoint, memory_plan
from rftcore.training.algorithm_configs import AlignpropConfig
from rftcore.training.parsing import build

HERE = Path(__file__).parent


def config(model, folder, **groups):
    """Prompts run out in mid-batch, noise is drawn in every step, evaluations and checkpoints fall in between."""
    train = {"max_train_steps": 5, "gradient_accumulation_steps": 2, "lr_scheduler": "linear", "lr_warmup_steps": 2}
    fixed = {"train": train, "sampling": {"eta": 1.0}, "checkpointing_steps": 3}
    fixed["eval"] = {"validation_steps": 2, "lora_scales": []}
    return tiny.config(model, folder, **(fixed | groups))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """Folder of the uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "output"
    Trainer(config(model, folder)).train()
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
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
    assert_same_run(folder, whole, step=5)


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
    assert_same_run(folder, whole, step=5)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_disk_full_in_mid_save_is_told_and_leaves_the_earlier_checkpoints(model, tmp_path, whole):
    """No file may grow beyond a few KiB: real writers fail, those of safetensors and of torch among them."""
    folder = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    @declare(differentiable=True, unit="points")
    def brightness(images, prompts, metadata):
        # Between the checkpoint of step 3 and that of step 5.
        if checkpoint.folders(folder):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        return tiny.brightness(images, prompts)

    try:
        for limit, name in (  # noqa: B007  # the reward reads the limit
            (9000, "checkpoint-5 could not be written"),
            (1, "metrics.jsonl could not be written"),
        ):
            shutil.rmtree(folder, ignore_errors=True)
            with pytest.raises(RunError, match=f"{name} .*File too large.*resume_from_checkpoint latest"):
                Trainer(config(model, folder), reward=brightness).train()
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert [path.name for path in checkpoint.folders(folder)] == ["checkpoint-3"]
            assert not list(folder.glob(".*"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    Trainer(config(model, folder, resume_from_checkpoint="latest")).train()
    assert_same_run(folder, whole, step=5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("trainable.safetensors", b"\0" * 100, r"trainable.safetensors is damaged \(its SHA-256.*checkpoint-3"),
        ("state.pt", b"", r"state.pt is damaged \(its SHA-256.*resume from another checkpoint: .*checkpoint-3"),
        ("state.pt", None, "state.pt is damaged .*No such file"),
        ("progress.json", b'{"form', "progress.json is damaged"),
        ("progress.json", b"[]", "no checkpoint of this rftcore: progress.json has other contents"),
        ("progress.json", None, "no checkpoint of rftcore: progress.json is missing"),
        ("COMPLETE", b"yes", "COMPLETE is damaged"),
    ],
)
def test_damaged_and_foreign_checkpoints_are_named(model, tmp_path, whole, name, content, message):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    file = folder / "checkpoint-5" / name
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        Trainer(config(model, folder, resume_from_checkpoint="latest"))


def test_checkpoint_of_a_later_format_is_refused(model, tmp_path, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    file = folder / "checkpoint-5" / "progress.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(UsageError, match="has format 99, and this rftcore reads format 1; resume with the version"):
        Trainer(config(model, folder, resume_from_checkpoint="latest"))


@pytest.mark.slow
def test_going_back_to_an_earlier_checkpoint_makes_the_later_ones_anew(model, tmp_path, whole):
    """Until its own checkpoint is complete the later one can still be resumed, with all of its metrics."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)

    @declare(differentiable=True, unit="points")
    def brightness(images, prompts, metadata):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        earlier = str(folder / "checkpoint-3")
        Trainer(config(model, folder, resume_from_checkpoint=earlier), reward=brightness).train()
    Trainer(config(model, folder, resume_from_checkpoint="latest")).train()
    assert_same_run(folder, whole, step=5)
    Trainer(config(model, folder, resume_from_checkpoint=earlier, checkpointing_steps=1)).train()
    assert [path.name for path in checkpoint.folders(folder)] == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
    assert_same_run(folder, whole, step=5)


def test_rotation_removes_the_oldest_and_those_of_a_future_that_is_made_again(tmp_path):
    for step in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / checkpoint.MARK).touch()
    (tmp_path / "checkpoint-best").mkdir()
    checkpoint.rotate(tmp_path, step=6, limit=2)
    assert [path.name for path in checkpoint.folders(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    assert (tmp_path / "checkpoint-best").exists()


@pytest.mark.slow
def test_run_that_was_only_begun_goes_on_from_its_first_step(model, tmp_path, whole):
    folder = tmp_path / "run"

    @declare(differentiable=True, unit="points")
    def brightness(images, prompts, metadata):
        raise MemoryError

    with pytest.raises(MemoryError):
        Trainer(config(model, folder), reward=brightness).train()
    with pytest.raises(UsageError, match="config.yaml belongs to a run with another config .seed: 0 there, 3 here"):
        Trainer(config(model, folder, resume_from_checkpoint="latest", seed=3))
    Trainer(config(model, folder, resume_from_checkpoint="latest")).train()
    assert_same_run(folder, whole, step=5)


def test_plans_of_random_paths_are_made_with_the_memory_of_the_first_run(model, tmp_path, monkeypatch):
    """Each step has a plan of its own; what was free at the first start decides all of them."""
    folder = tmp_path / "run"
    train = {"train": {"max_train_steps": 2, "reward_target": None, "backprop_steps": None}}
    values = tiny.values(model, folder, checkpointing_steps=1, **train)
    del values["train"]["backprop_steps"]
    trainer = Trainer(build(AlignpropConfig, values))
    trainer.train()
    monkeypatch.setattr(memory_plan, "free_memory", lambda device: 12345)
    values |= {"resume_from_checkpoint": "latest", "train": values["train"] | {"max_train_steps": 3}}
    again = Trainer(build(AlignpropConfig, values))
    assert again.engine.memory == trainer.engine.memory
    values["memory"] = {"budget": "3GiB", "reserve": "1GiB"}
    assert Trainer(build(AlignpropConfig, values)).engine.memory == memory_plan.Memory(3 * 2**30, 2**30)
    (folder / "plan.json").write_text("{}")
    with pytest.raises(UsageError, match="plan.json is damaged.*remove it"):
        Trainer(build(AlignpropConfig, values))
