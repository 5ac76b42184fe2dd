"""Times work on a device: on a GPU by events round replays of a captured graph, so that launches cost what they must."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

# Inputs take turns until together they are larger than any L2: none is found there by the next turn.
_COLD_BYTES = 256 * 2**20


def turns(bytes_of_one: int, device: torch.device) -> int:
    """How many sets of inputs of that size a cold measurement rotates among."""
    return 1 if device.type == "cpu" else max(1, min(32, _COLD_BYTES // max(bytes_of_one, 1)))


class Taken(NamedTuple):
    """A time, and whether it is that of a captured graph, without the launches' share."""

    seconds: float
    captured: bool


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """A stream of its own on a GPU: a backward runs where its forward ran, and the default stream cannot be captured."""
    if device.type == "cpu":
        yield
        return
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream(device).wait_stream(stream)


def time_of(calls: Sequence[Callable[[], object]], device: torch.device, repeats: int, capture: bool = True) -> Taken:
    """The median time of one call, of `repeats` rounds in which each of `calls` runs once; three rounds to warm up.

    The calls do the same work on different inputs. On a GPU a round is a replay of a captured graph; without `capture`,
    and where the work cannot be captured, it is queued call by call, and its time has the launches' share. Calls that
    differentiate a graph were made within the `side_stream` that this is called in.
    """
    if device.type == "cpu":
        return Taken(_by_the_clock(calls, repeats), False)
    for _ in range(3):
        _run(calls)
    torch.cuda.synchronize(device)
    replay = _captured(calls) if capture else None
    return Taken(_by_events(replay or (lambda: _run(calls)), repeats) / len(calls), replay is not None)


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
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            _run(calls)
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def _run(calls: Sequence[Callable[[], object]]) -> None:
    for call in calls:
        call()
