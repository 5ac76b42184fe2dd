"""The memory plan of a sampling chain: which differentiated steps are stored, at which level, and which are replayed.

A *stored* step keeps its graph from the sampling forward; a *replayed* one keeps only its state and is evaluated again
in the backward. Both can make some of their values again.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from rftcore.blocks.budget import text_of
from rftcore.sampling.simulation import Level

_COUNTS = ("batch", "replay_batch", "differentiated", "peak_bytes", "forward_flops", "plain_flops", "reserve")
# Steps of these modes run the UNet with a graph.
DIFFERENTIATED = ("full", "detach_x", "detach_input")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a chain is differentiated.

    A level is what the layers of the UNet make again: of a layer's name, the names of its values; or one of the levels
    of `rftcore.accelerate`; or None, what the UNet was accelerated with.

    Attributes:
        batch: B, the images of the chain.
        stored: for each step taken, the position in `levels` of the level that it is stored at; None where it is
            replayed or has no gradient of the UNet. The stored steps are the last ones of those that have.
        levels: of the stored steps.
        replay_level: of the replayed steps.
        replay_batch: how many images are replayed and backpropagated at a time.
        differentiated: how many steps have a gradient of the UNet.
        budget: bytes that the chain may take beyond what is there before it, None for a plan that was not predicted.
        peak_bytes: predicted, of the chain and of what is reserved for decoding, beyond what is there before it; 0 for
            a plan that was not predicted.
        kept_bytes: of a step at each of `levels`.
        level_extra: of a step at each of `levels`, the FLOPs that run twice, in percent of its forward.
        replay_extra: the same of a replayed step, its second forward among them.
        forward_flops: of one step.
        plain_flops: of the chain, forward and backward, without what runs twice.
        reasons: why nothing is stored, where nothing could be predicted.
        reserve: bytes of `budget` that are left to decoding and the reward.
    """

    batch: int
    stored: tuple[int | None, ...]
    levels: tuple[Level, ...]
    replay_level: Level
    replay_batch: int
    differentiated: int
    budget: int | None = None
    peak_bytes: int = 0
    kept_bytes: tuple[int, ...] = ()
    level_extra: tuple[float, ...] = ()
    replay_extra: float = 100.0
    forward_flops: int = 0
    plain_flops: int = 0
    reasons: tuple[str, ...] = ()
    reserve: int = 0

    def __post_init__(self) -> None:
        unknown = [level for level in self.stored if level is not None and not 0 <= level < len(self.levels)]
        if unknown:
            raise ValueError(f"stored names level {unknown[0]}, and there are {len(self.levels)}: 0 is the first.")
        if not 1 <= self.replay_batch <= max(1, self.batch):
            raise ValueError(f"replay_batch={self.replay_batch} must lie in [1, batch={self.batch}].")

    @classmethod
    def replayed(
        cls,
        modes: Sequence[str],
        batch: int,
        reasons: Sequence[str] = (),
        budget: int | None = None,
        reserve: int = 0,
    ) -> Plan:
        """Every differentiated step replayed, the whole batch at once, as the UNet stands; nothing is predicted."""
        count = sum(mode in DIFFERENTIATED for mode in modes)
        return cls(batch, (None,) * len(modes), (), None, batch, count, budget, reasons=tuple(reasons), reserve=reserve)

    @property
    def replays(self) -> int:
        """How many steps are replayed."""
        return self.differentiated - sum(level is not None for level in self.stored)

    @property
    def stored_bytes(self) -> int:
        """What the stored steps keep together."""
        return sum(self.kept_bytes[level] for level in self.stored if level is not None and self.kept_bytes)

    @property
    def extra_percent(self) -> float:
        """FLOPs that run twice, in percent of the differentiated steps' forwards."""
        stored = sum(self.level_extra[level] for level in self.stored if level is not None and self.level_extra)
        return (stored + self.replays * self.replay_extra) / max(1, self.differentiated)

    @property
    def flops(self) -> int:
        """Of the chain, forward and backward; 0 for a plan that was not predicted."""
        return round(self.plain_flops + self.extra_percent / 100 * self.differentiated * self.forward_flops)

    @functools.cached_property
    def work(self) -> Hashable:
        """What a chain does by it: equal for plans that differ in what was predicted alone."""
        levels = (self.replay_level, *self.levels)
        return self.stored, self.replay_batch, tuple(_hashable(level) for level in levels)

    def smaller(self) -> Plan | None:
        """The next plan to try where this one does not fit, None for the smallest.

        Half of the stored steps are replayed, then replays are halved, then everything is made again that can be. Its
        peak is not predicted.
        """
        steps = [step for step, level in enumerate(self.stored) if level is not None]
        if steps:
            # The earlier ones: the backward comes to replays last.
            kept = steps[math.ceil(len(steps) / 2) :]
            stored = tuple(level if step in kept else None for step, level in enumerate(self.stored))
            return dataclasses.replace(self, stored=stored, peak_bytes=0)
        if self.replays and self.replay_batch > 1:
            return dataclasses.replace(self, replay_batch=math.ceil(self.replay_batch / 2), peak_bytes=0)
        if self.replays and self.replay_level == {}:
            return dataclasses.replace(self, replay_level="block", peak_bytes=0)
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`.

        Raises:
            ValueError: for values of another kind.
        """
        try:
            values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
            levels = tuple(_level(level) for level in values.pop("levels"))
            plan = cls(levels=levels, replay_level=_level(values.pop("replay_level")), **values)
            plan._check_kinds()
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"values is not a Plan.to_dict(): {error}.") from error
        return plan

    def _check_kinds(self) -> None:
        """Raises TypeError for what no `to_dict` gives."""
        for name in ("stored", "kept_bytes", "level_extra", "reasons"):
            if not isinstance(getattr(self, name), tuple):
                raise TypeError(f"{name} is a {type(getattr(self, name)).__name__}, no list")
        counts = {name: getattr(self, name) for name in _COUNTS} | {
            f"stored {n}": at for n, at in enumerate(self.stored)
        }
        counts |= {f"kept_bytes {n}": kept for n, kept in enumerate(self.kept_bytes)} | {"budget": self.budget}
        optional = {"budget", *(name for name in counts if name.startswith("stored"))}
        for name, count in counts.items():
            if not ((type(count) is int and 0 <= count < 2**63) or (count is None and name in optional)):
                raise TypeError(f"{name} is {reprlib.repr(count)}, no count")
        for extra in (self.replay_extra, *self.level_extra):
            if type(extra) not in (int, float) or not math.isfinite(extra):
                raise TypeError(f"extra FLOPs are {reprlib.repr(extra)}, no number")
        if not all(isinstance(reason, str) for reason in self.reasons):
            raise TypeError("reasons are no texts")
        if {len(self.kept_bytes), len(self.level_extra)} - {0, len(self.levels)}:
            raise TypeError(f"of {len(self.levels)} levels it says what {len(self.kept_bytes)} keep")
        if self.differentiated < sum(level is not None for level in self.stored) or self.differentiated > len(
            self.stored
        ):
            raise TypeError(f"{self.differentiated} of {len(self.stored)} steps are differentiated")

    def __str__(self) -> str:
        parts = []
        for level, kept in enumerate(self.kept_bytes):
            if count := self.stored.count(level):
                parts.append(f"{count} stored at {text_of(kept)} each")
        if self.replays:
            pieces = "" if self.replay_batch == self.batch else f" {self.replay_batch} images at a time"
            parts.append(f"{self.replays} replayed{pieces}")
        text = f"{self.differentiated} of {len(self.stored)} steps differentiated, {self.batch} images"
        text += f": {', '.join(parts)}" if parts else ""
        if self.peak_bytes:
            within = "" if self.budget is None else f" within {text_of(self.budget)}"
            text += f"; predicted peak {text_of(self.peak_bytes)}{within}"
        if self.plain_flops:
            text += f"; {self.extra_percent:.1f}% of the differentiated forwards' FLOPs run twice"
        return text + "".join(f"; {reason}" for reason in self.reasons)


def _hashable(level: Level) -> Hashable:
    return tuple(sorted(level.items())) if isinstance(level, Mapping) else level


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple) else value


def _level(level: Any) -> Level:
    if level is None or isinstance(level, str):
        return level
    if not all(isinstance(value, str) for values in level.values() for value in values):
        raise TypeError("a level names no values")
    return {name: tuple(values) for name, values in level.items()}
