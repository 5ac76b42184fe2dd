"""Baseline JPEG as a function that has a gradient: colour, subsampling, DCT, quantisation, and back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

from rftcore.rewards.reward import RewardSpecError

BLOCK = 8

# Quantisation steps at quality 50. Source: ITU-T T.81, tables K.1 and K.2.
_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *[(99,) * 8] * 4,
)
# Full-range Y, Cb, Cr of R, G, B, without the offset 128 of Cb and Cr. Source: JFIF 1.02.
_TO_YCC = (
    (0.299, 0.587, 0.114),
    (-0.299 / 1.772, -0.587 / 1.772, 0.5),
    (0.5, -0.587 / 1.402, -0.114 / 1.402),
)


@dataclass(frozen=True)
class Coefficients:
    """DCT coefficients in quantisation steps: whole numbers where they have been rounded, as a file holds them.

    *Shapes* ``luma`` (B, 1, ceil(H/8), ceil(W/8), 8, 8); ``chroma`` (B, 2, ceil(H/16), ceil(W/16), 8, 8), Cb and Cr at
    half the resolution. Vertical frequency before horizontal.
    """

    luma: torch.Tensor
    chroma: torch.Tensor
    height: int
    width: int
    quality: int


def decoded(images: torch.Tensor, quality: int, *, exact: bool = True) -> torch.Tensor:
    """What is left of images after JPEG: those that a decoder gives, with a gradient through the quantisation.

    *Shapes* images and result (B, 3, H, W) in [0, 1]; float32, or float64 where the images are.
    *Raises* RewardSpecError, for a quality outside 1 to 100 or images of another shape.
    *Source* Shin and Song, JPEG-resistant Adversarial Images (2017): round(c) is round(c) + (c - round(c))^3 for a
    coefficient c.

    Args:
        exact: values are libjpeg's, with whole numbers wherever it has them, and only the gradient is the source's;
            False: values are the source's function's too.
    """
    return decode(quantised(coefficients(images, quality, exact=exact), exact=exact), exact=exact)


def tables(quality: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantisation steps (8, 8) of luma and chroma at a quality of 1 to 100, as libjpeg scales them."""
    if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
        raise RewardSpecError(f"quality={quality!r} is none of JPEG's; give a whole number from 1 to 100, such as 75")
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    luma, chroma = (((torch.tensor(table) * percent + 50) // 100).clamp(1, 255) for table in (_LUMA, _CHROMA))
    return luma, chroma


def coefficients(images: torch.Tensor, quality: int, *, exact: bool = True) -> Coefficients:
    """The coefficients before they are quantised, of images (B, 3, H, W) in [0, 1]; linear in them unless exact.

    *Raises* RewardSpecError, as `decoded`.
    """
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise RewardSpecError(f"JPEG is of images (B, 3, H, W), got {tuple(images.shape)}")
    images = images if images.dtype == torch.float64 else images.float()
    height, width = images.shape[2:]
    luma_steps, chroma_steps = (table.to(images) for table in tables(quality))
    rgb = _whole(images.clamp(0, 1) * 255, exact)
    ycc = _whole(torch.einsum("dc,bchw->bdhw", images.new_tensor(_TO_YCC), rgb), exact)
    # The DCT is of values less 128: it is taken off Y here, and Cb and Cr have not been given it.
    luma, chroma = ycc[:, :1] - 128, F.avg_pool2d(_padded(ycc[:, 1:], 2, 2 * BLOCK), 2)
    # libjpeg rounds quarters by columns in turn, so that none is favoured: it adds 1 of 4, then 2 of 4.
    chroma = _whole(chroma - (1 - _parity(chroma)) / 4) if exact else chroma
    return Coefficients(
        _dct(_padded(luma, BLOCK, BLOCK), exact) / luma_steps,
        _dct(_padded(chroma, BLOCK, BLOCK), exact) / chroma_steps,
        height,
        width,
        quality,
    )


def quantised(coded: Coefficients, *, exact: bool = True) -> Coefficients:
    """The coefficients rounded, as `decoded` says."""
    luma, chroma = _cubic(coded.luma, exact), _cubic(coded.chroma, exact)
    return Coefficients(luma, chroma, coded.height, coded.width, coded.quality)


def decode(coded: Coefficients, *, exact: bool = True) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1] of coefficients."""
    luma_steps, chroma_steps = (table.to(coded.luma) for table in tables(coded.quality))
    height, width = coded.height, coded.width
    luma = _inverse_dct(coded.luma * luma_steps, exact)[..., :height, :width]
    half_height, half_width = -(-height // 2), -(-width // 2)
    chroma = _inverse_dct(coded.chroma * chroma_steps, exact)[..., :half_height, :half_width]
    luma, chroma = (luma + 128).clamp(0, 255), chroma.clamp(-128, 127)
    # libjpeg's "fancy" upsampling weighs neighbours 3 to 1, as bilinear does at twice the size, but not if so narrow.
    mode = {"mode": "bilinear", "align_corners": False} if half_width > 2 else {"mode": "nearest"}
    chroma = F.interpolate(chroma, scale_factor=2, **mode)
    # It adds 8 of 16, then 7 of 16.
    chroma = _whole(chroma - _parity(chroma) / 16) if exact else chroma
    to_rgb = torch.linalg.inv(luma.new_tensor(_TO_YCC, dtype=torch.float64)).to(luma)
    rgb = torch.einsum("dc,bchw->bdhw", to_rgb, torch.cat([luma, chroma[..., :height, :width]], dim=1))
    return _whole(rgb, exact).clamp(0, 255) / 255


def _cubic(c: torch.Tensor, exact: bool) -> torch.Tensor:
    whole = c.detach().sign() * (c.detach().abs() + 0.5).floor()
    cubic = (c - whole) ** 3
    return whole + (cubic - cubic.detach() if exact else cubic)


def _whole(x: torch.Tensor, exact: bool = True) -> torch.Tensor:
    """Rounded where exact, with the gradient of x; the whole number comes first, so that it stays one in fp32."""
    return (x.detach() + 0.5).floor() + (x - x.detach()) if exact else x


def _parity(planes: torch.Tensor) -> torch.Tensor:
    """0, 1, 0, 1, ... along the columns."""
    return torch.arange(planes.shape[-1], device=planes.device, dtype=planes.dtype) % 2


def _padded(planes: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Planes (B, C, H, W) with their last row and column repeated up to multiples of `rows` and `columns`."""
    height, width = planes.shape[2:]
    return F.pad(planes, (0, -width % columns, 0, -height % rows), mode="replicate")


def _dct(planes: torch.Tensor, exact: bool) -> torch.Tensor:
    """The orthonormal DCT-II of each block: (B, C, 8 R, 8 S) to (B, C, R, S, 8, 8)."""
    batch, channels, height, width = planes.shape
    blocks = planes.reshape(batch, channels, height // BLOCK, BLOCK, width // BLOCK, BLOCK).transpose(3, 4)
    # libjpeg's integer DCT is 8 times this one; between rows and columns it keeps two bits after the point.
    basis = _basis().to(planes) * 8**0.5
    rows = _whole(blocks @ basis.T * 4, exact) / 4
    return _whole(basis @ rows, exact) / 8


def _inverse_dct(blocks: torch.Tensor, exact: bool) -> torch.Tensor:
    """The planes (B, C, 8 R, 8 S) of coefficients (B, C, R, S, 8, 8)."""
    basis = _basis().to(blocks) * 8**0.5
    columns = _whole(basis.T @ blocks * 4, exact) / 4
    planes = _whole(columns @ basis / 8, exact).transpose(3, 4)
    return planes.reshape(*planes.shape[:2], planes.shape[2] * BLOCK, planes.shape[4] * BLOCK)


@lru_cache
def _basis() -> torch.Tensor:
    """(frequency, position): rows are orthonormal."""
    k, n = torch.arange(BLOCK, dtype=torch.float64)[:, None], torch.arange(BLOCK, dtype=torch.float64)
    basis = torch.cos(torch.pi / BLOCK * (n + 0.5) * k) * (2 / BLOCK) ** 0.5
    basis[0] /= 2**0.5
    return basis
