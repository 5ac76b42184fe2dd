"""How alike an image and its mirror image are, or the image turned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from rftcore.rewards.reward import RewardSpecError, declare

# Name -> the image that it must equal, of images (B, C, H, W).
_MAPS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "left_right": lambda images: images.flip(-1),
    "up_down": lambda images: images.flip(-2),
    "half_turn": lambda images: images.flip(-2, -1),
    "quarter_turn": lambda images: images.rot90(1, (-2, -1)),
}


@declare(differentiable=True, unit="mean squared error", range=(-1.0, 0.0))
def symmetry(
    images: torch.Tensor,
    prompts: Sequence[str],
    metadata: Sequence[dict] | None = None,
    *,
    kind: Literal["left_right", "up_down", "half_turn", "quarter_turn"] = "left_right",
) -> torch.Tensor:
    """How symmetric images x are: -mean (x - s(x))^2 over pixels and channels, 0 where x equals s(x).

    (B,) of images (B, 3, H, W) in [0, 1].

    Args:
        kind: what s does: left_right and up_down mirror, half_turn and quarter_turn rotate.

    *Raises* RewardSpecError, for another kind, and for a quarter turn of images that are not square.
    """
    if kind not in _MAPS:
        raise RewardSpecError(f"kind={kind!r} is not known; it is one of {', '.join(_MAPS)}")
    if kind == "quarter_turn" and images.shape[-1] != images.shape[-2]:
        raise RewardSpecError(
            f"kind='quarter_turn' is of square images, got {tuple(images.shape[-2:])}; take half_turn or a mirror"
        )
    return -(images - _MAPS[kind](images)).square().flatten(1).mean(1)
