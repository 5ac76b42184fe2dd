"""Times work on a device: on a GPU by events round replays of a captured graph, so that launches cost what they must."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

# Inputs take turns until together they are larger than any L2: none is found there by the next turn.
_COLD_BYTES = 256 * 2**20


def turns(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of inputs of that size a cold measurement rotates among."""
    return 1 if device.type == "cpu" else max(1, min(32, _COLD_BYTES // max(bytes_of_one, 1)))


def seconds(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int, capture: bool = True) -> float:
    """The median time of one call, of `repeats` rounds in which each of `calls` runs once; three rounds to warm up.

    The calls do the same work on different inputs. On a GPU a round is a replay of a captured graph; without `capture`,
    and where the work cannot be captured, it is queued call by call, and its time has the launches' share.
    """
    if device.type == "cpu":
        return _by_the_clock(calls, repeats)
    for _ in range(3):
        _run(calls)
    torch.cuda.synchronize(device)
    work = (capture and _captured(calls)) or (lambda: _run(calls))
    return _by_events(work, repeats) / len(calls)


def _by_the_clock(calls: Sequence[Callable[[], object]], repeats: int) -> float:
    taken = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        _run(calls)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:]) / len(calls)


def _by_events(work: Callable[[], object], repeats: int) -> float:
    work()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in marks:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks) / 1e3


def _captured(calls: Sequence[Callable[[], object]]) -> Callable[[], object] | None:
    """A graph's replay; None where capturing fails."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            _run(calls)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def _run(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()
