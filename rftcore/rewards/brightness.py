"""How bright an image is: the plainest reward with a gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rftcore.rewards.reward import declare


@declare(differentiable=True, unit="brightness", range=(0.0, 1.0))
def brightness(images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[dict] | None = None) -> torch.Tensor:
    """How bright images are: the mean over pixels and channels, 0 black and 1 white.

    (B,) of images (B, 3, H, W) in [0, 1].
    """
    return images.flatten(1).mean(1)
