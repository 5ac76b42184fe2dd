"""How far images have moved from where they began, and how different those of one prompt still are.

Both in pixels, or in any other space: a function of images (B, 3, H, W) in [0, 1] that gives (B, ...), such as the
embedding of an image encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Features = Callable[[Tensor], Tensor]
_THUMBNAIL = 64


def thumbnails(images: Tensor) -> Tensor:
    """The space "pixels": (B, 3, h, w) fp32, averaged over areas until no side is above 64 pixels.

    Several thousand of them fit in memory and beside a run's samples.
    """
    sides = images.shape[-2:]
    scale = min(1.0, _THUMBNAIL / max(sides))
    return F.interpolate(images.float(), size=[max(1, round(side * scale)) for side in sides], mode="area")


def distance(a: Tensor, b: Tensor) -> Tensor:
    """(N,) root mean square difference of each of a, b (N, ...), in their space's units (pixels: 1 is black to white)."""
    difference = (a - b).flatten(1)
    return torch.linalg.vector_norm(difference, dim=1, dtype=torch.float64) / math.sqrt(difference.shape[1])


def diversity(features: Tensor, prompts: int) -> Tensor:
    """(P,) mean distance between two images of a prompt; row j of (N, ...) shows prompt j mod P, each at least twice."""
    grouped = features.flatten(1).unflatten(0, (-1, prompts)).transpose(0, 1)  # (P, M, D)
    distances = torch.cdist(grouped, grouped, compute_mode="donot_use_mm_for_euclid_dist").double()  # (P, M, M)
    images = grouped.shape[1]
    return distances.sum((1, 2)) / (images * (images - 1)) / math.sqrt(grouped.shape[2])
