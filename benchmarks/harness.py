"""Runs the cases of a comparison interleaved, and writes what was seen as JSON and as a table."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import PeakBytes
from rftcore.bench import record
from rftcore.bench.record import table

__all__ = ["RESULTS", "Case", "command", "compare", "environment", "report", "table"]

RESULTS = Path(__file__).parent / "results"


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
    return record.environment(command())


def command() -> str:
    """What this process was started by."""
    return " ".join(["python -m", _module_name(), *sys.argv[1:]])


def report(name: str, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Path:
    """Prints the rows as a table and writes them to `benchmarks/results/<name>.json`."""
    path = RESULTS / f"{name}.json"
    content = {"environment": environment(), "settings": dict(settings), "rows": [dict(row) for row in rows]}
    record.write(path, content)
    print(table(rows))
    print(f"written to {path.relative_to(RESULTS.parent.parent)}")
    return path


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _module_name() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]
