"""`rftcore check`: an epoch of training and one evaluation of a run, measured before it is started."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from rftcore.errors import RunError
from rftcore.rewards import RewardSpecError
from rftcore.sampling import Plan, RewardError
from rftcore.training import checkpoint, weights
from rftcore.training.accounting import GIB, peak_gib
from rftcore.training.config import RunConfig
from rftcore.training.epoch_log import EpochLog
from rftcore.training.evaluation.validation import Mean
from rftcore.training.guards import check_everything_learns
from rftcore.training.ranks import end
from rftcore.training.trainer import Trainer


@dataclass(frozen=True)
class Figures:
    """What was measured, the largest of all processes where they differ.

    Units: seconds; GiB, the most that was held from the start to the end of each phase (CUDA: reserved by the allocator;
    elsewhere the process's resident memory); reward points.

    Attributes:
        phases_s: of an epoch's sampling, reward and training, in one after the first; an epoch is a single optimizer step
            where the algorithm follows the reward's gradient.
        epoch_s: of that whole epoch.
        first_epoch_s: of the first, with what is compiled, measured and allocated once.
        peak_gib: by phase, in their order.
        optimizer_gib: what the optimizer will hold besides; it takes no step here.
        adapted, learning: modules that are trained, and those of them that receive a gradient.
        plan: what the chain's steps keep, with the peak that was predicted.
        broken: why the run would stop in its first step, or None.
    """

    phases_s: dict[str, float]
    load_s: float
    first_epoch_s: float
    epoch_s: float
    validation_s: float
    checkpoint_s: float
    peak_gib: dict[str, float]
    optimizer_gib: float
    samples: int
    validation_images: int
    rewards: dict[str, float]
    saturated: float
    adapted: int
    learning: int | None
    plan: Plan | None
    broken: str | None


def check(
    config: RunConfig,
    *,
    reward: Callable | None = None,
    held_out_reward: Callable | None = None,
    pipeline: DiffusionPipeline | None = None,
) -> Figures:
    """Builds the run, trains for two epochs without an optimizer, evaluates once, and prints what that took.

    The output folder is neither read nor written. The arguments are the trainer's.

    Raises:
        RunError: where the run would fail in its first step, after the figures are printed.
        UsageError, rftcore.rewards.RewardSpecError, rftcore.prompts.PromptsError: as the trainer.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="rftcore-check-") as folder:
        trainer = Trainer(
            _elsewhere(config, Path(folder, "run")), reward=reward, held_out_reward=held_out_reward, pipeline=pipeline
        )
        trainer.engine.clock.take()
        figures = _Measurement(trainer, Path(folder), time.perf_counter() - started).run()
    if trainer.accelerator.is_main_process:
        print(report(config, figures), flush=True)
    end(trainer.accelerator)
    if figures.broken is not None:
        raise RunError(figures.broken)
    return figures


def _elsewhere(config: RunConfig, folder: Path) -> RunConfig:
    """The same run as a new one in a folder of its own: the real one may be running, or wait to be resumed."""
    config = copy.deepcopy(config)
    config.output_dir, config.resume_from_checkpoint = str(folder), None
    return config


