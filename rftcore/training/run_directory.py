"""output_dir: who may write into it, and writing so that a crash leaves the old file or the new one, never half."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rftcore.errors import RunError, UsageError

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a file through a temporary name, fsync and rename. Raises: RunError where it cannot be written."""
    temporary = path.with_name(f".{path.name}.partial")
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Says of what cannot be written which file it is, and how to go on."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} could not be written ({error.strerror or error}); complete checkpoints are untouched. Make room or "
            "mend the folder, and continue with --resume_from_checkpoint latest"
        ) from error


def sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable, on systems where folders can be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def to_json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


class RunDirectory:
    """The folder that holds everything a run makes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = self.path / METRICS

    def check_free(self) -> None:
        """Raises UsageError unless a new run may start here: the folder must be empty or absent."""
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"output_dir={self.path} is a file; give a folder")
        # Half a file is what a start that was killed leaves.
        if self.path.is_dir() and any(not path.name.endswith(".partial") for path in self.path.iterdir()):
            raise UsageError(
                f"output_dir={self.path} is not empty; continue that run with --resume_from_checkpoint latest, "
                "or give another --output_dir"
            )

    def write(self, name: str, content: str | bytes | dict | list) -> Path:
        """Writes text, bytes, or anything else as JSON, under a name inside the folder."""
        target = self.path / name
        replace_file(target, content if isinstance(content, (str, bytes)) else to_json(content))
        return target

    def sample_grid(self, step: int) -> str:
        """Name of the evaluation's image grid after `step` optimizer steps."""
        return f"samples/step-{step:06d}.png"

    def append_metrics(self, metrics: dict[str, Any]) -> None:
        """Adds one line to metrics.jsonl. Raises: RunError where it cannot be written."""
        with _naming(self.metrics), open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def rewind_metrics(self, checkpoint: Path | None) -> None:
        """Puts back metrics.jsonl as it was when the checkpoint was saved; None: as it was before the first step."""
        saved = None if checkpoint is None else checkpoint / METRICS
        replace_file(self.metrics, saved.read_bytes() if saved is not None and saved.is_file() else b"")
