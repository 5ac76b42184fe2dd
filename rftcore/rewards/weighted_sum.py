"""Several rewards as one: their weighted sum, with the values of each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rftcore.rewards.reward import Reward, RewardSpecError

NAME = "weighted_sum"


class WeightedSum:
    """sum_i w_i r_i(images), differentiable where every r_i is.

    Args:
        parts: rewards, each with its weight: negative ones are kept small.

    Raises:
        RewardSpecError: for no part, two of one name, or a weight that is no finite number or 0; when called, for a
            part that gives something else than (B,), or no gradient although it declares one: in a sum neither would
            show.
    """

    def __init__(self, parts: Sequence[tuple[Reward, float]]) -> None:
        names = [reward.name for reward, _ in parts]
        if not parts:
            raise RewardSpecError("a weighted sum of no reward; give at least one with its weight")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise RewardSpecError(
                f"reward {twice!r} is in the weighted sum twice: add its weights up, or, of two functions of one name, "
                "rename one"
            )
        for reward, weight in parts:
            number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if not number or not abs(weight) <= sys.float_info.max or weight == 0:
                raise RewardSpecError(
                    f"reward {reward.name!r} has the weight {weight!r}; it must be a finite number and not 0. To only "
                    "measure a reward, name it in eval.held_out_reward"
                )
        self.parts = tuple(parts)
        self.differentiable = all(reward.differentiable for reward, _ in parts)

    def __call__(self, images: Any, prompts: Sequence[str], metadata: Sequence[dict] | None = None) -> Any:
        """(B,) of images (B, 3, H, W)."""
        return self.with_parts(images, prompts, metadata)[0]

    def with_parts(
        self, images: Any, prompts: Sequence[str], metadata: Sequence[dict] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """(B,), and each part's own (B,), without its weight and without a gradient, by name."""
        values = {reward.name: _checked(reward, reward(images, prompts, metadata), images) for reward, _ in self.parts}
        total = sum(weight * values[reward.name] for reward, weight in self.parts)
        return total, {name: value.detach() for name, value in values.items()}

    def to(self, device: Any) -> WeightedSum:
        for reward, _ in self.parts:
            reward.to(device)
        return self


def _checked(reward: Reward, values: Any, images: Any) -> Any:
    """A part's values, which the sum would stretch where they are too few, and whose missing gradient it would hide."""
    # Only now: rewards are named, and `--help` shown, without it.
    import torch

    found = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
    if found != (len(images),):
        raise RewardSpecError(
            f"reward {reward.name!r} of a weighted sum gave {found} for {len(images)} images; it must give a tensor of "
            f"shape {(len(images),)}, one value for each"
        )
    wanted = reward.differentiable and torch.is_grad_enabled() and images.requires_grad
    if wanted and not values.requires_grad:
        raise RewardSpecError(
            f"reward {reward.name!r} of a weighted sum declares differentiable=True, and what it gave does not depend "
            "differentiably on the images: look for no_grad, detach, round, PIL or NumPy in it, or declare False"
        )
    return values


def weighted_sum(parts: Sequence[tuple[Reward, float]]) -> Reward:
    """The weighted sum of rewards, as a reward. Raises: RewardSpecError, as `WeightedSum`."""
    function = WeightedSum(parts)
    return Reward(function, NAME, function.differentiable, unit="weighted reward points")
