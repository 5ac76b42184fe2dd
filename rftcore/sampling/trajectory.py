"""What a sampling chain leaves behind: enough to re-score any of its steps."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rftcore.sampling.conditioning import Conditioning

_TENSORS = ("latents", "states", "timesteps", "log_probs", "stochastic")


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A batch of chains of T steps.

    Attributes:
        latents: (B, C, h, w) the chain's end, differentiable when it was sampled with a gradient path.
        states: (T+1, B, C, h, w) every state, the noise first; fp32, or fp64 from an fp64 UNet; no gradient.
        timesteps: (T,) the model's time of each step.
        log_probs: (B, T) nats per element (the mean over C, h, w), 0 where the step is deterministic; no gradient.
        stochastic: (T,) False where sigma = 0.
        conditioning: the UNet's other inputs, (B, ...) each.
        settings: the sampler's settings that made it (`log_prob` refuses a trajectory of others), how many
            steps were taken and what the last one gave.
    """

    latents: Tensor
    states: Tensor
    timesteps: Tensor
    log_probs: Tensor
    stochastic: Tensor
    conditioning: Conditioning
    settings: dict[str, Any]

    def __len__(self) -> int:
        """The batch size B."""
        return self.latents.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Trajectory:
        """Some of the samples, by anything that indexes a dimension; an int keeps the batch dimension."""
        if hasattr(index, "__index__") and (not isinstance(index, Tensor) or index.ndim == 0):
            index = operator.index(index)
            if not -len(self) <= index < len(self):
                raise IndexError(f"index {index} is out of range for a trajectory of {len(self)} samples.")
            index = [index]
        elif not isinstance(index, (slice, Tensor)):
            index = list(index)
        return self._map(lambda tensor: tensor[index], lambda states: states[:, index])

    @staticmethod
    def cat(parts: Sequence[Trajectory]) -> Trajectory:
        """Joins batches of trajectories of one sampler.

        Raises:
            ValueError: when there are none, or their settings differ.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("parts is empty; Trajectory.cat joins at least one trajectory.")
        first = parts[0]
        for part in parts[1:]:
            if difference := _difference(first.settings, part.settings):
                raise ValueError(f"trajectories of different settings do not join: {difference}.")
        return dataclasses.replace(
            first,
            latents=torch.cat([part.latents for part in parts]),
            states=torch.cat([part.states for part in parts], dim=1),
            log_probs=torch.cat([part.log_probs for part in parts]),
            conditioning=Conditioning.cat([part.conditioning for part in parts]),
        )

    def to(self, *args, **kwargs) -> Trajectory:
        """Moves every tensor to a device, as `Tensor.to(device, ...)`; dtypes are part of what a trajectory means.

        Raises:
            ValueError: when asked for another dtype.
        """
        # The parser is Tensor.to's own, and the only one that knows all of its forms.
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None:
            raise ValueError(
                f"dtype={dtype}: a trajectory keeps its dtypes, because log-probabilities re-scored from rounded "
                "states are wrong (2.7e-3 in bf16, 27 times DDPO's clip range). Give a device only."
            )
        move = lambda tensor: tensor.to(device, non_blocking=non_blocking)  # noqa: E731
        moved = self._map(move, move)
        return dataclasses.replace(moved, timesteps=move(self.timesteps), stochastic=move(self.stochastic))

    def detach(self) -> Trajectory:
        """The same trajectory, cut from the graph that made it."""
        return self._map(Tensor.detach, Tensor.detach)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only: fit for `torch.save` and `torch.load(weights_only=True)`."""
        negative = self.conditioning.negative
        keep = lambda tensor: tensor.detach().clone()  # noqa: E731  a view would be stored with all it is a part of
        return {
            **{name: keep(getattr(self, name)) for name in _TENSORS},
            "positive": {name: keep(tensor) for name, tensor in self.conditioning.positive.items()},
            "negative": None if negative is None else {name: keep(tensor) for name, tensor in negative.items()},
            "settings": dict(self.settings),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Trajectory:
        """The inverse of `state_dict`.

        Raises:
            ValueError: for a dictionary that is not one of its kind.
        """
        rest = dict(state)
        try:
            conditioning = Conditioning(rest.pop("positive"), rest.pop("negative"))
            return cls(conditioning=conditioning, **rest)
        except (KeyError, TypeError) as error:
            raise ValueError(f"state is not a Trajectory.state_dict(): {error}.") from error

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Raises ValueError, naming the differences, unless this is a trajectory of a sampler with `settings`."""
        if difference := _difference({name: self.settings.get(name) for name in settings}, settings):
            raise ValueError(
                f"trajectory was made with other settings than this sampler's: {difference}; "
                "re-score it with the sampler that made it, or one with the same settings."
            )

    def _map(self, function: Callable[[Tensor], Tensor], of_states: Callable[[Tensor], Tensor]) -> Trajectory:
        """`function` on whatever has the batch first, `of_states` on the states."""
        return dataclasses.replace(
            self,
            latents=function(self.latents),
            states=of_states(self.states),
            log_probs=function(self.log_probs),
            conditioning=self.conditioning.map(function),
        )


def _difference(mine: dict[str, Any], theirs: dict[str, Any]) -> str:
    names = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    return ", ".join(f"{name} {mine.get(name)!r} and {theirs.get(name)!r}" for name in names)
