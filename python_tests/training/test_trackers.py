"""Trackers get every metric once, the config and the grids; what is not there, or wants a login, is said beforehand."""

import json
import sys
import types

import pytest
import tiny
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rftcore.training import Trainer, UsageError, trackers


class Recorder(GeneralTracker):
    """Keeps what it is told."""

    name, requires_logging_directory = "trackio", False
    runs = []

    def __init__(self, run_name, **options):
        super().__init__()
        self.run_name, self.options, self.lines, self.settings = run_name, options, [], None

    def start(self):
        self.runs.append(self)

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **_):
        self.lines.append((step, values))


class Asking(Recorder):
    def start(self):
        input("API key: ")


@pytest.fixture
def install(monkeypatch):
    """Stands a tracker in for one of accelerate's, as if its package were here."""

    def put(name, kind):
        kind = type(kind.__name__, (kind,), {"name": name, "runs": []})
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, name, kind)
        monkeypatch.setattr(tracking, "_available_trackers", [*tracking._available_trackers, LoggerType(name)])
        return kind

    return put


def events(folder):
    accumulator = EventAccumulator(str(folder / "logs" / "rftcore"), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_several_at_once(model, tmp_path, install):
    recorder = install("trackio", Recorder)
    folder = tmp_path / "output"
    Trainer(tiny.config(model, folder, report_to=["tensorboard", "trackio", "tensorboard"])).train()
    (run,) = recorder.runs
    assert run.run_name == "rftcore"
    assert run.settings["train.learning_rate"] == 1e-2 and run.settings["lora.target_modules"].startswith("['to_q'")
    assert run.settings["hub_model_id"] == "None"
    assert [{"step": step, **values} for step, values in run.lines] == metrics(folder)
    shown = events(folder)
    for name in ("train/loss", "eval/reward/contrast"):
        expected = [(line["step"], line[name]) for line in metrics(folder) if name in line]
        assert [event.step for event in shown.Scalars(name)] == [step for step, _ in expected]
        assert [event.value for event in shown.Scalars(name)] == pytest.approx([value for _, value in expected])
    assert {event.step for event in shown.Images("eval/samples")} == {0, 3}
    (settings,) = (folder / "logs" / "rftcore").rglob("hparams.yml")
    assert "train.learning_rate: 0.01" in settings.read_text()


def test_resumed_run_shows_no_step_twice(model, tmp_path):
    folder, train = tmp_path / "output", {"max_train_steps": 4}
    groups = {"report_to": "tensorboard", "train": train, "checkpointing_steps": 2, "eval": {"validation_steps": 1}}
    Trainer(tiny.config(model, folder, **groups)).train()
    Trainer(tiny.config(model, folder, resume_from_checkpoint=str(folder / "checkpoint-2"), **groups)).train()
    shown = events(folder)
    assert [event.step for event in shown.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in shown.Scalars("eval/reward/contrast")] == [0, 1, 2, 3, 4]
    assert [event.step for event in shown.Images("eval/samples")] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_wandb_goes_on_with_the_same_run(model, tmp_path, install):
    recorder = install("wandb", Recorder)
    # Shown as a list of PIL's images, which is what the real one takes.
    recorder.log_images = lambda self, values, step: self.lines.append((step, values))
    folder = tmp_path / "output"
    groups = {"report_to": "wandb", "train": {"max_train_steps": 2}, "checkpointing_steps": 1}
    Trainer(tiny.config(model, folder, **groups)).train()
    Trainer(tiny.config(model, folder, resume_from_checkpoint=str(folder / "checkpoint-1"), **groups)).train()
    first, second = recorder.runs
    assert first.options == second.options and first.options["resume"] == "allow" and first.options["name"] == "output"
    assert first.options["dir"] == str(folder / "logs")
    images = [step for step, values in first.lines if "eval/samples" in values]
    assert images == [0, 2]
    Trainer(tiny.config(model, tmp_path / "other", **groups)).train()
    assert recorder.runs[2].options["id"] != first.options["id"]


@pytest.mark.parametrize(
    ("report_to", "message"),
    [("tensorbord", "no tracker of accelerate's; did you mean 'tensorboard'"), (["comet_ml"], "pip install comet-ml")],
)
def test_trackers_that_are_not_there(model, tmp_path, report_to, message, monkeypatch):
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    with pytest.raises(UsageError, match=message):
        Trainer(tiny.config(model, tmp_path / "run", report_to=report_to))
    assert not (tmp_path / "run").exists()


def test_nobody_is_asked_for_a_login(model, tmp_path, install, monkeypatch):
    """Whoever asks gets no answer, at a terminal too, and the folder is free for the next try."""
    install("wandb", Asking)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(readline=lambda: "typed\n", isatty=lambda: True))
    trainer = Trainer(tiny.config(model, tmp_path / "run", report_to=["tensorboard", "wandb"]))
    with pytest.raises(UsageError, match="wandb.*does not start: EOFError.*Log in beforehand.*metrics.jsonl"):
        trainer.train()
    assert not (tmp_path / "run").exists() and sys.stdin.isatty()


def test_names():
    assert trackers.names(None) == trackers.names([]) == []
    assert trackers.names("tensorboard") == trackers.names(["tensorboard", "tensorboard"]) == ["tensorboard"]
