"""What every reward-gradient loss asks of its rewards."""

from __future__ import annotations

from torch import Tensor


def check_rewards(r: Tensor) -> None:
    """Raises ValueError unless r is (B,) with B >= 1 and carries a gradient."""
    if r.ndim != 1 or not len(r):
        raise ValueError(f"rewards must have shape (B,) with B >= 1, not {tuple(r.shape)}; give one reward per image")
    if not r.requires_grad:
        raise ValueError(
            "rewards carry no gradient, so there is nothing to follow: the trajectory was sampled under no_grad or "
            "inference_mode or with backprop_steps=0, or the reward is not differentiable (it rounds, thresholds, "
            "detaches, or leaves torch); sample with grad mode on and backprop_steps >= 1 or None, or along a "
            "gradient_path that reaches the model, and give a differentiable reward"
        )
