"""How many bits JPEG's entropy coder needs, about, with a gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rftcore.rewards.jpeg_codec import BLOCK, Coefficients, coefficients, quantised

# Of the files that T.81's Huffman tables give: a coefficient's magnitude costs its own bits, and a code word that grows
# about as fast; each zero before it makes that word longer. Rounded, from tables K.3 to K.6.
_BITS_OF_MAGNITUDE = 2.0
_BITS_OF_PLACE = 1.0
# How sharply a coefficient counts from half a quantisation step on: 2 is gentler, and follows real sizes less well.
_SHARPNESS = 4


def size(images: torch.Tensor, quality: int, *, exact: bool = True) -> torch.Tensor:
    """Estimated kilobytes (B,), a thousand bytes each, of images (B, 3, H, W) in [0, 1], without the file's headers.

    Counts, in each block of 8 by 8, the bits of the coefficients' magnitudes and the place of the last that is not 0;
    of the first coefficient, what changes from block to block. Rows of blocks are taken in reading order, luma
    and chroma each for itself.

    Args:
        exact: values are those of quantised coefficients, as in a file, and only the gradient is of a smooth function;
            False: values are that function's too, and follow real sizes a little less well.

    *Raises* RewardSpecError, as `jpeg_codec.decoded`.
    """
    coded = coefficients(images, quality, exact=exact)
    smooth = _bits(coded, _smooth_magnitude, _smooth_presence)
    if not exact:
        return smooth / 8000
    with torch.no_grad():
        whole = _bits(quantised(coded), _whole_magnitude, _whole_presence)
    return (whole + (smooth - smooth.detach())) / 8000


def _bits(
    coded: Coefficients,
    magnitude: Callable[[torch.Tensor], torch.Tensor],
    presence: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """(B,)."""
    total = coded.luma.new_zeros(len(coded.luma))
    for blocks in (coded.luma, coded.chroma):
        c = blocks.flatten(-2)[..., _zigzag().to(blocks.device)].flatten(2, 3)  # (B, C, N, 64)
        first, others = c[..., 0], c[..., 1:]
        changes = torch.diff(first, prepend=torch.zeros_like(first[..., :1]))
        # The last coefficient's place is how many have it or one after it: 1 less the chance that all of those are 0.
        absent_from_here = (1 - presence(others)).flip(-1).cumprod(-1)
        place = (1 - absent_from_here).flatten(1).sum(1)
        magnitudes = magnitude(others).flatten(1).sum(1) + magnitude(changes).flatten(1).sum(1)
        total = total + _BITS_OF_MAGNITUDE * magnitudes + _BITS_OF_PLACE * place
    return total


def _whole_magnitude(c: torch.Tensor) -> torch.Tensor:
    """JPEG's size category: 0 for 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7, ..."""
    return torch.frexp(c).exponent.to(c)


def _whole_presence(c: torch.Tensor) -> torch.Tensor:
    return (c != 0).to(c)


def _smooth_magnitude(c: torch.Tensor) -> torch.Tensor:
    """About 1 + log2 |c| where that is large, 1/4 where |c| is a half, and 0 at 0."""
    return torch.log2(1 + (2 * c) ** _SHARPNESS) / _SHARPNESS


def _smooth_presence(c: torch.Tensor) -> torch.Tensor:
    """0 at 0, a half where |c| is a half, 1 far from 0."""
    return 1 - 1 / (1 + (2 * c) ** _SHARPNESS)


def _zigzag() -> torch.Tensor:
    """Places of a block's 64 coefficients, row by row, in the order of the file: along diagonals, to and fro."""
    places = [(row, column) for row in range(BLOCK) for column in range(BLOCK)]
    places.sort(key=lambda place: (sum(place), place[sum(place) % 2 == 0]))
    return torch.tensor([row * BLOCK + column for row, column in places])
