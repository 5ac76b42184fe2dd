"""Which prompt and which noise each sample gets: a function of the seed and the sample's place, without state.

So a resumed run, a run on other numbers of processes and one with other accumulation see the same samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Part:
    """What one process samples in one accumulation part of an optimizer step: b prompts and b noise generators."""

    prompts: list[str]
    generators: list[torch.Generator]
    is_last: bool


@dataclass(frozen=True)
class SamplePlan:
    """The samples of every optimizer step.

    Sample i of step s (from 1) draws prompt number (s - 1) * batch_size + i of an endless sequence that runs through
    the prompts in a new order each time, and its noise from a generator of its own.
    """

    prompts: Sequence[str]
    batch_size: int
    seed: int

    def parts(self, step: int, process: int, processes: int, accumulation: int) -> list[Part]:
        """One process's share of a step, in its accumulation parts. The batch must divide."""
        share = self.batch_size // processes
        size = share // accumulation
        starts = range(process * share, (process + 1) * share, size)
        return [self._part(step, range(start, start + size), start == starts[-1]) for start in starts]

    def prompt(self, step: int, index: int) -> str:
        """The prompt of sample `index` of the whole step's batch."""
        round_, place = divmod((step - 1) * self.batch_size + index, len(self.prompts))
        order = torch.randperm(len(self.prompts), generator=generator(self.seed, "prompt order", round_))
        return self.prompts[int(order[place])]

    def _part(self, step: int, indices: range, is_last: bool) -> Part:
        return Part(
            prompts=[self.prompt(step, index) for index in indices],
            generators=[generator(self.seed, "noise", step, index) for index in indices],
            is_last=is_last,
        )


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by the key alone, the same on every machine and device."""
    return torch.Generator().manual_seed(derived_seed(*key))


def derived_seed(*key: int | str) -> int:
    """63 bits of the key's SHA-256."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
