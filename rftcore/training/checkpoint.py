"""Resumable checkpoints: a folder that is complete or absent, never half.

The main process alone saves: weights, optimizer, averages and an algorithm's own state are the same on every process,
and randomness is a function of the seed, the epoch and the process's number. So another number of processes may resume.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rftcore import documents
from rftcore.errors import RunError, UsageError
from rftcore.training import weights
from rftcore.training.accounting import Counters
from rftcore.training.config import RunConfig
from rftcore.training.ema import Ema
from rftcore.training.run_directory import CONFIG, METRICS, sync_folder, to_json

# Holds the SHA-256 of every other file.
MARK = "COMPLETE"
TRAINABLE, STATE, PROGRESS = "trainable.safetensors", "state.pt", "progress.json"
FORMAT = 1
# Writers in other languages have errors of their own for a disk that is full.
_WRITING = (OSError, RuntimeError, SafetensorError)
# What a resumed run may be told differently: where and how long, not what is learnt.
FREE_KEYS = {
    "output_dir",
    "cpu_threads",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "train.max_train_steps",
    "train.gradient_accumulation_steps",
    "train.rollout_batch_size",
    "train.rescore",
    "memory.budget",
    "memory.reserve",
    "memory.accelerate",
    "memory.capture",
    "memory.compile",
    "reward.images_per_call",
    "reward.on_nan",
    "eval.validation_steps",
    "eval.early_stop_patience",
    "eval.lora_scales",
    "eval.batch_size",
}


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside tensors.

    evaluations: step -> measure -> values, as `Evaluation.measures` gives them.
    idle_epochs: how many in a row, the last among them, had nothing to learn from.
    Randomness has no state to keep: it is a function of the seed and the step.
    """

    step: int = 0
    counters: Counters = field(default_factory=Counters)
    evaluations: dict[int, dict[str, list[float]]] = field(default_factory=dict)
    idle_epochs: int = 0


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
    found = [path for path in output_dir.glob("checkpoint-*") if _step_of(path) >= 0 and (path / MARK).is_file()]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    """N of checkpoint-N, -1 of anything else."""
    number = path.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


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


def only_begun(output_dir: Path, config: RunConfig) -> bool:
    """Whether this run was begun there and stopped before its first checkpoint: it goes on from its first step.

    Raises: UsageError when what was begun is a run with another config.
    """
    begun = output_dir / CONFIG
    if not begun.is_file() or folders(output_dir):
        # Nothing but half a file: stopped before its config was written.
        return output_dir.is_dir() and all(path.name.endswith(".partial") for path in output_dir.iterdir())
    with _reading(begun):
        stored = _flattened(documents.from_yaml(begun.read_text(encoding="utf-8")))
    _check_same_run(begun, stored, config)
    return True


def save(output_dir: Path, trained: Trained, progress: Progress, config: RunConfig) -> Path:
    """Writes checkpoint-N under a temporary name, syncs it to disk, marks it complete and renames it.

    It holds the run's metrics so far, too: whichever checkpoint is resumed, they go on without gap or repeat.

    Raises: RunError where it cannot be written; the checkpoints before it are untouched.
    """
    final = output_dir / f"checkpoint-{progress.step}"
    partial, replaced = (output_dir / f".{final.name}.{state}" for state in ("partial", "replaced"))
    _clear(output_dir)
    try:
        partial.mkdir(parents=True)
        _write(partial, trained, progress, config)
        if final.exists():
            os.rename(final, replaced)
        os.rename(partial, final)
        sync_folder(output_dir)
    except _WRITING as error:
        raise RunError(
            f"{final} could not be written ({_line(error)}); earlier checkpoints are untouched. Is the disk full? Make "
            "room, and continue with --resume_from_checkpoint latest"
        ) from error
    finally:
        _clear(output_dir)
    return final


def _write(folder: Path, trained: Trained, progress: Progress, config: RunConfig) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.trainable(trained.unet).items()}
    save_file(tensors, folder / TRAINABLE)
    # Of a whole UNet, what is trained is all there is.
    if weights.is_lora(trained.unet):
        with trained.averaged():
            weights.save(trained.unet, folder)
    torch.save({name: thing.state_dict() for name, thing in trained.states().items()}, folder / STATE)
    if (folder.parent / METRICS).exists():
        shutil.copyfile(folder.parent / METRICS, folder / METRICS)
    record = {"format": FORMAT, "algorithm": config.algorithm, "config": flat(config), "progress": asdict(progress)}
    (folder / PROGRESS).write_text(to_json(record), encoding="utf-8")
    sums = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
    (folder / MARK).write_text(to_json(sums), encoding="utf-8")
    for path in folder.iterdir():
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def _clear(output_dir: Path) -> None:
    """Removes what savings that were cut short have left."""
    for pattern in (".checkpoint-*.partial", ".checkpoint-*.replaced"):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def load(path: Path, trained: Trained, config: RunConfig) -> Progress:
    """Puts a checkpoint's state back.

    Raises: UsageError when it belongs to another config or another model, is damaged, or no checkpoint of this version.
    """
    record = _record(path)
    _check_same_run(path, {"algorithm": record["algorithm"], **record["config"]}, config)
    _check_intact(path)
    parameters = weights.trainable(trained.unet)
    with _reading(path / TRAINABLE):
        tensors = load_file(path / TRAINABLE)
    fits = tensors.keys() == parameters.keys() and all(
        tensors[name].shape == parameters[name].shape for name in tensors
    )
    if not fits:
        raise UsageError(f"{path} was made for another model or adapter: its parameters have other names or shapes")
    with _reading(path / STATE):
        states = torch.load(path / STATE, map_location="cpu", weights_only=True)
    with _reading(path / PROGRESS):
        progress = _progress(record["progress"])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    with _reading(path / STATE):
        for name, thing in trained.states().items():
            thing.load_state_dict(states[name])
    return progress


