"""`rftcore check`: what it measures is what a run does, and nothing is written."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rftcore import cli
from rftcore.errors import RunError
from rftcore.rewards import declare
from rftcore.training import Trainer, check
from rftcore.training.parsing import load_config

SMALL = [
    '--prompts=["a handwritten one", "a handwritten two"]',
    '--eval.validation_prompts=["a handwritten four", "a handwritten five"]',
    "--eval.num_validation_images=2",
    "--sampling.num_inference_steps=3",
    "--train.batch_size=4",
    "--train.max_train_steps=10",
    "--checkpointing_steps=4",
]


def config(*overrides):
    return load_config("draft", "digits_draft", *SMALL, *overrides)


@declare(differentiable=True, unit="points")
def brightness(images, prompts, metadata=None):
    return -(images - 0.7).square().mean(dim=(1, 2, 3))


@declare(differentiable=True)
def flat(images, prompts, metadata=None):
    return (images * 0).sum(dim=(1, 2, 3))


@declare(differentiable=True)
def out_of_memory(images, prompts, metadata=None):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 GiB")


@pytest.fixture(scope="module")
def measured():
    return check.check(config("--eval.validation_steps=5"), reward=brightness)


def test_every_figure(measured):
    assert measured.samples == 4 and measured.validation_images == 4
    assert measured.adapted == measured.learning > 0 and measured.broken is None
    assert set(measured.phases_s) == {"reward", "sample", "train"} and all(s > 0 for s in measured.phases_s.values())
    assert sum(measured.phases_s.values()) <= measured.epoch_s
    peaks = list(measured.peak_gib.values())
    assert list(measured.peak_gib) == ["loading", "training", "validation"] and peaks == sorted(peaks)
    assert set(measured.rewards) == {"brightness", "digits_held_out"}
    assert 0 <= measured.saturated <= 1
    assert min(measured.load_s, measured.validation_s, measured.checkpoint_s) > 0


def test_the_evaluation_and_the_optimizer_are_the_runs(measured, tmp_path):
    """The same images are judged as before the first step of the run, and AdamW holds as much as was said."""
    run = Trainer(config(f"--output_dir={tmp_path}/run", "--train.max_train_steps=1"), reward=brightness)
    run.train()
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    for name, mean in measured.rewards.items():
        assert first[f"eval/reward/{name}"] == pytest.approx(mean, abs=1e-6)
    moments = [t for state in run.optimizer.state.values() for t in state.values() if t.ndim > 0]
    assert sum(t.nbytes for t in moments) / 2**30 == pytest.approx(measured.optimizer_gib)


def test_the_whole_runs_seconds(measured):
    """Counted against the trainer's own decisions, step by step."""
    for last, every, saving in ((10, 5, 4), (11, 5, 4), (1, None, 1), (7, 7, 7), (7, 8, 8), (12, 1, 5)):
        run = config(f"--train.max_train_steps={last}", f"--checkpointing_steps={saving}")
        run.eval.validation_steps = every
        due = [0, *(n for n in range(1, last + 1) if n == last or (every and n % every == 0))]
        saved = [n for n in range(1, last + 1) if n % saving == 0 or n == last]
        assert check.evaluations(run) == len(due) and check.checkpoints(run) == len(saved)
        seconds = check.whole_run_s(run, measured)
        steps = measured.first_epoch_s + (last - 1) * measured.epoch_s
        swept = 3  # of the scales 0, .25, .5, .75, 1 those between
        others = (len(due) + swept) * measured.validation_s + len(saved) * measured.checkpoint_s
        assert math.isclose(seconds, measured.load_s + steps + others)


def test_epochs_of_several_steps(measured):
    """An epoch in which several evaluations fall due evaluates once."""
    run = load_config("ddpo", "ddpo_sd15", "--train.samples_per_epoch=32", "--train.batch_size=8")
    run.train.max_train_steps, run.train.inner_epochs = 24, 1  # 6 epochs of 4 steps
    for every, times in ((1, 6), (4, 6), (5, 5), (6, 4), (8, 3), (24, 1), (100, 1), (None, 1)):
        run.eval.validation_steps = run.checkpointing_steps = every
        assert check.evaluations(run) == 1 + times and check.checkpoints(run) == times
    assert math.isclose(
        check.whole_run_s(run, measured) - measured.load_s - (2 + 3) * measured.validation_s - measured.checkpoint_s,
        measured.first_epoch_s + 5 * measured.epoch_s,
    )


def test_the_report_names_what_a_user_plans_by(measured):
    text = check.report(config("--eval.validation_steps=5"), measured)
    for words in ("peak memory", "GiB", "of 4 samples", "10 steps, 3 validations, 3 checkpoints"):
        assert words in text
    assert f"{measured.adapted} of {measured.adapted} modules receive a gradient" in text
    assert [check.duration(s) for s in (59.6, 700, 3725)] == ["60 s", "12 min", "1 h 2 min"]


def test_no_step_is_taken(monkeypatch):
    built = []

    class Kept(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.before = {name: p.clone() for name, p in self.engine.model.named_parameters()}
            built.append(self)

    monkeypatch.setattr(check, "Trainer", Kept)
    check.check(config("--eval.num_validation_images=1"), reward=brightness)
    (trainer,) = built
    for name, parameter in trainer.engine.model.named_parameters():
        assert torch.equal(parameter, trainer.before[name])
    assert not trainer.optimizer.state


def test_a_reward_without_a_gradient_is_told_with_the_figures(capsys):
    with pytest.raises(RunError, match="no adapted module received a gradient"):
        check.check(config(), reward=flat)
    assert "0 of 40 modules receive a gradient" in capsys.readouterr().out


def test_out_of_memory_says_where_and_what_to_lower():
    with pytest.raises(RunError, match=r"ran out of memory in training: lower train.batch_size=4 .*7 GiB"):
        check.check(config(), reward=out_of_memory)


@pytest.mark.slow
def test_the_command_beside_a_running_one(tmp_path):
    """The output folder of the config may hold a run: it is left as it is, and nothing else is written."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("mine\n")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    result = subprocess.run(
        [sys.executable, "-m", "rftcore", "check", "draft", "--config", "digits_draft", *SMALL]
        + [f"--output_dir={folder}", "--eval.num_validation_images=1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert result.returncode == 0, result.stderr
    assert "peak memory" in result.stdout and "whole run" in result.stdout
    written = [path for path in tmp_path.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert [path.relative_to(tmp_path) for path in written] == [Path("run/metrics.jsonl")]
    assert (folder / "metrics.jsonl").read_text() == "mine\n"


def test_mistakes_are_told_as_for_train(capsys):
    assert cli.main(["check", "draft", "--config", "digit_draft"]) == 2
    assert "did you mean 'digits_draft'" in capsys.readouterr().err
