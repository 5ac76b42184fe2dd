"""Which prompt and which noise each sample gets, and who draws it: functions of the seed and the sample's place.

So a resumed run, a run on other numbers of processes and one with other accumulation see the same samples. An epoch's
samples are numbered; sample i belongs to update i // batch_size at first, and to lane i % batch_size always. A process
holds a contiguous share of the lanes, and later updates of the same samples shuffle within lanes: whatever the number
of processes, the same samples meet in an update.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplePlan:
    """The samples of every epoch.

    Sample i of epoch e (from 1) draws prompt number (e - 1) * samples_per_epoch + i of an endless sequence that runs
    through the prompts in a new order each time, and its noise from a generator of its own.
    """

    prompts: Sequence[str]
    samples_per_epoch: int
    seed: int

    def prompt(self, epoch: int, index: int) -> str:
        """The prompt of a sample."""
        round_, place = divmod((epoch - 1) * self.samples_per_epoch + index, len(self.prompts))
        order = torch.randperm(len(self.prompts), generator=generator(self.seed, "prompt order", round_))
        return self.prompts[int(order[place])]

    def noise(self, epoch: int, index: int) -> torch.Generator:
        """The generator of a sample's noise."""
        return generator(self.seed, "noise", epoch, index)


@dataclass(frozen=True)
class Share:
    """What one process holds of an optimizer step's batch: a contiguous part of its places, cut into accumulation parts."""

    batch_size: int
    process: int
    processes: int
    accumulation: int

    @property
    def size(self) -> int:
        """Places that this process holds."""
        return self.batch_size // self.processes

    @property
    def places(self) -> range:
        """Those places of the batch."""
        return range(self.process * self.size, (self.process + 1) * self.size)

    def parts(self) -> list[range]:
        """The same, in accumulation parts."""
        step = self.size // self.accumulation
        return [self.places[start : start + step] for start in range(0, self.size, step)]


def shuffled_in_lanes(updates: int, lanes: int, *key: int | str) -> Tensor:
    """(updates, lanes): which update's sample of its lane each update takes; each lane is shuffled by itself."""
    source = generator(*key)
    return torch.stack([torch.randperm(updates, generator=source) for _ in range(lanes)], dim=1)


def endless(count: int, start: int, length: int, *key: int | str) -> Tensor:
    """(length,) numbers from place `start` of an endless sequence of shuffles of 0 to count - 1."""
    rounds = range(start // count, (start + length - 1) // count + 1)
    numbers = torch.cat([torch.randperm(count, generator=generator(*key, round_)) for round_ in rounds])
    first = start - rounds[0] * count
    return numbers[first : first + length]


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by the key alone, the same on every machine and device."""
    return torch.Generator().manual_seed(derived_seed(*key))


def derived_seed(*key: int | str) -> int:
    """63 bits of the key's SHA-256."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
