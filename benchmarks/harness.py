"""Runs the cases of a comparison interleaved, and writes what was seen as JSON and as a table."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import PeakBytes

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "rftcore")


@dataclasses.dataclass(frozen=True)
class Case:
    """One way of doing the work.

    Args:
        name: the row's name.
        run: does the work once.
        columns: further columns of the row, name -> value.
    """

    name: str
    run: Callable[[], Any]
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def compare(cases: Sequence[Case], *, repeats: int, warmup: int = 1, counted: bool = True) -> list[dict[str, Any]]:
    """Times every case `repeats` times, in turns, after `warmup` rounds; counts the peak bytes of one more round.

    Args:
        counted: False leaves that round out, for cases that have the number, or take long.

    Returns:
        a row a case: its columns, median, minimum and maximum seconds, peak MiB of the tensors it makes.
    """
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for turn in range(warmup + repeats):
        for case in cases:
            gc.collect()
            _synchronise()
            start = time.perf_counter()
            case.run()
            _synchronise()
            if turn >= warmup:
                seconds[case.name].append(time.perf_counter() - start)
    rows = []
    for case in cases:
        taken = seconds[case.name]
        row = {
            "case": case.name,
            **case.columns,
            "median_s": statistics.median(taken),
            "min_s": min(taken),
            "max_s": max(taken),
        }
        if counted:
            with PeakBytes() as live:
                case.run()
            row["peak_mib"] = live.peak / 2**20
        rows.append(row)
    return rows


def environment() -> dict[str, Any]:
    """Device, versions, threads and date of this run."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m", _module_name(), *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {_cpu_name()}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _PACKAGES},
    }


def report(name: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Path:
    """Prints the rows as a table and writes them to `benchmarks/results/<name>.json`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"environment": environment(), "settings": dict(settings), "rows": [dict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(table(rows))
    print(f"written to {path.relative_to(RESULTS.parent.parent)}")
    return path


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


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _module_name() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
