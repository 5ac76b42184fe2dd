"""A user's own code at the events of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rftcore.training.trainer import Trainer


class Callback:
    """Override what is of interest; `Trainer(config, callbacks=[...])` calls it, on every process.

    `trainer.progress` holds the step and the counters, `trainer.engine.model` is the UNet, and `trainer.stop(reason)`
    ends the run after the epoch, as if it had reached its last step. What depends on chance, or writes a file, should
    look at `trainer.accelerator.is_main_process`. An error that is raised here ends the run.
    """

    def on_train_begin(self, trainer: Trainer) -> None:
        """Before the first evaluation, also of a resumed run."""

    def on_epoch_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After an epoch's optimizer steps, with its line of metrics.jsonl. With DRaFT an epoch is one step."""

    def on_evaluate(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After an evaluation, with its line of metrics.jsonl."""

    def on_save(self, trainer: Trainer, checkpoint: Path) -> None:
        """After a checkpoint is complete."""

    def on_train_end(self, trainer: Trainer, results: dict[str, Any]) -> None:
        """At the end, with what results.json holds; it is empty but on the main process."""
