"""A user's own code at the events of a run."""

import json

import tiny
from tiny import brightness

from rftcore.training import Callback, Trainer


class Recorder(Callback):
    def __init__(self, stop_after=None):
        self.events, self.stop_after = [], stop_after

    def on_train_begin(self, trainer):
        self.events.append(("begin", trainer.progress.step))

    def on_epoch_end(self, trainer, metrics):
        self.events.append(("epoch", trainer.progress.step))
        assert metrics["train/grad_norm"] > 0
        if trainer.progress.step == self.stop_after:
            trainer.stop("enough was seen")

    def on_evaluate(self, trainer, metrics):
        self.events.append(("evaluate", trainer.progress.step))
        assert metrics["eval/reward/brightness"] < 0

    def on_save(self, trainer, checkpoint):
        self.events.append(("save", trainer.progress.step))
        assert (checkpoint / "COMPLETE").exists()

    def on_train_end(self, trainer, results):
        self.events.append(("end", results["steps"]))


def test_every_event_in_its_order(model, tmp_path):
    recorder = Recorder()
    config = tiny.config(model, tmp_path / "run", checkpointing_steps=2, eval={"validation_steps": 2})
    Trainer(config, reward=brightness, callbacks=[recorder]).train()
    assert recorder.events == [
        ("begin", 0),
        ("evaluate", 0),
        ("epoch", 1),
        ("epoch", 2),
        ("evaluate", 2),
        ("save", 2),
        ("epoch", 3),
        ("evaluate", 3),
        ("save", 3),
        ("end", 3),
    ]


def test_a_stopped_run_ends_as_one_that_reached_its_last_step(model, tmp_path):
    recorder = Recorder(stop_after=2)
    results = Trainer(tiny.config(model, tmp_path / "run"), callbacks=[recorder]).train()
    assert recorder.events[-3:] == [("evaluate", 2), ("save", 2), ("end", 2)]
    short = Trainer(tiny.config(model, tmp_path / "short", train={"max_train_steps": 2})).train()
    assert results["rewards"] == short["rewards"] and results["steps"] == 2
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 2
