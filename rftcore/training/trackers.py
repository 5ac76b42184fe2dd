"""Trackers beside metrics.jsonl, by accelerate's names: tensorboard, wandb, mlflow, ..."""

from __future__ import annotations

import contextlib
import io
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL import Image

from rftcore.errors import UsageError, nearest

PROJECT = "rftcore"
# Of the run at Weights & Biases, in the folder of logs.
_ID = "wandb-id"
# accelerate's name -> the package that brings it, where that is called otherwise.
_PACKAGES = {"comet_ml": "comet-ml"}
# Of those that show images: how each takes one (H, W, 3), and what it is told beside it. aim's wants PIL's.
_IMAGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "tensorboard": (lambda image: numpy.asarray(image)[None], {"dataformats": "NHWC"}),
    "wandb": (lambda image: [image], {}),
    "swanlab": (lambda image: [image], {}),
    "clearml": (numpy.asarray, {}),
    "aim": (lambda image: image, {}),
}


def names(report_to: str | list[str] | None) -> list[str]:
    """The trackers asked for, each once; those that write into the run's folder last.

    Raises: UsageError for a name that accelerate does not know, or one whose package is not installed: accelerate itself
        would go on without it, and say nothing.
    """
    asked = [] if report_to is None else [report_to] if isinstance(report_to, str) else report_to
    installed = [str(name) for name in get_available_trackers()]
    for name in asked:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UsageError(f"report_to={name!r} is no tracker of accelerate's; {nearest(name, LOGGER_TYPE_TO_CLASS)}")
        if name not in installed:
            raise UsageError(
                f"report_to={name} is not installed; pip install {_PACKAGES.get(name, name)}, or leave it out"
            )
    return sorted(dict.fromkeys(asked), key=lambda name: LOGGER_TYPE_TO_CLASS[name].requires_logging_directory)


def start(accelerator: Accelerator, run: str, settings: dict[str, Any], step: int) -> None:
    """Starts what `accelerator` logs with, without ever asking for a login.

    A run that goes on after `step` shows no step twice: TensorBoard drops what it has of later ones, Weights & Biases
    goes on with the same run, which ignores steps it has, and the others get a run of their own.

    Args:
        run: the run's name.
        settings: the config, by dotted keys.

    Raises: UsageError where one does not start, such as one that wants a login.
    """
    if not accelerator.log_with or not accelerator.is_main_process:
        return
    folder = Path(accelerator.logging_dir)
    starting = [str(name) for name in accelerator.log_with]
    options: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": step + 1} if step else {}}
    if "wandb" in starting:
        folder.mkdir(parents=True, exist_ok=True)
        kept = _kept_id(folder)
        options["wandb"] = {"name": run, "dir": str(folder), "id": kept, "resume": "allow"}
    flat = {key: value if isinstance(value, (bool, int, float, str)) else str(value) for key, value in settings.items()}
    try:
        with _nobody_to_ask():
            accelerator.init_trackers(PROJECT, config=flat, init_kwargs=options)
        if "wandb" in starting:
            (folder / _ID).write_text(kept, encoding="utf-8")
    except (Exception, SystemExit) as error:  # whatever their packages raise
        # The next try is to find the run's folder free.
        for empty in (folder, folder.parent):
            with contextlib.suppress(OSError):
                empty.rmdir()
        raise UsageError(
            f"report_to={', '.join(starting)} does not start: {type(error).__name__}: {error}. Log in beforehand, or set "
            "the tracker's offline mode (WANDB_MODE=offline for wandb), or leave it out; metrics.jsonl is written in "
            "any case"
        ) from error


def log_image(accelerator: Accelerator, name: str, image: Image.Image, step: int) -> None:
    """Shows an image where a tracker can."""
    if accelerator.is_main_process:
        for tracker in accelerator.trackers:
            if tracker.name in _IMAGES:
                convert, options = _IMAGES[tracker.name]
                tracker.log_images({name: convert(image)}, step=step, **options)


def _kept_id(folder: Path) -> str:
    """The id that this folder's run was given at its first start, or a new one."""
    return (folder / _ID).read_text(encoding="utf-8") if (folder / _ID).exists() else uuid.uuid4().hex


@contextlib.contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """A block in which there is no terminal to prompt at: a run must not wait for a login that nobody gives."""
    stdin, sys.stdin = sys.stdin, io.StringIO()
    try:
        yield
    finally:
        sys.stdin = stdin
