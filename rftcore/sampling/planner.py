"""How a memory plan is made: the fewest FLOPs under a budget.

Bytes that are spent on a step save FLOPs at a price that falls along the convex hull of what can be had; all steps have
the same hull, so they move along it together.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from rftcore.blocks.budget import text_of
from rftcore.sampling.denoiser import Denoiser
from rftcore.sampling.plan import DIFFERENTIATED, Plan
from rftcore.sampling.simulation import Level, Simulation, Step, Unpredictable

# Of a forward's FLOPs, what is made again where little memory at a time is to be taken for it: up to there SD1.5's and
# SDXL's layers are made again one by one, beyond it several together.
_CHEAP = 0.25


def make_plan(
    denoiser: Denoiser,
    conditioning: Mapping[str, Tensor],
    *,
    batch: int,
    height: int,
    width: int,
    guided: bool,
    modes: Sequence[str],
    budget: int,
    reserve: int = 0,
    simulate: Callable[[], Simulation] | None = None,
) -> Plan:
    """The plan of the fewest FLOPs under a budget.

    Args:
        conditioning: the UNet's other inputs by name, as `Conditioning.joined` gives them; only the shape of a row and
            the dtype count.
        batch: B, the images of the chain.
        height, width: of the latents.
        guided: whether both branches of guidance are run.
        modes: of every step taken, `GradientPath.effective_modes`.
        budget: bytes that the chain may take beyond what is there before it.
        reserve: bytes of `budget` for what comes between the chain and its backward: decoding and the reward.
        simulate: gives the simulation of a chain like this one, which remembers what it counted; None makes one.

    Raises:
        ValueError: for a budget below the least that is needed.
    """
    if not any(mode in DIFFERENTIATED for mode in modes):
        return Plan.replayed(modes, batch, budget=budget, reserve=reserve)
    try:
        simulation = simulate() if simulate else Simulation(denoiser, conditioning, height, width, guided=guided)
        return Planner(simulation, batch, modes).plan(budget, reserve)
    except Unpredictable as reason:
        return Plan.replayed(modes, batch, [str(reason)], budget, reserve)


class _Point(NamedTuple):
    """One way to differentiate a step.

    Attributes:
        kept: bytes between forward and backward.
        extra: FLOPs that run again.
        again: how many of the priced items are made again; None: replayed.
    """

    kept: int
    extra: float
    again: int | None


class _Replay(NamedTuple):
    """How steps are replayed: so many images at a time, so many items made again."""

    images: int
    again: int
    peak: int
    extra: float


class Planner:
    """Plans of one chain for any budget.

    Args:
        simulation: of the UNet.
        batch, modes: as in `make_plan`.

    Attributes:
        steps: that have a gradient of the UNet.
        fixed: bytes of states, outputs and of what is made once.
        constants: what is made once.

    Raises:
        Unpredictable: as the simulation does.
    """

    def __init__(self, simulation: Simulation, batch: int, modes: Sequence[str]) -> None:
        self.simulation, self.batch, self.modes = simulation, batch, tuple(modes)
        self.steps = [step for step, mode in enumerate(modes) if mode in DIFFERENTIATED]
        self._items = sorted(simulation.priced(batch), key=lambda pair: pair[1].price)
        self._freed = [0, *itertools.accumulate(item.bytes for _, item in self._items)]
        self._extra = [0.0, *itertools.accumulate(item.price * item.bytes for _, item in self._items)]
        # States and their stack, the noise and the guided output of a step, and the outputs of those with a gradient.
        outputs = sum(mode != "none" for mode in modes)
        self.fixed = (2 * len(modes) + 6) * simulation.latent_bytes(batch) + outputs * simulation.output_bytes(batch)
        self.constants = simulation.constants(batch, len(modes))
        self.fixed += self.constants.kept
        # Of the sums of gradients.
        self._gradients = simulation.trained_bytes + self.constants.sums
        self._simulated: dict[int, Step] = {}
        # Of a step of one image, by how many items it makes again.
        self._peaks: dict[int, int] = {}

    def level(self, count: int) -> Level:
        """What the layers make again where the cheapest `count` items are."""
        if not self.simulation.accelerated:
            return None
        names: dict[str, list[str]] = {}
        for layer, item in self._items[:count]:
            names.setdefault(layer, []).extend(item.names)
        return {layer: tuple(values) for layer, values in names.items()}

    def step(self, count: int) -> Step:
        """A step of the whole batch that makes the cheapest `count` items again."""
        if count not in self._simulated:
            self._simulated[count] = self.simulation.step(self.batch, self.level(count))
        return self._simulated[count]

    def kept(self, count: int) -> int:
        """Bytes that such a step keeps."""
        return self.step(0).kept - self._freed[count]

    @property
    def most(self) -> int:
        """How many items there are to be made again."""
        return len(self._items)

    def plan(self, budget: int, reserve: int = 0) -> Plan:
        """The plan of the fewest FLOPs.

        Args:
            budget, reserve: as in `make_plan`.

        Raises:
            ValueError: for a budget below the least that is needed.
        """
        least = self._sampling(reserve)
        if max(least.values()) > budget:
            raise ValueError(self._too_small(budget, least))
        if not self.steps:
            flops = self.simulation.forward(self.batch).flops
            plain = Plan.replayed(self.modes, self.batch, budget=budget, reserve=reserve)
            return dataclasses.replace(
                plain, peak_bytes=max(least.values()), forward_flops=flops, plain_flops=flops * len(self.modes)
            )
        replay = self._replay(budget, reserve)
        # Mostly everything fits, and then one level has to be counted, not those at the other end.
        free = bisect.bisect_right(self._extra, 0.0) - 1
        self.step(free)
        plan = self._assembled([free] * len(self.steps), replay, budget, reserve)
        if plan.peak_bytes <= budget:
            return plan
        plan = self._assembled([None] * len(self.steps), replay, budget, reserve)
        for most in self._limits(budget, reserve):
            plan = min(plan, self._stored(most, replay, budget, reserve, plan), key=lambda plan: plan.extra_percent)
        return plan

    def least(self, reserve: int = 0) -> dict[str, int]:
        """Bytes that are enough for each part of the chain; the largest must fit, and is within 5% of its least."""
        least = self._sampling(reserve)
        if self.steps:
            others = self.fixed + self._gradients + self._sliced(1)
            enough = max(least.values()) - others
            self._one_image(enough)
            smallest = min(self._peaks.values())
            while smallest > enough and (less := self._one_image(int(0.95 * smallest))[1]) is not None:
                smallest = less
            least["a replay of one image"] = others + smallest
        return least

    def longest(self, budget: int, reserve: int = 0) -> int:
        """How many steps could be stored, each at the least that it can keep."""
        most = self.step(self.most)
        transient = max(reserve, most.peak - most.kept + self._gradients)
        return max(0, (budget - self.fixed - transient) // most.kept)

    def _sampling(self, reserve: int) -> dict[str, int]:
        least = {
            "a sampling step": self.fixed + self.simulation.forward(self.batch).peak,
            "decoding and the reward": self.fixed + reserve,
        }
        if self.constants.kept:
            least["what is made once of text and times"] = self.fixed + self._gradients + self.constants.peak
        return least

    def _replay(self, budget: int, reserve: int) -> _Replay:
        """The replay of the fewest FLOPs, in the fewest pieces. Raises: ValueError where none fits."""
        room = budget - self.fixed - self._gradients
        whole = self.step(0)
        if whole.peak <= room:
            return _Replay(self.batch, 0, whole.peak, 0.0)
        one = self._peak_of_one(0) + self._sliced(1)
        if one <= room:
            more = (whole.peak - one) / (self.batch - 1)
            for images in range(min(self.batch - 1, 1 + int((room - one) / more)), 0, -1):
                # As many in each piece as in the others, as far as that goes.
                even = math.ceil(self.batch / math.ceil(self.batch / images))
                peak = self.simulation.step(even, self.level(0)).peak + self._sliced(even)
                if peak <= room:
                    return _Replay(even, 0, peak, 0.0)
        # One image at a time, and what is made again besides.
        count, least = self._one_image(room - self._sliced(1))
        if least is None:
            raise ValueError(self._too_small(budget, self.least(reserve)))
        return _Replay(1, count, least + self._sliced(1), self._extra[count])

    def _sliced(self, images: int) -> int:
        """Bytes of these images' rows of what is made once, and of the gradients of all of its rows."""
        whole = images == self.batch
        return 0 if whole else self.constants.kept * images // self.batch + self.constants.wanted

    def _one_image(self, room: int) -> tuple[int, int | None]:
        """The fewest items that must be made again for a replay of one image to fit, and its peak, None: it cannot."""
        while True:
            count = self._fewest(room)
            if (peak := self._peak_of_one(count)) <= room:
                return count, peak
            if count == self.most:
                return count, None

    def _fewest(self, room: int) -> int:
        """Fewer items cannot be enough: transients do not fall, so that none frees less than a peak is too high by."""
        count = 0
        for known, peak in sorted(self._peaks.items()):
            if known > count:
                break
            if peak > room:
                freed = self._freed[known] + (peak - room) * self.batch
                count = max(count, bisect.bisect_left(self._freed, freed, known + 1))
        return min(count, self.most)

    def _peak_of_one(self, count: int) -> int:
        if count not in self._peaks:
            self._peaks[count] = self.simulation.step(1, self.level(count)).peak
        return self._peaks[count]

    def _limits(self, budget: int, reserve: int) -> list[int]:
        """How many items stored steps may make again at most: where much at a time is made again, room is lost."""
        most, none = (self._backward_transient(count) for count in (self.most, 0))
        if max(most, reserve) - max(none, reserve) < budget // 50:
            return [self.most]
        cheap = bisect.bisect_right(self._extra, _CHEAP * self.step(0).forward_flops) - 1
        return [self.most, cheap]

    def _stored(self, most: int, replay: _Replay, budget: int, reserve: int, plan: Plan) -> Plan:
        """The best plan found whose stored steps make at most `most` items again; `plan` where there is no better."""
        room = budget - self.fixed - max(reserve, self._backward_transient(most))
        for _ in range(6):
            if room < self.kept(most):
                break
            tried = self._assembled(self._spread(room, replay, most), replay, budget, reserve)
            slack = budget - tried.peak_bytes
            if slack >= 0 and tried.extra_percent <= plan.extra_percent:
                plan = tried
                if slack < budget // 500:
                    break
            # Making fewer things again takes less at a time, which leaves room to keep more.
            room = room + slack if slack >= 0 else tried.stored_bytes + slack
        return plan

    def _spread(self, room: int, replay: _Replay, most: int) -> list[int | None]:
        """For each differentiated step how many items it makes again, or None: replayed; they keep `room` together."""
        whole = _Point(0, self.step(0).forward_flops + replay.extra, None)
        stored = [_Point(self.kept(count), self._extra[count], count) for count in range(most, -1, -1)]
        hull = _hull([whole, *stored])
        steps, left = len(self.steps), room
        points = [hull[0]] * steps
        for here, there in itertools.pairwise(hull):
            moved = min(steps, int(left // (there.kept - here.kept)))
            points = [here] * (steps - moved) + [there] * moved
            left -= moved * (there.kept - here.kept)
            if moved < steps:
                # What is left is one step's more.
                possible = [p for p in stored if p.kept <= here.kept + left and p.extra < here.extra]
                last = min(possible, key=lambda p: p.extra, default=here)
                points[steps - moved - 1] = last
                break
        # The backward reaches the replayed ones last, when the memory of the others is free, and before them those
        # that take more for what they make again.
        return [point.again for point in sorted(points, key=lambda p: p.kept)]

    def _assembled(self, counts: Sequence[int | None], replay: _Replay, budget: int, reserve: int) -> Plan:
        """The plan that stores the steps so, and its predicted peak."""
        used = sorted({count for count in counts if count is not None}, reverse=True)
        stored: list[int | None] = [None] * len(self.modes)
        for step, count in zip(self.steps, counts, strict=True):
            stored[step] = None if count is None else used.index(count)
        whole = self.step(0)
        sampling = self.simulation.forward(self.batch).flops * len(self.modes)
        return Plan(
            batch=self.batch,
            stored=tuple(stored),
            levels=tuple(self.level(count) for count in used),
            replay_level=self.level(replay.again),
            replay_batch=replay.images,
            differentiated=len(self.steps),
            budget=budget,
            peak_bytes=self._peak(counts, replay if None in counts else None, reserve, budget // 100),
            kept_bytes=tuple(self.kept(count) for count in used),
            level_extra=tuple(100 * self._extra[count] / whole.forward_flops for count in used),
            replay_extra=100 + 100 * replay.extra / whole.forward_flops,
            forward_flops=whole.forward_flops,
            plain_flops=sampling + whole.backward_flops * len(self.steps),
            reserve=reserve,
        )

    def _peak(self, counts: Sequence[int | None], replay: _Replay | None, reserve: int, tolerance: int) -> int:
        """The largest sum of bytes at any time in the chain, or as little more as is tolerated."""
        while True:
            count, peak = max(self._timeline(counts, replay, reserve), key=lambda event: event[1])
            if count is None or self._uncertainty(count) <= tolerance:
                return peak
            self.step(count)

    def _uncertainty(self, count: int) -> int:
        """By how much the bounds for a level's transients may be too large."""
        above, below = self.step(self._above(count)), self.step(max(c for c in self._simulated if c <= count))
        return max(above.peak - above.kept - (below.peak - below.kept), 0)

    def _timeline(
        self, counts: Sequence[int | None], replay: _Replay | None, reserve: int
    ) -> Iterator[tuple[int | None, int]]:
        """Bytes at the peaks of the chain's parts, each with the level whose transients they are a bound for."""
        sampling = self.simulation.forward(self.batch).peak
        count_of, live = dict(zip(self.steps, counts, strict=True)), self.fixed
        for step in range(len(self.modes)):
            count = count_of.get(step)
            yield (None, live + sampling) if count is None else (count, live + self._forward_transient(count))
            live += 0 if count is None else self.kept(count)
        yield None, live + reserve
        for step in reversed(self.steps):
            count = count_of[step]
            if count is not None:
                yield count, live + self._backward_transient(count)
                live -= self.kept(count)
            elif replay is not None:
                yield None, live + self._gradients + replay.peak
        yield None, max(self._sampling(0).values())

    def _forward_transient(self, count: int) -> int:
        """Bytes at the peak of a stored step's forward, a bound where that level was not simulated."""
        simulated = self.step(self._above(count))
        return self.kept(count) + simulated.forward_peak - simulated.kept

    def _backward_transient(self, count: int) -> int:
        """Bytes that a stored step's backward takes beyond what it keeps, likewise."""
        simulated = self.step(self._above(count))
        return simulated.backward_peak - simulated.kept + self._gradients

    def _above(self, count: int) -> int:
        """The next level that was simulated and makes as much again or more: transients grow with that."""
        return min((known for known in self._simulated if known >= count), default=self.most)

    def _too_small(self, budget: int, least: dict[str, int]) -> str:
        part = max(least, key=least.__getitem__)
        advice = {
            "a sampling step": "make the batch or the resolution smaller",
            "decoding and the reward": "decode fewer images at a time, or accelerate the decoder",
            "a replay of one image": "make the resolution smaller",
        }.get(part, "make the batch smaller")
        if part == "a replay of one image" and not self.simulation.accelerated:
            advice = "keep less: rftcore.accelerate(unet)"
        return (
            f"memory_budget={text_of(budget)} is too small for a chain of {self.batch} images: {part} takes "
            f"{text_of(least[part])}. Raise it, or {advice}."
        )


def _hull(points: Sequence[_Point]) -> list[_Point]:
    """The vertices of the lower convex hull, from the one that keeps least."""
    hull: list[_Point] = []
    for point in points:
        if hull and (point.kept <= hull[-1].kept or point.extra >= hull[-1].extra):
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _slope(a: _Point, b: _Point) -> float:
    return (b.extra - a.extra) / (b.kept - a.kept)
