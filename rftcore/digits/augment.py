"""Random distortions of images of digits, from torch's global generator. Paper is white: 1."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def _uniform(count: int, low: float, high: float) -> torch.Tensor:
    return torch.empty(count).uniform_(low, high)


def warp(images: torch.Tensor, *, degrees: float, shift: float, scale: float) -> torch.Tensor:
    """Turn, move and stretch each image by random amounts within the given bounds.

    *Shapes* (B, C, H, W), kept. *Units* ``shift`` in shares of the side, ``scale`` 0.1 is 90% to 110% on each axis.
    """
    count = len(images)
    angle = _uniform(count, -1, 1) * math.radians(degrees)
    stretch = 1 + _uniform(2 * count, -scale, scale).view(2, count)
    theta = torch.empty(count, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos() * stretch[0], -angle.sin() * stretch[0]
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin() * stretch[1], angle.cos() * stretch[1]
    theta[:, :, 2] = 2 * _uniform(2 * count, -shift, shift).view(count, 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return 1 - F.grid_sample(1 - images, grid, padding_mode="zeros", align_corners=False)


def degrade(images: torch.Tensor) -> torch.Tensor:
    """Blur, fade and speckle each image by a random amount, as an imperfect generator would.

    *Shapes* (B, C, H, W), kept.
    """
    count = len(images)
    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    blur, fade, noise = (_uniform(count, 0, high).view(-1, 1, 1, 1) for high in (1.0, 0.4, 0.15))
    return 1 - (1 - images.lerp(blurred, blur)) * (1 - fade) + noise * torch.randn_like(images)
