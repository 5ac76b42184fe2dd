"""DDPO's rewards: the size of the JPEG file that an image makes. They have no gradient."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from rftcore.rewards.reward import RewardSpecError, declare

QUALITY = 95


@declare(differentiable=False, unit="kilobytes")
def incompressibility(
    images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[dict] | None = None, *, quality: int = QUALITY
) -> torch.Tensor:
    """How large JPEG files the images make: kilobytes, a thousand bytes each, headers and all.

    (B,) of images (B, 3, H, W) in [0, 1]. An image that holds NaN or inf has NaN: in a file it would be black, the
    smallest there is.

    *Raises* RewardSpecError, for a quality outside 1 to 100.
    *Source* Black et al., Training Diffusion Models with Reinforcement Learning (2024): quality 95.
    """
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise RewardSpecError(f"quality={quality!r} is none of JPEG's; give a whole number from 1 to 100, such as 95")
    pixels = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    sizes = torch.tensor([_bytes(image, quality) / 1000 for image in pixels], device=images.device)
    return sizes.masked_fill(~images.detach().flatten(1).isfinite().all(1), torch.nan)


@declare(differentiable=False, unit="kilobytes")
def compressibility(
    images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[dict] | None = None, *, quality: int = QUALITY
) -> torch.Tensor:
    """How small JPEG files the images make: minus their kilobytes.

    Shapes, arguments and errors are those of `incompressibility`.
    """
    return -incompressibility(images, prompts, metadata, quality=quality)


def _bytes(pixels: Any, quality: int) -> int:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
    return file.tell()
