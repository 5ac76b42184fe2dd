"""DRaFT: direct reward fine-tuning (Clark, Vicol, Swersky and Fleet, arXiv 2309.17400)."""

from __future__ import annotations

from torch import Tensor

from rftcore.algorithms.arguments import check_rewards


def draft(r: Tensor) -> Tensor:
    """L = -E[r(x_0, c)] over the batch (the paper's objective, section 3), to be minimised.

    Full DRaFT and DRaFT-K are this same loss: K is how many of the last sampling steps x_0 is differentiable through,
    the sampler's `backprop_steps`.

    Shapes: r (B,), scalar result. Units: reward points.
    Raises: ValueError for an empty batch, another shape, or rewards that carry no gradient.
    """
    check_rewards(r)
    return -r.mean()
