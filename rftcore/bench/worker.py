"""A process that holds one method's models and runs it when told to: what it takes of memory is its own."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from rftcore import resident
from rftcore.bench.counted import Counter, Impossible, problem_for
from rftcore.bench.methods import Method
from rftcore.bench.sides import Settled, Side, make_side
from rftcore.commands.bench_options import DTYPES, BenchOptions
from rftcore.sampling import Plan

# Runs of a chain until its graphs are launched.
_LIVES = 3
# Rows of the square matrices whose product is the ceiling: on a GPU the larger ones fill it.
_CEILING_ROWS = {"cpu": 2048, "cuda": 8192}
_CEILING_SECONDS = 1.0
# Linux's, of a signal that comes when the parent ends.
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Failed:
    """What came instead of an answer: a status for the row."""

    status: str


def serve(connection: Any, options: BenchOptions) -> None:
    """Answers calls (name, arguments) of `Tasks` until the connection is closed."""
    _prepare(options)
    tasks = Tasks(options)
    while True:
        try:
            name, arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = getattr(tasks, name)(*arguments)
        except Impossible as reason:
            answer = Failed(str(reason))
        except Exception as error:  # noqa: BLE001  what a method cannot do is a result
            answer = Failed(_status(error))
        connection.send(answer)


class Tasks:
    """What a worker can be told, by name."""

    def __init__(self, options: BenchOptions) -> None:
        self._options = options
        self._device = options.device
        self._counter: Counter | None = None
        self._made: Side | None = None

    def count(self, method: Method, settled: Settled | None) -> dict[str, Any]:
        return self._counted().count(method, settled)

    def settle(self, method: Method, counted: Mapping[str, Mapping[str, Any]]) -> Settled:
        return self._counted().settle(method, counted)

    def prepare(self, method: Method, settled: Settled | None) -> int:
        """Makes the models, warms up, and gives the bytes of the weights."""
        problem = problem_for(method, self._options, self._device)
        steps, count = self._options.steps, self._options.differentiated
        warmup, work = self._options.warmup, self._options.work
        # A step of each kind there is: without a gradient, the first with one, whose latents have none, and one after it.
        last = min(count, 2) if work == "draft" else 1
        some = last + (work == "draft" and count < steps)
        if warmup == "short" and work != "train_step" and steps > some:
            side = make_side(method, problem, some, last, _shortened(settled, some, last))
            side.run(work, update=False)
            warmup = "none"
        self._made = make_side(method, problem, steps, count, settled)
        runs = 0 if warmup == "none" else 1
        # As it is, captured, launched: what is timed is what goes on from there.
        for _ in range(_LIVES if self._device == "cuda" and method.sampler else runs):
            self._side.run(work, update=False)
        return problem.weight_bytes

    def run(self) -> dict[str, float]:
        """Seconds of a run, and the MiB that it takes at its largest beyond what was there before."""
        _trim()
        on_gpu = self._device == "cuda"
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if on_gpu else _rss_counted_anew()
        start = time.perf_counter()
        self._side.run(self._options.work)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        found = {"seconds": seconds}
        if before is not None:
            peak = torch.cuda.max_memory_allocated() if on_gpu else resident.largest()
            found["cuda_mib" if on_gpu else "rss_mib"] = (peak - before) / 2**20
        _trim()
        return found

    def gradients(self) -> torch.Tensor:
        """Of the LoRA, one after the other, in fp64; none are applied."""
        self._side.run(self._options.work, update=False)
        found = [p.grad for p in self._side.problem.trained if p.grad is not None]
        return torch.cat([gradient.detach().double().flatten().cpu() for gradient in found])

    def truth(self, method: Method) -> torch.Tensor:
        """The gradients of a stock method in fp64, on the same weights."""
        problem = problem_for(method, self._options, self._device, truth=True)
        self._made = make_side(method, problem, self._options.steps, self._options.differentiated)
        return self.gradients()

    def ceiling(self) -> float:
        """FLOP/s of a square matrix product of the frozen weights' dtype, the best of a second's."""
        rows, dtype = _CEILING_ROWS[self._device], getattr(torch, DTYPES[self._options.dtype])
        a, b = (torch.randn(rows, rows, device=self._device).to(dtype) for _ in range(2))
        wait = torch.cuda.synchronize if self._device == "cuda" else (lambda: None)
        a @ b
        wait()
        taken: list[float] = []
        end = time.perf_counter() + _CEILING_SECONDS
        while not taken or time.perf_counter() < end:
            start = time.perf_counter()
            a @ b
            wait()
            taken.append(time.perf_counter() - start)
        return 2 * rows**3 / min(taken)

    @property
    def _side(self) -> Side:
        if self._made is None:
            raise RuntimeError("nothing is prepared: call prepare, or truth, first")
        return self._made

    def _counted(self) -> Counter:
        if self._counter is None:
            self._counter = Counter(self._options)
        return self._counter


def _prepare(options: BenchOptions) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    # Compilers' advice to the authors of the models.
    warnings.simplefilter("ignore")
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    # Whose run is killed does not run on.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The first to go where the machine itself runs out.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _status(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return f"OOM: {text}"[:300]
    traceback.print_exc(file=sys.stderr)
    return f"{type(error).__name__}: {text}"[:300]


def _shortened(settled: Settled | None, steps: int, last: int) -> Settled | None:
    """Of a plan, its last steps, as it keeps them, behind steps without a gradient."""
    if settled is None or settled.plan is None:
        return settled
    stored = (None,) * (steps - last) + settled.plan.stored[-last:]
    plan: Plan = replace(settled.plan, stored=stored, differentiated=last, peak_bytes=0)
    return replace(settled, plan=plan)


def _trim() -> None:
    """Gives freed bytes back, where the C library can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _rss_counted_anew() -> int | None:
    """Bytes of the process, whose largest is counted from here on; None where the system cannot."""
    return resident.now() if resident.count_anew() else None
