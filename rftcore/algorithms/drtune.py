"""DRTune: deep reward supervision with the UNet's input detached (Wu et al., arXiv 2405.00760)."""

from __future__ import annotations

from torch import Tensor

from rftcore.algorithms.draft import draft


def drtune(r: Tensor) -> Tensor:
    """L = -E[r(x_0', c)], x_0' the x_0 predicted where the chain was stopped early, to be minimised.

    DRaFT's loss: what is DRTune's own is where the gradient flows, `rftcore.algorithms.paths.drtune`.

    Shapes: r (B,), scalar result. Units: reward points.
    Raises: ValueError for an empty batch, another shape, or rewards that carry no gradient.
    """
    return draft(r)
