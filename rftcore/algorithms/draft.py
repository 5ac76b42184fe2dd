"""DRaFT: direct reward fine-tuning (Clark, Vicol, Swersky and Fleet, arXiv 2309.17400)."""

from __future__ import annotations

from torch import Tensor


def draft(r: Tensor) -> Tensor:
    """L = -E[r(x_0, c)] over the batch (the paper's objective, section 3), to be minimised.

    Full DRaFT and DRaFT-K are this same loss: K is how many of the last sampling steps x_0 is differentiable through,
    the sampler's `backprop_steps`.

    Shapes: r (B,), scalar result. Units: reward points.
    Raises: ValueError for an empty batch, another shape, or rewards that carry no gradient.
    """
    if r.ndim != 1 or not len(r):
        raise ValueError(f"rewards must have shape (B,) with B >= 1, not {tuple(r.shape)}; give one reward per image")
    if not r.requires_grad:
        raise ValueError(
            "rewards carry no gradient, so DRaFT has nothing to follow: the trajectory was sampled under no_grad or "
            "inference_mode or with backprop_steps=0, or the reward is not differentiable (it rounds, thresholds, "
            "detaches, or leaves torch); sample with grad mode on and backprop_steps >= 1 or None, "
            "and give a differentiable reward"
        )
    return -r.mean()
