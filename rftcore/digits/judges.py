"""Two judges of whether an image shows the digit its prompt asks for.

They are of different kinds and learnt from disjoint halves of the data, written by different people. ``reward``, a
small convolutional network, is differentiable and is what fine-tuning maximises; ``held_out``, kernel ridge regression
on coarse ink densities, only measures: that both rise shows that the first was not merely fooled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from rftcore.digits.prompts import label
from rftcore.rewards.reward import declare

WEIGHTS = Path(__file__).parent / "judges.safetensors"
_SIDE = 32
_COARSE_SIDE = 8


class Reader(nn.Module):
    """The reward's network: ink (B, 1, 32, 32) to logits of the ten digits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.GELU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * (_SIDE // 8) ** 2, 10),
        )

    def forward(self, ink: torch.Tensor) -> torch.Tensor:
        return self.layers(ink)


class Kernel(nn.Module):
    """The held-out judge: coarse ink (B, 64) to one-against-the-rest scores of the ten digits (B, 10).

    ``scores = exp(-gamma |x - s|^2) @ dual``, over the support vectors ``s``. *Source* Saunders et al., Ridge
    Regression Learning Algorithm in Dual Variables.
    """

    support: torch.Tensor
    dual: torch.Tensor
    gamma: torch.Tensor

    def __init__(self, support: torch.Tensor, dual: torch.Tensor, gamma: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("support", support)
        self.register_buffer("dual", dual)
        self.register_buffer("gamma", gamma)

    def forward(self, coarse: torch.Tensor) -> torch.Tensor:
        squared_distance = (coarse[:, None] - self.support).square().sum(dim=2)
        return torch.exp(-self.gamma * squared_distance) @ self.dual


def ink_of(images: torch.Tensor) -> torch.Tensor:
    """Turn images (B, 3, H, W) in [0, 1] into densities of ink (B, 1, 32, 32): 0 is white paper, 1 is black."""
    ink = 1 - images.mean(dim=1, keepdim=True)
    if ink.shape[-2:] != (_SIDE, _SIDE):
        ink = F.interpolate(ink, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False, antialias=True)
    return ink


def coarsen(ink: torch.Tensor) -> torch.Tensor:
    """Average ink (B, 1, 32, 32) over cells of 4 x 4 pixels: (B, 64)."""
    return F.adaptive_avg_pool2d(ink, _COARSE_SIDE).flatten(1)


@cache
@torch.inference_mode(False)
def _judges(device: torch.device, dtype: torch.dtype) -> tuple[Reader, Kernel]:
    # Outside inference mode: who calls first must not decide what later calls can differentiate.
    if not WEIGHTS.is_file():
        raise FileNotFoundError(
            f"the weights of the digits judges are missing at {WEIGHTS}: make them with "
            "`python -m rftcore.digits.pretrain`, or reinstall rftcore"
        )
    weights = load_file(WEIGHTS)
    kernel = Kernel(*(weights.pop(f"held_out.{name}") for name in ("support", "dual", "gamma")))
    reader = Reader()
    reader.load_state_dict({name.removeprefix("reward."): weight for name, weight in weights.items()})
    for judge in (reader, kernel):
        judge.eval().requires_grad_(False).to(device, dtype)
    return reader, kernel


def _checked(images: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the images in fp32, or fp64 where they are, and the digits (B,) that the prompts ask for."""
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        got = str(images.dtype) if isinstance(images, torch.Tensor) else type(images).__name__
        raise TypeError(f"images must be a floating-point tensor (B, 3, H, W) in [0, 1], got {got}")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise ValueError(f"images must be (B, 3, H, W) with values in [0, 1], got shape {tuple(images.shape)}")
    if isinstance(prompts, str) or len(prompts) != len(images):
        got = "a single string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
        raise ValueError(f"prompts must be a list with one prompt per image, {len(images)} in all, got {got}")
    digits = torch.tensor([label(prompt) for prompt in prompts], dtype=torch.long, device=images.device)
    return images if images.dtype == torch.float64 else images.float(), digits


@declare(differentiable=True, unit="nats", range=(-math.inf, 0.0))
def reward(images: torch.Tensor, prompts: Sequence[str], metadata: Any = None) -> torch.Tensor:
    """Give the log-probability that each image shows the digit its prompt asks for; gradients reach the pixels.

    *Shapes* images (B, 3, H, W) in [0, 1], one prompt each; result (B,), fp32, or fp64 for fp64 images.
    *Units* nats, at most 0; a guess is worth log(1/10) = -2.3.
    *Raises* ``TypeError`` and ``ValueError`` for images or prompts of another kind or shape, or a prompt without a
    digit; ``FileNotFoundError`` without weights.
    """
    images, digits = _checked(images, prompts)
    reader, _ = _judges(images.device, images.dtype)
    with torch.autocast(images.device.type, enabled=False):
        log_probs = F.log_softmax(reader(ink_of(images)), dim=1)  # (B, 10)
    return log_probs.gather(1, digits[:, None]).squeeze(1)


@declare(differentiable=False, unit="share", range=(0.0, 1.0))
@torch.no_grad()
def held_out(images: torch.Tensor, prompts: Sequence[str], metadata: Any = None) -> torch.Tensor:
    """Tell whether each image shows the digit its prompt asks for, by a judge that no training ever sees.

    *Shapes* images (B, 3, H, W) in [0, 1], one prompt each; result (B,), fp32, or fp64 for fp64 images.
    *Units* 1 where it agrees and 0 where not: the mean is the share of agreement; a guess is worth 0.1.
    *Raises* as ``reward``.
    """
    images, digits = _checked(images, prompts)
    _, kernel = _judges(images.device, images.dtype)
    with torch.autocast(images.device.type, enabled=False):
        scores = kernel(coarsen(ink_of(images)))  # (B, 10)
    return (scores.argmax(dim=1) == digits).to(images.dtype)
