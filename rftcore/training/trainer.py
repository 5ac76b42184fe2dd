"""The training loop: one for every algorithm, on one process or many, resumable at every step."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from diffusers import DiffusionPipeline

from rftcore.errors import Interrupted, RunError, UsageError
from rftcore.rewards import RewardSpecError
from rftcore.sampling import RewardError
from rftcore.training import (
    assembly,
    checkpoint,
    environment,
    hub,
    memory_plan,
    outcome,
    parsing,
    report,
    run_prompts,
    trackers,
    weights,
)
from rftcore.training.accounting import peak_gib
from rftcore.training.algorithm_configs import batch_shares
from rftcore.training.batches import derived_seed
from rftcore.training.callbacks import Callback
from rftcore.training.checkpoint import Progress
from rftcore.training.config import RunConfig
from rftcore.training.epoch_log import EpochLog
from rftcore.training.evaluation import alarm, early_stop, grids, reference, validation
from rftcore.training.evaluation.scale_sweep import Sweep, sweep
from rftcore.training.guards import check_everything_learns
from rftcore.training.interruption import StopRequest
from rftcore.training.methods import METHODS, Update
from rftcore.training.optimization import LossScaling
from rftcore.training.progress_bar import ProgressBar
from rftcore.training.ranks import check_joined, end, failing_together
from rftcore.training.run_directory import CONFIG, RunDirectory


def of_averaged_weights(method: Callable) -> Callable:
    """A method of the trainer that sees the averaged weights, where there are some."""

    @functools.wraps(method)
    def run(trainer: Trainer, *given: Any) -> Any:
        with trainer.trained.averaged():
            return method(trainer, *given)

    return run


class Trainer:
    """Fine-tunes a pipeline's LoRA on a reward.

    Args:
        config: one of the config classes of `rftcore.training.config`; its class chooses the algorithm.
        reward: a function that replaces `config.reward.function`.
        held_out_reward: a function, or several, that replace `config.eval.held_out_reward`.
        pipeline: replaces `config.model`. It is used in place and keeps its dtype; it loses its text encoder and gains
            the adapter.
        callbacks: a user's own code at the events of the run.

    Raises:
        UsageError, rftcore.rewards.RewardSpecError, rftcore.prompts.PromptsError: when the request cannot work. Nothing
            has been written by then.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        reward: Callable | None = None,
        held_out_reward: Callable | Sequence[Callable] | None = None,
        pipeline: DiffusionPipeline | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self._started = time.perf_counter()
        config.validate()
        self.config, self.callbacks = config, list(callbacks)
        self.stop_reason: str | None = None
        if config.cpu_threads is not None:
            torch.set_num_threads(config.cpu_threads)
        self.judges = assembly.load_judges(config, reward, held_out_reward)
        METHODS[config.algorithm].check_reward(self.judges[0])
        prompts, validation_prompts = run_prompts.train_and_validation(config)
        self.directory = RunDirectory(config.output_dir)
        self._resume_from = self._find_start()
        self.accelerator = assembly.start_accelerator(config)
        check_joined(self.accelerator)
        batch_shares(config, self.accelerator.num_processes)
        if self.accelerator.is_main_process:
            hub.check(config)
        self.assembly = assembly.assemble(
            config,
            self.accelerator,
            self.judges,
            train_prompts=prompts,
            validation_prompts=validation_prompts,
            given=pipeline,
            memory=None if self._resume_from is None else memory_plan.load(self.directory, config),
        )
        self.engine, self.method = self.assembly.engine, self.assembly.method
        self.validation, self.trained = self.assembly.validation, self.assembly.trained
        self.optimizer, self.lr_scheduler = self.trained.optimizer, self.trained.lr_scheduler
        self.loss_scaling = LossScaling(self.optimizer, self.accelerator.scaler)
        self.progress = Progress()
        if self._resume_from is not None:
            self.progress = checkpoint.load(self._resume_from, self.trained, config)
        if self.progress.step > config.train.max_train_steps:
            raise UsageError(
                f"train.max_train_steps={config.train.max_train_steps} lies before {self._resume_from}; "
                "give a larger one, or resume from an earlier checkpoint"
            )
        # Asked of the first gradient after each start.
        self._learns = False
        self._reference: dict[str, torch.Tensor] | None = None
        self._seconds_before = self.progress.counters.wall_clock_s

    def _find_start(self) -> Path | None:
        """The checkpoint to go on from, or None in a free output folder; every process looks before any writes."""
        if self.config.resume_from_checkpoint is None:
            self.directory.check_free()
            return None
        if self.config.resume_from_checkpoint == "latest" and checkpoint.only_begun(self.directory.path, self.config):
            return None
        return checkpoint.find(self.config.resume_from_checkpoint, self.directory.path)

    def train(self) -> dict[str, Any]:
        """Runs to `max_train_steps` and returns what results.json holds.

        Raises:
            RunError: when training cannot go on; the last checkpoint stays.
            Interrupted: after SIGINT or SIGTERM, once a checkpoint and the LoRA are saved.
        """
        with failing_together(self.accelerator):
            return self._train()

    def _train(self) -> dict[str, Any]:
        self._open()
        last, updates = self.config.train.max_train_steps, self.config.train.updates_per_epoch
        self.bar = ProgressBar(last, self.progress.step, enabled=self.accelerator.is_main_process)
        try:
            self.bar.note(self._sizes())
            self._tell("on_train_begin")
            with StopRequest() as stop:
                if self.progress.step == 0 and 0 not in self.progress.evaluations:
                    self._evaluate()
                self._stop_if_asked(stop)
                self._stop_early()
                for epoch in range(self.progress.step // updates + 1, last // updates + 1):
                    if self.stop_reason:
                        self.bar.note(f"stopped after step {self.progress.step}: {self.stop_reason}")
                        break
                    before = self.progress.step
                    self._epoch(epoch)
                    if self.stop_reason or self._due(before, self.config.eval.validation_steps):
                        self._evaluate()
                    if self.stop_reason or self._due(before, self.config.checkpointing_steps):
                        self._save_checkpoint()
                    self._stop_if_asked(stop)
                # A run resumed at its last step takes no step that would have evaluated.
                if self.progress.step not in self.progress.evaluations:
                    self._evaluate()
                results = self._finish()
                self._tell("on_train_end", results)
                return results
        # The second is a reward's own, such as one whose server stopped answering.
        except (RewardError, RewardSpecError) as error:
            saved = checkpoint.folders(self.directory.path)
            last_saved = f"{saved[-1]} is the last checkpoint" if saved else "no checkpoint was saved yet"
            reason = str(error).rstrip(".")
            raise RunError(f"after step {self.progress.step}: {reason}. {last_saved}") from error
        finally:
            self.bar.close()

    def stop(self, reason: str) -> None:
        """Ends the run after this epoch, as if it had reached its last step. To be called on every process alike."""
        self.stop_reason = reason

    def _sizes(self) -> str:
        """What an epoch and an optimizer step are made of, here and on all processes."""
        train, processes = self.config.train, self.accelerator.num_processes
        rows, part = batch_shares(self.config, processes)
        shares = f"{rows} on each of {processes} process(es), {part} at a time"
        step = f"an optimizer step trains on {train.batch_size}: {shares}"
        if train.updates_per_epoch == 1 and train.samples_drawn == train.batch_size:
            return step
        return (
            f"an epoch draws {train.samples_drawn} samples, {train.samples_drawn // processes} on each process, and takes "
            f"{train.updates_per_epoch} optimizer step(s); {step}"
        )

    def _tell(self, event: str, *given: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(self, *given)

    def _open(self) -> None:
        self.accelerator.wait_for_everyone()
        run, step = self.directory.path.resolve().name, self.progress.step
        trackers.start(self.accelerator, run, checkpoint.flat(self.config), step)
        if self.accelerator.is_main_process:
            self.directory.write(CONFIG, parsing.to_yaml(self.config))
            self.directory.write("env.json", environment.describe(self.accelerator.num_processes))
            self.directory.rewind_metrics(self._resume_from)

    def _epoch(self, epoch: int) -> None:
        started = time.perf_counter()
        # Dropout and a user's reward may draw from the global generators: seeded by the epoch, they need no place in a
        # checkpoint.
        set_seed(derived_seed(self.config.seed, "global", epoch, self.accelerator.process_index) % 2**32)
        self.engine.unet.train()
        log = EpochLog(epoch)
        for update in self.method.epoch(epoch):
            if not self._learns and update.skipped is None:
                check_everything_learns(self.engine.model, lambda: self.sample_again(epoch))
                self._learns = True
                self._write_plan()
            log.add(update, *self._update(update))
        self._account(log, started)
        self._stop_if_nothing_is_learnt(log)

    def _stop_if_nothing_is_learnt(self, log: EpochLog) -> None:
        """Raises RunError, with a checkpoint saved, at the third epoch in a row that had nothing to learn from."""
        reason = log.nothing_learnt()
        self.progress.idle_epochs = self.progress.idle_epochs + 1 if reason else 0
        if reason:
            self.bar.note(f"epoch {log.epoch}: nothing is learnt, {reason}")
        if self.progress.idle_epochs >= 3:
            path = self._save_checkpoint()
            raise RunError(
                f"three epochs in a row had nothing to learn from: {reason}. Is the reward constant? Draw more samples "
                f"an epoch, or change the reward; everything is saved in {path}"
            )

    def _write_plan(self) -> None:
        plan = self.method.sampler.plan
        if plan is not None and self.accelerator.is_main_process:
            content = memory_plan.content(self.engine.memory, plan, self.config)
            self.directory.write(memory_plan.NAME, content)

    def sample_again(self, epoch: int) -> None:
        """One of an epoch's samples, as training draws it."""
        self.engine.sample(self.method.sampler, self.engine.samples(epoch, self.engine.batch_share.places[:1]))

    def _update(self, update: Update) -> tuple[float, float]:
        """Clips, steps, clears: one optimizer step. The gradient's norm before clipping, and the learning rate."""
        self.progress.step += 1
        step, learning_rate = self.progress.step, self.lr_scheduler.get_last_lr()[0]
        if update.skipped is not None:
            self.optimizer.zero_grad()
            self.lr_scheduler.step()
            return 0.0, learning_rate
        with self.engine.clock.measure("train"):
            return self._step(step), learning_rate

    def _step(self, step: int) -> float:
        limit = self.config.train.max_grad_norm
        grad_norm = float(
            self.accelerator.clip_grad_norm_(
                list(weights.trainable(self.trained.unet).values()), math.inf if limit is None else limit
            )
        )
        # With fp16's loss scaling an overflow is expected now and then: the scaler skips the step and lowers the scale.
        if not math.isfinite(grad_norm) and self.accelerator.scaler is None:
            raise RunError(
                f"step {step}: the gradient's norm is {grad_norm}; nothing was updated, and the last checkpoint stands. "
                "Begin anew with a lower train.learning_rate, a train.max_grad_norm, or mixed_precision=no"
            )
        self.optimizer.step()
        if self.loss_scaling.stepped() and self.trained.ema is not None:
            self.trained.ema.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        return grad_norm

    def _account(self, log: EpochLog, started: float) -> None:
        """Adds up an epoch over all processes and writes its line."""
        figures = log.over_processes(self.accelerator)
        counters, name = self.progress.counters, self.judges[0].name
        counters.samples += figures.samples
        counters.reward_queries += figures.reward_queries
        counters.unet_evaluations += figures.unet_evaluations
        counters.wall_clock_s = self._wall_clock()
        peak, seconds = self._peak_gib(), self.engine.clock.take()
        metrics = self._log(
            {
                f"reward/{name}/mean": figures.reward_mean,
                f"reward/{name}/std": figures.reward_std,
                **figures.metrics,
                **self.loss_scaling.take(),
                "train/saturated": figures.saturated,
                "count/epoch": log.epoch,
                "count/samples": counters.samples,
                "count/reward_queries": counters.reward_queries,
                "count/unet_evaluations": counters.unet_evaluations,
                "time/sample_s": seconds.get("sample", 0.0),
                "time/reward_s": seconds.get("reward", 0.0),
                "time/train_s": seconds.get("train", 0.0),
                "time/epoch_s": time.perf_counter() - started,
                "time/wall_clock_s": counters.wall_clock_s,
                "mem/peak_gib": peak,
            }
        )
        self._tell("on_epoch_end", metrics)
        self.bar.update(self.progress.step, figures.reward_mean, figures.metrics.get("train/loss", math.nan), peak)

    def _due(self, before: int, every: int | None) -> bool:
        """Whether the epoch since step `before` was the last, or passed a multiple of so many steps."""
        step = self.progress.step
        return step == self.config.train.max_train_steps or (every is not None and step // every > before // every)

    @of_averaged_weights
    def _evaluate(self) -> None:
        started, step, main = time.perf_counter(), self.progress.step, self.accelerator.is_main_process
        evaluation = self.validation()
        self.engine.clock.take()
        if step == 0:
            self._reference = evaluation.features
            if main:
                reference.save(self.directory, evaluation.features)
        now = self.progress.evaluations[step] = self._measures(evaluation)
        first = self.progress.evaluations.get(0, now)
        if main:
            self.directory.write(self.directory.sample_grid(step), grids.png(evaluation.grid))
        trackers.log_image(self.accelerator, "eval/samples", evaluation.grid, step)
        wrong = alarm.alarms(self.judges[0].name, [judge.name for judge in self.judges[1:]], now, first)
        figures = validation.metrics(now, first)
        metrics = self._log({**figures, "eval/alarm": float(bool(wrong)), "time/eval_s": time.perf_counter() - started})
        self._tell("on_evaluate", metrics)
        self.bar.note(f"step {step}: {validation.line(figures)} on {len(self.validation.prompts)} held-out images")
        for sentence in wrong:
            self.bar.note(f"step {step}: ALARM: {sentence}")
        self._keep_best()
        self._stop_early()

    def _measures(self, evaluation: validation.Evaluation) -> dict[str, list[float]]:
        """With each image's drift from step 0's."""
        if self._reference is None:
            self._reference = reference.load(self.directory, evaluation.features)
            if self._reference is None:
                self.bar.note(
                    f"{self.directory.path / reference.NAME} is gone or not of these images, so their drift since step "
                    "0 is not measured"
                )
        return evaluation.measures(self._reference)

    def _keep_best(self) -> None:
        """Saves what was just evaluated, where the first held-out judge likes it best and training made it."""
        step, held_out = self.progress.step, self.judges[1:]
        if not held_out or step == 0 or early_stop.best_step(self.progress.evaluations, held_out[0].name) != step:
            return
        if self.accelerator.is_main_process:
            mean = validation.Mean.of(self.progress.evaluations[step][held_out[0].name]).mean
            self.directory.write("best/best.json", {"step": step, held_out[0].name: mean})
            weights.save(self.engine.model, self.directory.path / "best")

    def _stop_early(self) -> None:
        if len(self.judges) > 1 and self.progress.evaluations and not self.stop_reason:
            reason = early_stop.reason_to_stop(
                self.progress.evaluations, self.judges[1].name, self.config.eval.early_stop_patience
            )
            if reason:
                self.stop(reason)

    def _log(self, metrics: dict[str, float]) -> dict[str, float]:
        """Writes a line of metrics.jsonl, and gives it back."""
        # JSON knows no NaN: what has no value, such as the mean of no rewards, is left out.
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if self.accelerator.is_main_process:
            self.directory.append_metrics({"step": self.progress.step, **metrics})
        self.accelerator.log(metrics, step=self.progress.step)
        return metrics

    def _save_checkpoint(self) -> Path:
        """Saved by the main process; the others wait, so that none leaves before the run is safe."""
        self.progress.counters.wall_clock_s = self._wall_clock()
        path = self.directory.path / f"checkpoint-{self.progress.step}"
        if self.accelerator.is_main_process:
            checkpoint.save(self.directory.path, self.trained, self.progress, self.config)
            checkpoint.rotate(self.directory.path, self.progress.step, self.config.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()
        self._tell("on_save", path)
        return path

    def _stop_if_asked(self, stop: StopRequest) -> None:
        """Saves and raises Interrupted once any process was signalled: all agree, after the same step."""
        signalled = torch.tensor([stop.signal_number], device=self.accelerator.device)
        number = int(self.accelerator.gather(signalled).max())
        if number:
            path = self._save_checkpoint()
            if self.accelerator.is_main_process:
                with self.trained.averaged():
                    weights.save(self.engine.model, self.directory.path)
            end(self.accelerator)
            raise Interrupted(number, str(path))

    @of_averaged_weights
    def _finish(self) -> dict[str, Any]:
        self.progress.counters.wall_clock_s = self._wall_clock()
        peak, figures = self._peak_gib(), {}
        scales = self._sweep()
        if self.accelerator.is_main_process:
            figures = outcome.write(self, scales, peak_gib=peak)
            self.bar.close()
            print(f"\n{report.table(figures)}\n\nwritten to {self.directory.path}", flush=True)
            if self.config.push_to_hub:
                print(hub.push(self.config), flush=True)
        self.accelerator.wait_for_everyone()
        end(self.accelerator)
        return figures

    def _sweep(self) -> Sweep | None:
        """The adapter at each of `eval.lora_scales`; all of it was just evaluated, and none of it at step 0."""
        if not weights.is_lora(self.engine.model) or not self.config.eval.lora_scales:
            return None
        evaluations = self.progress.evaluations
        known = {1.0: evaluations[self.progress.step]} | ({0.0: evaluations[0]} if 0 in evaluations else {})
        return sweep(self.engine.model, self.config.eval.lora_scales, known, self.validation, self._measures)

    def _peak_gib(self) -> float:
        """Of the process that held the most."""
        own = torch.tensor([peak_gib(self.accelerator.device)], device=self.accelerator.device)
        return float(self.accelerator.gather(own).max())

    def _wall_clock(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started
