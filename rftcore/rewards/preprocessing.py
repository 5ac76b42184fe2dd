"""From images to what a vision tower takes, as PIL and transformers' processors do it, with gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MODES = ("bicubic", "bilinear")
_HALF_A_GREY_LEVEL = 0.5 / 255


def resize(images: Tensor, height: int, width: int, *, mode: str = "bicubic", clamp: bool = True) -> Tensor:
    """Images (B, C, H, W) in [0, 1] as (B, C, height, width), as PIL's `resize` gives them but for its rounding.

    PIL resizes the width, then the height, each with antialiasing, and keeps both in [0, 255]. (Pillow 13 may begin
    with the height where the two are scaled differently; near hard edges that is another image.) The gradient is that
    of this, except that what lies outside by less than half a grey level, as a white image's rounding does, passes it.

    Args:
        clamp: False leaves values outside [0, 1], as torchvision does for tensors.

    Returns: fp32, or fp64 for fp64.

    Raises: ValueError for another mode, or sizes below 1.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not known; allowed are {', '.join(map(repr, MODES))}.")
    if height < 1 or width < 1:
        raise ValueError(f"images cannot be resized to {height} x {width}; both must be at least 1.")
    images = _widened(images)
    for size in ((images.shape[-2], width), (height, width)):
        if tuple(images.shape[-2:]) != size:
            images = F.interpolate(images, size=size, mode=mode, align_corners=False, antialias=True)
            images = _clamped(images) if clamp else images
    return images


def resize_shortest(images: Tensor, side: int, *, mode: str = "bicubic") -> Tensor:
    """As `resize`, such that the shorter side has so many pixels and the longer one its share of it, rounded down."""
    height, width = images.shape[-2:]
    if height <= width:
        return resize(images, side, int(side * width / height), mode=mode)
    return resize(images, int(side * height / width), side, mode=mode)


def letterbox(images: Tensor, size: int) -> Tensor:
    """The whole of images in squares (B, C, size, size): the longer side resized, unclamped, the rest black.

    Source: open_clip's ResizeMaxSize, of tensors.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    # Halves to the even number, as Python rounds.
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    left, top = (size - width) // 2, (size - height) // 2
    resized = resize(images, height, width, clamp=False)
    return F.pad(resized, (left, size - width - left, top, size - height - top))


def centre_crop(images: Tensor, height: int, width: int) -> Tensor:
    """The middle (B, C, height, width) of images; of two that are as near to it, the upper and left one.

    Raises: ValueError for images smaller than that.
    """
    if images.shape[-2] < height or images.shape[-1] < width:
        raise ValueError(f"images of {images.shape[-2]} x {images.shape[-1]} hold no crop of {height} x {width}.")
    top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
    return images[..., top : top + height, left : left + width]


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std of each channel."""
    images = _widened(images)
    return (images - images.new_tensor(mean).view(-1, 1, 1)) / images.new_tensor(std).view(-1, 1, 1)


def clip_input(
    images: Tensor, size: int = 224, *, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Tensor:
    """What CLIP's processor makes of images: the shorter side resized, the middle square of it, normalised.

    Args:
        images: (B, 3, H, W) in [0, 1].

    Returns: (B, 3, size, size).

    Source: transformers' CLIPImageProcessor (with PIL).
    """
    return normalise(centre_crop(resize_shortest(images, size), size, size), mean, std)


def _widened(images: Tensor) -> Tensor:
    return images.to(torch.promote_types(images.dtype, torch.float32))


def _clamped(images: Tensor) -> Tensor:
    near = images.clamp(-_HALF_A_GREY_LEVEL, 1 + _HALF_A_GREY_LEVEL)
    return near + (near.clamp(0, 1) - near).detach()
