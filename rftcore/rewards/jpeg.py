"""DRaFT's rewards for images that JPEG keeps well, and that it does not: differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from rftcore.rewards.jpeg_codec import decoded, tables
from rftcore.rewards.jpeg_size import size
from rftcore.rewards.reward import RewardSpecError, declare

# What it is measured by, and in.
_MEASURES = {"reconstruction": "squared error", "size": "kilobytes"}


class _Loss:
    """What JPEG takes from an image, or what it costs.

    Args:
        quality: JPEG's, 1 to 100. The paper's is not known; at 50 its tables are the standard's own, so coarse that
            most images have something to lose.
        measure: "reconstruction" is the paper's ||x - d(c(x))||^2, the squared error of the decoded image, summed over
            pixels in [0, 1] and channels; "size" is the file's estimated size without its headers, in kilobytes. Their
            rank correlations with real files' sizes are 0.65 to 0.95 and 0.98 to 1.00: python -m benchmarks.jpeg.
        exact: values are those of quantised images and only the gradient is smoothed; False: values are smoothed too,
            as those of the codec that the paper names.

    *Raises* RewardSpecError, for a quality or a measure that there is not.
    """

    def __init__(
        self, quality: int = 50, measure: Literal["reconstruction", "size"] = "reconstruction", exact: bool = True
    ) -> None:
        tables(quality)
        if measure not in _MEASURES:
            raise RewardSpecError(f"measure={measure!r} is not known; it is {' or '.join(_MEASURES)}")
        self.quality, self.measure, self.exact = quality, measure, exact
        self.unit = _MEASURES[measure]

    def _loss(self, images: torch.Tensor) -> torch.Tensor:
        """(B,) of images (B, 3, H, W) in [0, 1]."""
        if self.measure == "size":
            return size(images, self.quality, exact=self.exact)
        return (images - decoded(images, self.quality, exact=self.exact)).square().flatten(1).sum(1)


@declare(differentiable=True, unit="squared error")
class Compressibility(_Loss):
    """How well JPEG keeps images: -||x - d(c(x))||^2, or minus their kilobytes, as `measure` says.

    *Source* Clark et al., Directly Fine-Tuning Diffusion Models on Differentiable Rewards (2024); its codec is Shin and
    Song's.
    """

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[dict] | None = None
    ) -> torch.Tensor:
        return -self._loss(images)


@declare(differentiable=True, unit="squared error")
class Incompressibility(_Loss):
    """How badly JPEG keeps images: ||x - d(c(x))||^2, or their kilobytes, as `measure` says."""

    def __call__(
        self, images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[dict] | None = None
    ) -> torch.Tensor:
        return self._loss(images)