class _Measurement:
    def __init__(self, trainer: Trainer, folder: Path, load_s: float) -> None:
        self.trainer, self.engine, self.folder = trainer, trainer.engine, folder
        self.device = trainer.accelerator.device
        self.load_s = self._most(load_s)
        self.peaks: dict[str, float] = {}
        self.learning: int | None = None
        self.broken: str | None = None
        self.phase = "loading"
        self._note_peak()

    def run(self) -> Figures:
        try:
            return self._run()
        except torch.OutOfMemoryError as error:
            config = self.engine.config
            raise RunError(
                f"{self.device} ran out of memory in {self.phase}: lower train.batch_size={config.train.batch_size} or "
                f"raise train.gradient_accumulation_steps={config.train.gradient_accumulation_steps}, lower "
                f"reward.images_per_call={config.reward.images_per_call}, eval.batch_size={config.eval.batch_size} or "
                f"sampling.resolution, or set mixed_precision=bf16 ({error})"
            ) from error
        except (RewardError, RewardSpecError) as error:
            raise RunError(str(error)) from error

    def _run(self) -> Figures:
        engine, trainer = self.engine, self.trainer
        self.phase = "training"
        first_s = self._epoch(1)
        engine.clock.take()
        epoch_s = self._epoch(2)
        phases = {name: self._most(seconds) for name, seconds in sorted(engine.clock.take().items())}
        figures = self.log.over_processes(trainer.accelerator)
        self._note_peak()
        self.phase = "validation"
        started = time.perf_counter()
        evaluation = trainer.validation()
        validation_s = self._most(time.perf_counter() - started)
        self._note_peak()
        return Figures(
            phases_s=phases,
            load_s=self.load_s,
            first_epoch_s=first_s,
            epoch_s=epoch_s,
            validation_s=validation_s,
            checkpoint_s=self._checkpoint_s(),
            peak_gib=self.peaks,
            optimizer_gib=self._optimizer_gib(),
            samples=figures.samples,
            validation_images=len(trainer.validation.prompts),
            rewards={name: Mean.of(values).mean for name, values in evaluation.scores.items()},
            saturated=figures.saturated,
            adapted=len(weights.trained_modules(engine.model)),
            learning=self.learning,
            plan=trainer.method.sampler.plan,
            broken=self.broken,
        )

    def _epoch(self, epoch: int) -> float:
        """Seconds of an epoch, but for the optimizer's own part."""
        self.engine.unet.train()
        self.log, seconds = EpochLog(epoch), 0.0
        self._wait()
        started = time.perf_counter()
        for update in self.trainer.method.epoch(epoch):
            self._wait()
            seconds += time.perf_counter() - started
            if self.learning is None and update.skipped is None:
                self.learning, self.broken = self._learning(), self._why_broken()
            self.trainer.optimizer.zero_grad()
            self.log.add(update, 0.0, 0.0)
            self._wait()
            started = time.perf_counter()
        return self._most(seconds)

    def _learning(self) -> int:
        """How many trained modules have a gradient that is not zero."""
        model = self.engine.model
        return len(weights.trained_modules(model)) - len(weights.silent(model))

    def _why_broken(self) -> str | None:
        gradients = [p.grad for p in weights.trainable(self.engine.model).values() if p.grad is not None]
        # With fp16's loss scaling an overflow is expected now and then, and skipped.
        if self.trainer.accelerator.scaler is None and not all(bool(g.isfinite().all()) for g in gradients):
            return (
                "step 1: a gradient is NaN or inf; set mixed_precision=no, or look for a square root, norm or logarithm "
                "at zero in the reward"
            )
        try:
            check_everything_learns(self.engine.model, lambda: self.trainer.sample_again(1))
        except RunError as error:
            return str(error)
        return None

    def _checkpoint_s(self) -> float:
        """Of one checkpoint, in the system's temporary folder; only the main process writes them."""
        trainer = self.trainer
        if not trainer.accelerator.is_main_process:
            return self._most(0.0)
        started = time.perf_counter()
        checkpoint.save(self.folder, trainer.trained, trainer.progress, self.engine.config)
        return self._most(time.perf_counter() - started)

    def _optimizer_gib(self) -> float:
        """AdamW's two moments of every trained parameter."""
        return sum(2 * p.nbytes for p in weights.trainable(self.engine.model).values()) / GIB

    def _note_peak(self) -> None:
        if self.device.type == "cuda":
            own = torch.cuda.max_memory_reserved(self.device) / GIB
        else:
            own = peak_gib(self.device)
        self.peaks[self.phase] = self._most(own)

    def _most(self, value: float) -> float:
        """The largest of all processes'."""
        own = torch.tensor([value], device=self.device, dtype=torch.float32)
        return float(self.trainer.accelerator.gather(own).max())

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def evaluations(config: RunConfig) -> int:
    """How often a whole run evaluates: before, every `eval.validation_steps`, and after."""
    return 1 + _times(config, config.eval.validation_steps)


def checkpoints(config: RunConfig) -> int:
    """How many checkpoints a whole run writes: every `checkpointing_steps`, and at the end."""
    return _times(config, config.checkpointing_steps)


def _swept(config: RunConfig) -> int:
    """Scales of the adapter at which it is evaluated at the end; none and all of it are known."""
    return len({*config.eval.lora_scales} - {0.0, 1.0}) if config.train.weights == "lora" else 0


def _times(config: RunConfig, every: int | None) -> int:
    """Of a run's epochs, those that are the last or in which a multiple of `every` steps is passed."""
    updates = config.train.updates_per_epoch
    epochs = config.train.max_train_steps // updates
    if every is None:
        return 1
    early = sum(epoch * updates // every > (epoch - 1) * updates // every for epoch in range(1, epochs))
    return early + 1


def whole_run_s(config: RunConfig, figures: Figures) -> float:
    """Seconds from the start of a run to its end, as the figures promise."""
    epochs = config.train.max_train_steps // config.train.updates_per_epoch
    return (
        figures.load_s
        + figures.first_epoch_s
        + (epochs - 1) * figures.epoch_s
        + evaluations(config) * figures.validation_s
        + checkpoints(config) * figures.checkpoint_s
        + _swept(config) * figures.validation_s
    )


def report(config: RunConfig, figures: Figures) -> str:
    """The figures for a terminal."""
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in figures.phases_s.items())
    peaks = ", ".join(f"{phase} {gib:.2f}" for phase, gib in figures.peak_gib.items())
    rewards = ", ".join(f"{name} {mean:.3f}" for name, mean in figures.rewards.items())
    steps = config.train.max_train_steps
    rows = {
        "peak memory": f"{max(figures.peak_gib.values()):.2f} GiB (up to the end of: {peaks}); "
        f"the optimizer adds {figures.optimizer_gib * 1024:.1f} MiB",
        "plan": str(figures.plan or "nothing is differentiated through the chain"),
        _period(config): f"{figures.epoch_s:.2f} s of {figures.samples} samples ({phases} s); the first took "
        f"{figures.first_epoch_s:.2f} s",
        "validation": f"{figures.validation_s:.2f} s of {figures.validation_images} images ({rewards} before training)",
        "checkpoint": f"{figures.checkpoint_s:.2f} s",
        "learning": f"{figures.learning} of {figures.adapted} modules receive a gradient; "
        f"{figures.saturated:.1%} of the samples' pixel values are clamped",
        "whole run": f"{duration(whole_run_s(config, figures))}: {steps} steps, {evaluations(config)} validations, "
        f"{checkpoints(config)} checkpoints, {figures.load_s:.1f} s to load",
    }
    return "\n".join(f"{name:<12} {row}" for name, row in rows.items())


def _period(config: RunConfig) -> str:
    updates = config.train.updates_per_epoch
    return "step" if updates == 1 else f"{updates} steps"


def duration(seconds: float) -> str:
    """3725.0 -> "1 h 2 min"; seconds below ten minutes."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