def _progress(stored: dict[str, Any]) -> Progress:
    progress = Progress(
        step=stored["step"],
        counters=Counters(**stored["counters"]),
        evaluations={int(step): scores for step, scores in stored["evaluations"].items()},
        idle_epochs=stored["idle_epochs"],
    )
    counted = [progress.step, progress.idle_epochs, *asdict(progress.counters).values(), *progress.evaluations]
    if not all(isinstance(count, (int, float)) and count >= 0 for count in counted):
        raise ValueError("what it counts is no number")
    scores = [scores for measures in progress.evaluations.values() for scores in measures.values()]
    if not all(isinstance(score, (int, float)) for score in itertools.chain(*scores)):
        raise ValueError("what it has of evaluations is no list of numbers")
    return progress


def _record(path: Path) -> dict[str, Any]:
    """What progress.json holds, of a format that is known."""
    file = path / PROGRESS
    if not file.exists():
        raise UsageError(f"{path} is no checkpoint of rftcore: {file.name} is missing; {_others(path)}")
    with _reading(file):
        record = documents.from_json(file.read_text(encoding="utf-8"))
    parts = {"format": int, "algorithm": str, "config": dict, "progress": dict}
    if not isinstance(record, dict) or not all(isinstance(record.get(name), kind) for name, kind in parts.items()):
        raise UsageError(f"{path} is no checkpoint of this rftcore: {file.name} has other contents; {_others(path)}")
    if record["format"] != FORMAT:
        raise UsageError(
            f"{path} has format {record['format']}, and this rftcore reads format {FORMAT}; resume with the version that "
            "wrote it (env.json names it)"
        )
    return record


def _check_intact(path: Path) -> None:
    """Raises UsageError for a file that is not what was written."""
    with _reading(path / MARK):
        sums = dict(documents.from_json((path / MARK).read_text(encoding="utf-8")))
        if unnamed := {TRAINABLE, STATE, PROGRESS} - sums.keys():
            raise ValueError(f"it has no SHA-256 of {', '.join(sorted(unnamed))}")
    for name, expected in sums.items():
        with _reading(path / name):
            if _checksum(path / name) != expected:
                raise ValueError("its SHA-256 is another than when it was written")


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Says of a file that cannot be read which it is, and what else there is."""
    try:
        yield
    except UsageError:
        raise
    # A file that is not what was written makes errors of every kind: of pickle, zip, safetensors and what it is put into.
    except Exception as error:
        what = _line(error) or type(error).__name__
        raise UsageError(f"{file} is damaged ({what}); {_others(file.parent)}") from error


def _others(path: Path) -> str:
    known = [str(folder) for folder in folders(path.parent) if folder != path]
    return f"resume from another checkpoint: {', '.join(known)}" if known else "there is no other checkpoint beside it"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def rotate(output_dir: Path, step: int, limit: int | None) -> None:
    """Removes the complete checkpoints that have had their day; called only once that of `step` is complete.

    Those of later steps are a future that the run went back from, and makes again; of the others the newest `limit`
    stay.
    """
    complete = folders(output_dir)
    later = [path for path in complete if _step_of(path) > step]
    earlier = complete[: len(complete) - len(later)]
    for path in later + ([] if limit is None else earlier[:-limit]):
        # The mark goes first: a removal that is cut short leaves no folder that looks complete.
        (path / MARK).unlink()
        shutil.rmtree(path)


def flat(config: RunConfig) -> dict[str, Any]:
    """The config as dotted keys and values."""
    return _flattened(asdict(config))


def _flattened(nested: dict[str, Any]) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for key, value in nested.items():
        pairs |= {f"{key}.{inner}": it for inner, it in value.items()} if isinstance(value, dict) else {f"{key}": value}
    return pairs


def _check_same_run(path: Path, stored: dict[str, Any], config: RunConfig) -> None:
    """`stored` is a flat config, and may name its algorithm."""
    current = {"algorithm": config.algorithm, **flat(config)}
    stored = {"algorithm": config.algorithm, **stored}
    differing = [key for key in sorted({*stored, *current} - FREE_KEYS) if stored.get(key) != current.get(key)]
    if differing:
        changes = "; ".join(f"{key}: {stored.get(key)!r} there, {current.get(key)!r} here" for key in differing)
        raise UsageError(f"{path} belongs to a run with another config ({changes}); resume with the same one")
