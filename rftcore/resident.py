"""Memory of this process that is resident, as the system counts it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil


def now() -> int:
    """Bytes."""
    return int(psutil.Process().memory_info().rss)


def largest() -> int:
    """The most bytes so far, or since `count_anew`.

    Linux's getrusage begins with what the parent had: a child of a large process would never be smaller. Other systems
    have nothing else.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def count_anew() -> bool:
    """Whether `largest` counts from here on: where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
