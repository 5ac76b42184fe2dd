"""An algorithm as the trainer sees it, and what it tells of each optimizer step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from rftcore.rewards import Reward
from rftcore.sampling import CheckpointedSampler
from rftcore.training.engine import Engine, Scores


@dataclass(frozen=True)
class Update:
    """What one process did for one optimizer step, before the optimizer's own part.

    Attributes:
        means: metric name -> the mean of as many values on every process; the mean over processes is logged.
        largest: metric name -> a value; the largest of all processes is logged.
        scores: of the samples that were drawn for it, detached and on the CPU; empty where it trains on earlier ones.
        reward_queries: evaluations of one image by the reward.
        unet_evaluations: as `Counters` counts them.
        skipped: why there is no gradient, and so no step of the optimizer; the same on every process.
    """

    means: Mapping[str, float]
    largest: Mapping[str, float]
    scores: Sequence[Scores] = ()
    reward_queries: int = 0
    unet_evaluations: int = 0
    skipped: str | None = None


@dataclass
class Tally:
    """Collects what makes an `Update`."""

    reward_queries: int = 0
    unet_evaluations: int = 0
    skipped: str | None = None
    _values: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    _largest: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    _scores: list[Scores] = field(default_factory=list)

    def note(self, name: str, values: Tensor) -> None:
        """Values of a metric that is reported as a mean."""
        self._values[name].append(values.detach().flatten())

    def note_largest(self, name: str, values: Tensor) -> None:
        """Values of a metric of which the largest is reported."""
        self._largest[name].append(values.detach().max())

    def drew(self, scores: Scores) -> None:
        """New samples, and their rewards."""
        self._scores.append(scores)
        self.reward_queries += len(scores.rewards)

    @property
    def any_kept(self) -> bool:
        """Whether any of the new samples counts."""
        return any(bool(scores.kept.any()) for scores in self._scores)

    def update(self) -> Update:
        return Update(
            means={name: float(torch.cat(values).double().mean()) for name, values in self._values.items()},
            largest={name: float(torch.stack(values).max()) for name, values in self._largest.items()},
            scores=[scores.recorded() for scores in self._scores],
            reward_queries=self.reward_queries,
            unet_evaluations=self.unet_evaluations,
            skipped=self.skipped,
        )


class Method(Protocol):
    """An algorithm. Registered in METHODS under its config's `algorithm`.

    Attributes:
        sampler: its sampler, which the evaluation uses too.
    """

    sampler: CheckpointedSampler

    def __init__(self, engine: Engine) -> None: ...

    @staticmethod
    def check_reward(reward: Reward) -> None:
        """Raises RewardSpecError for a reward that the algorithm cannot use; asked before the model is loaded."""

    def epoch(self, epoch: int) -> Iterator[Update]:
        """Epoch `epoch` (from 1): `config.train.updates_per_epoch` updates.

        Each is yielded when the whole batch's gradient is in the trained parameters; the trainer then steps the
        optimizer and clears it.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides weights and optimizer: tensors and plain values, equal on all processes."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
