"""Single steps of sampling chains, of any samples: what a policy gradient is trained on, and a replay buffer holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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
)

_TENSORS = ("x", "next_x", "steps", "log_probs")


@dataclasses.dataclass(frozen=True)
class Transitions:
    """N steps that were taken, any steps of any samples.

    Attributes:
        x, next_x: (N, C, h, w) the states before and after, in the trajectory's dtype; no gradient.
        steps: (N,) int64 on the CPU, each step's place in its chain.
        log_probs: (N,) nats per element, as they were sampled; no gradient.
        conditioning: the UNet's other inputs, (N, ...) each.
        settings: of the trajectory that they were taken from.
    """

    x: Tensor
    next_x: Tensor
    steps: Tensor
    log_probs: Tensor
    conditioning: Conditioning
    settings: dict[str, Any]

    def __len__(self) -> int:
        """N."""
        return self.x.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> Transitions:
        """Some of them, by anything that indexes a dimension; an int keeps the dimension."""
        index = row_index(index, len(self), f"{len(self)} transitions")

        def take(tensor: Tensor) -> Tensor:
            return tensor[index if isinstance(index, slice) else sent(index, tensor.device)]

        taken: dict[str, Any] = {name: take(getattr(self, name)) for name in _TENSORS}
        return dataclasses.replace(self, **taken, conditioning=self.conditioning.map(take))

    @staticmethod
    def cat(parts: Sequence[Transitions]) -> Transitions:
        """Joins transitions of one sampler.

        Raises:
            ValueError: when there are none, or their settings differ.
        """
        parts = list(parts)
        if not parts:
            raise ValueError("parts is empty; Transitions.cat joins at least one.")
        check_same_settings("transitions", [part.settings for part in parts])
        joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in _TENSORS}
        return dataclasses.replace(parts[0], **joined, conditioning=Conditioning.cat([p.conditioning for p in parts]))

    def to(self, *args: Any, **kwargs: Any) -> Transitions:
        """Moves every tensor but `steps` to a device, as `Tensor.to(device, ...)`.

        Raises:
            ValueError: when asked for another dtype.
        """
        device, non_blocking = destination("a transition", *args, **kwargs)
        move = lambda tensor: tensor.to(device, non_blocking=non_blocking)  # noqa: E731
        return dataclasses.replace(
            self,
            x=move(self.x),
            next_x=move(self.next_x),
            log_probs=move(self.log_probs),
            conditioning=self.conditioning.map(move),
        )

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only: fit for `torch.save` and `torch.load(weights_only=True)`."""
        tensors = {name: stored(getattr(self, name)) for name in _TENSORS}
        return {**tensors, **self.conditioning.state_dict(), "settings": dict(self.settings)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Transitions:
        """The inverse of `state_dict`.

        Raises:
            ValueError: for a dictionary that is not one of its kind.
        """
        try:
            rest = dict(state)
            conditioning = Conditioning(rest.pop("positive"), rest.pop("negative"))
            found = cls(conditioning=conditioning, **rest)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"state is not a Transitions.state_dict(): {error}.") from error
        # What is no tensor is refused below.
        rows = len(found.steps) if isinstance(found.steps, Tensor) and found.steps.ndim else -1
        sizes = {"x": (rows, -1), "next_x": (rows, -1), "steps": (rows,), "log_probs": (rows,)}
        check_stored("Transitions", rest, sizes, (conditioning.positive, conditioning.negative), found.settings)
        return found

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Raises ValueError, naming the differences, unless they are of a sampler with `settings`."""
        check_made_with("transitions were", self.settings, settings)
