"""What a sampling chain leaves behind: enough to re-score any of its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rftcore.sampling.conditioning import Conditioning
from rftcore.sampling.records import (
    check_made_with,
    check_same_settings,
    check_stored,
    destination,
    row_index,
    sent,
    stored,
    whole_numbers,
)
from rftcore.sampling.transitions import Transitions

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
        index = row_index(index, len(self), f"a trajectory of {len(self)} samples")

        def on(tensor: Tensor) -> slice | Tensor:
            return index if isinstance(index, slice) else sent(index, tensor.device)

        return self._map(lambda tensor: tensor[on(tensor)], lambda states: states[:, on(states)])

    def step_numbers(self, steps: Sequence[int] | Tensor, rows: int | None = None) -> Tensor:
        """Steps (S,) of all samples, or (B, S) of each sample's own, as (B, S) int64 on the CPU; `rows` instead of B.

        Raises:
            ValueError: for what are no whole numbers, or of another shape.
            IndexError: for a step out of range.
        """
        rows = len(self) if rows is None else rows
        numbers = whole_numbers(steps, "steps", "(S,) or (B, S)", (1, 2))
        if numbers.ndim == 1:
            numbers = numbers.expand(rows, -1)
        if numbers.shape[0] != rows:
            raise ValueError(f"steps has {numbers.shape[0]} rows for {rows} samples; give (S,) or (B, S).")
        _check_range("steps", numbers, self.states.shape[0] - 1, "steps")
        return numbers

    def transitions(self, steps: Sequence[int] | Tensor, rows: Sequence[int] | Tensor | None = None) -> Transitions:
        """Some steps of some samples, as transitions of their own; copies of nothing but these.

        Args:
            steps: (S,) indices of steps, or (B, S) for steps of each sample's own; one row for each of `rows` where
                these are given. On the CPU: a device tensor syncs.
            rows: (R,) indices of the samples, None for all; on the CPU likewise.

        Returns:
            B S (or R S) transitions, all of the first sample's, then all of the second's.

        Raises:
            ValueError: for what are no whole numbers, or of another shape.
            IndexError: for a step or a sample out of range.
        """
        if rows is None:
            rows = torch.arange(len(self))
        else:
            rows = whole_numbers(rows, "rows", "(R,)", (1,))
            _check_range("rows", rows, len(self), "samples")
        numbers = self.step_numbers(steps, len(rows))
        taken = numbers.flatten()
        device = self.states.device
        rows, steps = (sent(index, device) for index in (rows.repeat_interleave(numbers.shape[1]), taken))
        return Transitions(
            x=self.states[steps, rows],
            next_x=self.states[steps + 1, rows],
            steps=taken,
            log_probs=self.log_probs[rows, steps],
            conditioning=self.conditioning.map(lambda tensor: tensor[rows]),
            settings=dict(self.settings),
        )

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
        check_same_settings("trajectories", [part.settings for part in parts])
        return dataclasses.replace(
            first,
            latents=torch.cat([part.latents for part in parts]),
            states=torch.cat([part.states for part in parts], dim=1),
            log_probs=torch.cat([part.log_probs for part in parts]),
            conditioning=Conditioning.cat([part.conditioning for part in parts]),
        )

    def to(self, *args: Any, **kwargs: Any) -> Trajectory:
        """Moves every tensor to a device, as `Tensor.to(device, ...)`; dtypes are part of what a trajectory means.

        Raises:
            ValueError: when asked for another dtype.
        """
        device, non_blocking = destination("a trajectory", *args, **kwargs)
        move = lambda tensor: tensor.to(device, non_blocking=non_blocking)  # noqa: E731
        moved = self._map(move, move)
        return dataclasses.replace(moved, timesteps=move(self.timesteps), stochastic=move(self.stochastic))

    def detach(self) -> Trajectory:
        """The same trajectory, cut from the graph that made it."""
        return self._map(Tensor.detach, Tensor.detach)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only: fit for `torch.save` and `torch.load(weights_only=True)`."""
        tensors = {name: stored(getattr(self, name)) for name in _TENSORS}
        return {**tensors, **self.conditioning.state_dict(), "settings": dict(self.settings)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Trajectory:
        """The inverse of `state_dict`.

        Raises:
            ValueError: for a dictionary that is not one of its kind.
        """
        try:
            rest = dict(state)
            conditioning = Conditioning(rest.pop("positive"), rest.pop("negative"))
            found = cls(conditioning=conditioning, **rest)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"state is not a Trajectory.state_dict(): {error}.") from error
        # What is no tensor is refused below.
        rows, steps = (
            len(part) if isinstance(part, Tensor) and part.ndim else -1 for part in (found.latents, found.timesteps)
        )
        sizes = {"latents": (rows, -1), "states": (steps + 1, rows, -1), "log_probs": (rows, steps)}
        sizes |= {"timesteps": (steps,), "stochastic": (steps,)}
        check_stored("Trajectory", rest, sizes, (conditioning.positive, conditioning.negative), found.settings)
        return found

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Raises ValueError, naming the differences, unless this is a trajectory of a sampler with `settings`."""
        check_made_with("trajectory was", self.settings, settings)

    def _map(self, function: Callable[[Tensor], Tensor], of_states: Callable[[Tensor], Tensor]) -> Trajectory:
        """`function` on whatever has the batch first, `of_states` on the states."""
        return dataclasses.replace(
            self,
            latents=function(self.latents),
            states=of_states(self.states),
            log_probs=function(self.log_probs),
            conditioning=self.conditioning.map(function),
        )


def _check_range(name: str, numbers: Tensor, count: int, what: str) -> None:
    inside = (numbers >= 0) & (numbers < count)
    # Not by the outside's number: tensors without data have none.
    if not inside.all():
        outside = int(numbers[~inside][0])
        raise IndexError(f"{name} holds {outside}; the trajectory has {what} 0 to {count - 1}.")
