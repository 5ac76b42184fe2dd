"""Resumable checkpoints: a folder that is complete or absent, never half."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rftcore.training import weights
from rftcore.training.accounting import Counters
from rftcore.training.config import RunConfig
from rftcore.training.ema import Ema
from rftcore.training.errors import RunError, UsageError
from rftcore.training.run_directory import sync_folder, to_json

MARK = "COMPLETE"
# What a resumed run may be told differently: where and how long, not what is learnt.
FREE_KEYS = {
    "output_dir",
    "cpu_threads",
    "report_to",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "train.max_train_steps",
    "train.gradient_accumulation_steps",
    "memory.budget",
    "memory.reserve",
    "memory.capture",
    "reward.images_per_call",
    "eval.validation_steps",
    "eval.batch_size",
}


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside tensors.

    evaluations: step -> reward name -> one score for each validation image.
    Randomness has no state to keep: it is a function of the seed and the step.
    """

    step: int = 0
    counters: Counters = field(default_factory=Counters)
    evaluations: dict[int, dict[str, list[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """The objects whose state changes in training. `scaler` is None outside fp16, `ema` where nothing is averaged."""

    unet: nn.Module
    optimizer: Any
    lr_scheduler: Any
    method: Any
    scaler: Any = None
    ema: Ema | None = None

    def averaged(self) -> AbstractContextManager[None]:
        """A block in which the UNet's weights are the averaged ones: those that are evaluated and given away."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def states(self) -> dict[str, Any]:
        stateful = {
            "optimizer": self.optimizer,
            "lr_scheduler": self.lr_scheduler,
            "method": self.method,
            "scaler": self.scaler,
            "ema": self.ema,
        }
        return {name: thing for name, thing in stateful.items() if thing is not None}


def folders(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if (path / MARK).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def find(resume_from_checkpoint: str, output_dir: Path) -> Path:
    """The checkpoint that "latest" or a path in `output_dir` stands for.

    Raises: UsageError where there is none, or it is half-written or another run's.
    """
    if resume_from_checkpoint == "latest":
        complete = folders(output_dir)
        if not complete:
            raise UsageError(
                f"resume_from_checkpoint=latest: {output_dir} holds no complete checkpoint; "
                "start anew without it, in an empty output_dir"
            )
        return complete[-1]
    path = Path(resume_from_checkpoint)
    if not (path / MARK).is_file():
        known = ", ".join(str(folder) for folder in folders(output_dir)) or "none"
        state = "is half-written or no rftcore checkpoint" if path.is_dir() else "does not exist"
        raise UsageError(f"resume_from_checkpoint={path} {state}; complete checkpoints in {output_dir}: {known}")
    if path.resolve().parent != output_dir.resolve():
        raise UsageError(
            f"resume_from_checkpoint={path} lies outside output_dir={output_dir}, and its run's metrics and samples "
            f"with it; set --output_dir {path.resolve().parent}, or copy that whole folder and resume in the copy"
        )
    return path


def save(output_dir: Path, trained: Trained, progress: Progress, config: RunConfig) -> Path:
    """Writes checkpoint-N under a temporary name, syncs it to disk, marks it complete and renames it.

    Raises: RunError where it cannot be written; the checkpoints before it are untouched.
    """
    final = output_dir / f"checkpoint-{progress.step}"
    partial = output_dir / f".{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in weights.trainable(trained.unet).items()}
        save_file(tensors, partial / "trainable.safetensors")
        # Of a whole UNet, what is trained is all there is.
        if weights.is_lora(trained.unet):
            with trained.averaged():
                weights.save(trained.unet, partial)
        torch.save({name: thing.state_dict() for name, thing in trained.states().items()}, partial / "state.pt")
        record = {"algorithm": config.algorithm, "config": flat(config), "progress": asdict(progress)}
        (partial / "progress.json").write_text(to_json(record), encoding="utf-8")
        (partial / MARK).touch()
        for path in partial.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        sync_folder(partial)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        sync_folder(output_dir)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(f"{final} could not be written ({error}); earlier checkpoints are untouched") from error
    return final


def load(path: Path, trained: Trained, config: RunConfig) -> Progress:
    """Puts a checkpoint's state back. Raises: UsageError when it belongs to another config or another model."""
    record = json.loads((path / "progress.json").read_text(encoding="utf-8"))
    _check_same_run(path, record, config)
    tensors, parameters = load_file(path / "trainable.safetensors"), weights.trainable(trained.unet)
    fits = tensors.keys() == parameters.keys() and all(
        tensors[name].shape == parameters[name].shape for name in tensors
    )
    if not fits:
        raise UsageError(f"{path} was made for another model or adapter: its parameters have other names or shapes")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    states = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    for name, thing in trained.states().items():
        thing.load_state_dict(states[name])
    stored = record["progress"]
    return Progress(
        step=stored["step"],
        counters=Counters(**stored["counters"]),
        evaluations={int(step): scores for step, scores in stored["evaluations"].items()},
    )


def rotate(output_dir: Path, limit: int | None) -> None:
    """Removes the oldest complete checkpoints beyond the limit; called only once a newer one is complete."""
    if limit is not None:
        for path in folders(output_dir)[:-limit]:
            # The mark goes first: a removal that is cut short leaves no folder that looks complete.
            (path / MARK).unlink()
            shutil.rmtree(path)


def flat(config: RunConfig) -> dict[str, Any]:
    """The config as dotted keys and values."""
    nested = asdict(config)
    pairs = {}
    for key, value in nested.items():
        pairs |= {f"{key}.{inner}": it for inner, it in value.items()} if isinstance(value, dict) else {key: value}
    return pairs


def _check_same_run(path: Path, record: dict[str, Any], config: RunConfig) -> None:
    stored, current = (
        {"algorithm": record["algorithm"], **record["config"]},
        {"algorithm": config.algorithm, **flat(config)},
    )
    differing = [key for key in sorted({*stored, *current} - FREE_KEYS) if stored.get(key) != current.get(key)]
    if differing:
        changes = "; ".join(f"{key}: {stored.get(key)!r} there, {current.get(key)!r} here" for key in differing)
        raise UsageError(f"{path} belongs to a run with another config ({changes}); resume with the same one")
