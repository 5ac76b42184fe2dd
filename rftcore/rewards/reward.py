"""A reward as everything else sees it: a function of images with what it declares of itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

POINTS = "reward points"


class RewardSpecError(ValueError):
    """A reward that cannot be found, made, called, or used by the chosen algorithm."""


@dataclass(frozen=True)
class Reward:
    """A reward function with the name it is reported under, and what it declares.

    Attributes:
        differentiable: whether its gradient with respect to the images exists.
        unit: what its values are counted in.
        range: its lowest and highest value, or about that; None where there is none, or it is not known.
        downloads: hub names of what it loads by default, each with about its size.
        licence: of those.
    """

    function: Callable[..., Any]
    name: str
    differentiable: bool
    unit: str = POINTS
    range: tuple[float, float] | None = None
    downloads: tuple[str, ...] = ()
    licence: str | None = None

    @property
    def __name__(self) -> str:
        """The name that errors about the reward give it."""
        return self.name

    def __call__(self, images: Any, prompts: Sequence[str], metadata: Sequence[dict] | None = None) -> Any:
        """Rewards (B,) of images (B, 3, H, W) in [0, 1]."""
        return self.function(images, prompts, metadata)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the rewards that it is made of; none where it is one."""
        return tuple(part.name for part, _ in getattr(self.function, "parts", ()))

    def with_parts(
        self, images: Any, prompts: Sequence[str], metadata: Sequence[dict] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Rewards (B,), and by name those, each (B,), of what they are made of."""
        if self.parts:
            return cast(Any, self.function).with_parts(images, prompts, metadata)
        return self(images, prompts, metadata), {}

    def to(self, device: Any) -> Reward:
        """Moves its model, if it has one, to a device; returns itself."""
        if hasattr(self.function, "to"):
            self.function.to(device)
        return self


def check_prompts(images: Sized, prompts: Sequence[str]) -> None:
    """Raises RewardSpecError unless each image has a prompt: one prompt would be compared with every image, silently."""
    if isinstance(prompts, str) or len(prompts) != len(images):
        given = f"the text {prompts!r}" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise RewardSpecError(f"{len(images)} images and {given}; give a list with one prompt for each image")


def declare(
    *,
    differentiable: bool,
    unit: str = POINTS,
    range: tuple[float, float] | None = None,
    downloads: Sequence[str] = (),
    licence: str | None = None,
) -> Callable[[Any], Any]:
    """Decorator of a reward, a function or a class whose instances are called: what `Reward` has of it."""

    def mark(reward: Any) -> Any:
        reward.differentiable, reward.unit, reward.range = differentiable, unit, range
        reward.downloads, reward.licence = tuple(downloads), licence
        return reward

    return mark
