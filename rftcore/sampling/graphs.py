"""A chain in segments, which run as they are, or are captured once and launched again: the driver, for any recorder."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rftcore.sampling.recent import Recent

T = TypeVar("T")
# How many keys that may not come again are remembered.
_MET = 64


class Recorder(Protocol):
    """What captures segments, all of one recorder in one memory pool."""

    def prepare(self) -> None:
        """Is called before the first capture of a chain."""

    def warm_up(self, work: Callable[[], T]) -> T:
        """Runs `work` as it is, where and how it will be captured."""

    def capture(self, work: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """Records what `work` launches, without executing it. Returns what launches it, and what `work` returned.

        Raises: whatever `work` or the capture does; nothing is left of it then, and `warm_up` works.
        """

    @property
    def bytes(self) -> int:
        """What the pool holds."""


@dataclasses.dataclass(frozen=True)
class _Segment:
    """A captured piece of a chain.

    Attributes:
        result: what its work returned, detached: the graph inside is the chain's to keep alive, and to let go.
        leaves: whether that has tensors, in memory that the segments after it must leave alone.
    """

    name: Hashable
    replay: Callable[[], None]
    result: Any
    leaves: bool

    def launch(self) -> Any:
        self.replay()
        return self.result


class Segments:
    """The captured segments of one capture key, through the three lives of its chains.

    The first chain runs as it is, and so warms up what is compiled, allocated and tried out at a first call; a segment
    that it repeats at once is captured there already, where nothing before it left anything that will be in the pool.
    The second captures each other segment where it meets it, the later ones launch them. All memory that segments take
    is one pool's: what one of them let go of, the next reuse. That is right only in the order in which they were
    captured, with one chain at a time: while a chain is not finished, those that begin meanwhile run as they are.

    Attributes:
        passing: whether its key is one of many, which may not come again.
        refusal: why nothing is captured any more, in words; None where it is.
    """

    def __init__(self, recorder: Recorder, passing: bool = False) -> None:
        self.recorder, self.passing = recorder, passing
        self.refusal: str | None = None
        self._sequence: list[_Segment] = []
        self._kept: dict[Hashable, Any] = {}
        self._mode = "warm"
        self._unfinished = 0
        self._open: weakref.ref[Run] | None = None

    @property
    def captured(self) -> int:
        """How many segments are captured."""
        return len({id(segment) for segment in self._sequence})

    @property
    def bytes(self) -> int:
        """What the captured segments' pool holds."""
        return self.recorder.bytes if self._sequence else 0

    def begin(self) -> Run:
        """The way of one more chain through the segments."""
        before = self._open and self._open()
        if before is not None:
            return Run(None, "another chain through the same graphs waits for its backward pass")
        if self._open is not None:
            self._give_up()
        if self.refusal is not None:
            return Run(None, self.refusal)
        run = Run(self, None)
        self._open = weakref.ref(run)
        return run

    def _give_up(self) -> None:
        """For the end of a chain that did not finish."""
        self._open = None
        if self._mode == "capture":
            # The tensors are gone that its segments left for those that were to come.
            self._sequence.clear()
            self._unfinished += 1
            if self._unfinished == 2:
                self.refuse("two chains were given up while they were captured, before their backward pass")

    def refuse(self, reason: str) -> None:
        """Captures nothing any more, and lets go of what was captured and kept; a chain on its way keeps what it reads."""
        self.refusal = reason
        self._sequence.clear()
        self._kept = {}


