"""What a run has used: reward queries, samples, UNet evaluations, seconds, bytes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from rftcore import resident

GIB = 2**30


@dataclass
class Counters:
    """Totals over all processes and all resumed parts of the run; evaluation is not counted.

    Units: samples; reward evaluations of one image; UNet forward evaluations of one sample, each branch of guidance
    and each replay for a gradient being one; seconds of wall-clock, loading and evaluation included.
    """

    samples: int = 0
    reward_queries: int = 0
    unet_evaluations: int = 0
    wall_clock_s: float = 0.0


class Stopwatch:
    """Seconds by name since the last `take`; waits for the device at each border, so that a name gets what it used."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] += self._now() - start

    def take(self) -> dict[str, float]:
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def peak_gib(device: torch.device) -> float:
    """The most memory this process has held so far, in GiB: CUDA's allocator on a GPU, resident memory elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resident.largest() / GIB
