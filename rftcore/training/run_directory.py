"""output_dir: who may write into it, and writing so that a crash leaves the old file or the new one, never half."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rftcore.training.errors import UsageError


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a file through a temporary name, fsync and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


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
        self.metrics = self.path / "metrics.jsonl"

    def check_free(self) -> None:
        """Raises UsageError unless a new run may start here: the folder must be empty or absent."""
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"output_dir={self.path} is a file; give a folder")
        if self.path.is_dir() and any(self.path.iterdir()):
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
        """Adds one line to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")

    def rewind_metrics(self, step: int) -> None:
        """Drops the lines after `step`, and a half-written last one: the resumed run writes them again."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
        replace_file(self.metrics, "".join(kept))