class Run:
    """One chain's way through its segments.

    Attributes:
        reason: why nothing of it is or was captured, in words; None where it is.
    """

    def __init__(self, segments: Segments | None, reason: str | None) -> None:
        self.reason: str | None = reason
        # None in a plain run, which never asks for them.
        self._segments = cast(Segments, segments)
        self._mode = "plain" if segments is None else segments._mode
        self._kept: dict[Hashable, Any] = {} if segments is None else segments._kept
        self._prepared = False
        # Of the segments met: the last one's name, all names, and of those that ran as they are who left something.
        self._last: Hashable = None
        self._met: set[Hashable] = set()
        self._left: set[Hashable] = set()
        # The place of the last captured segment in the sequence.
        self._at = -1

    @property
    def plain(self) -> bool:
        """Whether the chain runs as if there were no graphs."""
        return self._mode == "plain"

    @property
    def retain(self) -> bool:
        """Whether a backward through an earlier segment's graph must retain it: a failed capture runs it once more."""
        return self._mode == "capture"

    def keep(self, name: Hashable, make: Callable[[], T]) -> T:
        """What `make` makes at the key's first chain and its later chains find again: the segments' static tensors.

        It is made outside of the pool. A plain chain makes its own.
        """
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]

    def run(self, name: Hashable, work: Callable[[], T]) -> T:
        """What `work` returns, whether it ran or was launched: a tree of tensors, to be read until the segment's next run.

        Args:
            name: of the segment. In every chain of a key segments follow each other in the same order, and one that is
                met again reads the same tensors again.
            work: reads and writes `keep`'s tensors, parameters, and what earlier segments of the chain returned; makes
                the leaves of its graphs itself (`detach().requires_grad_()`), which belong to the stream where they
                are first used; leaves nothing on Python's side but what it returns, draws no random numbers, and waits
                for no number. It is not called where the segment is launched. Tensors with a graph, such as the output
                of a stored step, are returned without it then: only segments may use it.

        Raises:
            RuntimeError: where the order is not that of the captured chain, or the chain is finished.
        """
        if self._mode == "finished":
            raise RuntimeError(
                f"the segment {name!r} was asked for after its chain had finished, and the memory that it would read "
                "belongs to the next one. For a second backward pass through a chain run it without graphs."
            )
        repeated = name in self._met and self._last == name
        self._met.add(name)
        self._last = name
        if self._mode == "plain":
            return work()
        if self._mode == "eager":
            return self._as_it_is(work)
        if self._mode == "warm" and not (repeated and self._left <= {name}):
            result = self._as_it_is(work)
            if _tensors(result):
                self._left.add(name)
            return result
        self._left.discard(name)
        return self._next(name, work)

    def finish(self) -> None:
        """Gives the segments to the next chain: nothing that this one's returned is read any more."""
        segments, mode = self._segments, self._mode
        if mode in ("plain", "finished"):
            return
        self._mode = "finished"
        segments._open = None
        if mode == "capture" or (mode == "warm" and self._met <= {segment.name for segment in segments._sequence}):
            segments._mode = "replay"
        elif mode == "warm":
            segments._mode = "capture"

    def give_up(self) -> None:
        """Gives the segments to the next chain after an error, whose traceback may keep this one alive."""
        if self._mode not in ("plain", "finished"):
            self._mode = "finished"
            self._segments._give_up()

    def _next(self, name: Hashable, work: Callable[[], T]) -> T:
        sequence = self._segments._sequence
        for at in (self._at, self._at + 1):
            if 0 <= at < len(sequence) and sequence[at].name == name:
                self._at = at
                return sequence[at].launch()
        if self._mode == "replay":
            expected = [s.name for s in sequence[max(self._at, 0) : self._at + 2]]
            self._segments._sequence.clear()
            self._segments._mode = "capture"
            self.finish()
            raise RuntimeError(
                f"the segment {name!r} was asked for where the captured chain has {' or '.join(map(repr, expected))}: "
                "launched there, it would read memory that others have written to. What was captured is dropped; run "
                "the chain again, or without graphs."
            )
        if (again := self._again(name)) is None:
            return self._capture(name, work)
        self._insert(again)
        return again.launch()

    def _insert(self, segment: _Segment) -> None:
        """Puts a segment after the last one."""
        sequence = self._segments._sequence
        self._at += 1
        if segment.leaves:
            # What was captured before it and comes after it may write over that.
            del sequence[self._at :]
        sequence.insert(self._at, segment)

    def _again(self, name: Hashable) -> _Segment | None:
        """The segment of that name, where none was captured since that left something which it would write over."""
        for segment in reversed(self._segments._sequence):
            if segment.name == name:
                return segment
            if segment.leaves:
                return None
        return None

    def _capture(self, name: Hashable, work: Callable[[], T]) -> T:
        segments = self._segments
        try:
            if not self._prepared:
                segments.recorder.prepare()
                self._prepared = True
            with _no_foreign_casts():
                replay, result = segments.recorder.capture(work)
        except Exception as error:  # noqa: BLE001  # whatever a capture raises: the work runs as it is
            # Without the traceback, which would keep alive what the failed capture allocated.
            self.reason = f"{name!r} could not be captured: {type(error).__name__}: {error}"
        else:
            detached = pytree.tree_map_only(Tensor, Tensor.detach, result)
            self._insert(_Segment(name, replay, detached, _tensors(result)))
            replay()
            return result
        segments.refuse(self.reason)
        self._mode = "eager"
        return self._as_it_is(work)

    def _as_it_is(self, work: Callable[[], T]) -> T:
        with _no_foreign_casts():
            return self._segments.recorder.warm_up(work)


class Graphs:
    """The captured segments of a sampler, by capture key.

    Args:
        make_recorder: makes one for a new key.
        size: of how many keys graphs are kept, those used last. Two: a training run alternates between its chain and
            its validation's, and each key holds a pool as large as a chain.
    """

    def __init__(self, make_recorder: Callable[[], Recorder], size: int = 2) -> None:
        self._make_recorder, self._size = make_recorder, size
        self._segments: collections.OrderedDict[Hashable, Segments] = collections.OrderedDict()
        # Hashes: a key is as long as the UNet's list of modules, and two that are taken for each other do no harm here.
        self._met: Recent[bool] = Recent(_MET)

    def begin(self, key: Hashable, reasons: Sequence[str] = (), passing: bool = False) -> Run:
        """The way of one more chain through the segments of `key`; a plain one where there are `reasons` against it.

        Args:
            passing: whether the key may not come again, as that of a gradient path drawn at random: its first chain
                is a plain one, and of all such keys the last one has graphs, beside those of `size` others.
        """
        if reasons:
            return Run(None, "; ".join(reasons))
        if key not in self._segments:
            if passing and hash(key) not in self._met:
                self._met[hash(key)] = True
                return Run(None, "its gradient path is new; one that comes again is captured")
            self._segments[key] = Segments(self._make_recorder(), passing)
        self._segments.move_to_end(key)
        # What was refused holds nothing, and is remembered so that it is not tried again, up to a number.
        holding = [k for k, segments in self._segments.items() if segments.refusal is None and not segments.passing]
        passing_by = [k for k, segments in self._segments.items() if segments.refusal is None and segments.passing]
        refused = [k for k, segments in self._segments.items() if segments.refusal is not None]
        for old in (*holding[: -self._size], *passing_by[:-1], *refused[:-16]):
            # A chain that is not finished keeps them alive until it is.
            del self._segments[old]
        return self._segments[key].begin()

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy, of a sampler that is copied or pickled, begins without graphs.
        return Graphs, (self._make_recorder, self._size)

    @property
    def bytes(self) -> int:
        """What the pools of all keys hold."""
        return sum(segments.bytes for segments in self._segments.values())


def _tensors(result: Any) -> bool:
    """Whether there is a tensor in what a work returned."""
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result))


@contextlib.contextmanager
def _no_foreign_casts() -> Iterator[None]:
    """Autocast's cache emptied before and after: a segment that read a cast made outside would read it for good."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
