"""What was seen, with where and when: a table for people, JSON for machines."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "rftcore")


def environment(command: str, threads: int | None = None, device: str = "auto") -> dict[str, Any]:
    """Device, versions, threads and date.

    Args:
        threads: none: PyTorch's in this process.
        device: cpu, cuda, or auto: CUDA where there is one.
    """
    on_gpu = torch.cuda.is_available() and device != "cpu"
    return {
        "date": datetime.date.today().isoformat(),
        "command": command,
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {_cpu_name()}",
        "threads": threads or torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(name, "")) for name in names) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
