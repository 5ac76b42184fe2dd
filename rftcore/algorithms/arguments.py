"""What the losses ask of the tensors they are given."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_rewards(r: Tensor) -> None:
    """Raises ValueError unless r is (B,) with B >= 1 and carries a gradient."""
    check_per_image(r)
    if not r.requires_grad:
        raise ValueError(
            "rewards carry no gradient, so there is nothing to follow: the trajectory was sampled under no_grad or "
            "inference_mode or with backprop_steps=0, or the reward is not differentiable (it rounds, thresholds, "
            "detaches, or leaves torch); sample with grad mode on and backprop_steps >= 1 or None, or along a "
            "gradient_path that reaches the model, and give a differentiable reward"
        )


def check_shapes(**tensors: Tensor) -> None:
    """Raises ValueError unless all have one shape, (N,) or (B, S), with at least one entry."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    first, *others = tensors.values()
    if first.ndim not in (1, 2) or not first.numel() or any(other.shape != first.shape for other in others):
        given = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(
            f"{', '.join(shapes)} must have one shape, (N,) or (B, S), with at least one entry, not {given}; "
            "give one value per sample, or per sample and step"
        )


def check_per_image(r: Tensor, prompts: Sequence[str] | None = None) -> None:
    """Raises ValueError unless r is (N,) with N >= 1 of a floating dtype, and the prompts, where given, as many."""
    if r.ndim != 1 or not len(r):
        raise ValueError(f"rewards must have shape (B,) with B >= 1, not {tuple(r.shape)}; give one reward per image")
    if not r.is_floating_point():
        raise ValueError(f"rewards must be floating, not {r.dtype}, which would round what comes of them; use .float()")
    if prompts is not None and (isinstance(prompts, str) or len(prompts) != len(r)):
        given = "one string" if isinstance(prompts, str) else len(prompts)
        raise ValueError(f"prompts must be {len(r)} strings, one for each reward, not {given}; repeat them per image")


def check_gradient(name: str, tensor: Tensor) -> None:
    """Raises ValueError for a tensor that carries no gradient."""
    if not tensor.requires_grad:
        raise ValueError(
            f"{name} carries no gradient, so the loss has nothing to follow: it was computed under no_grad or "
            "inference_mode, detached, or by a model without trainable parameters; compute it again with grad mode on"
        )


def check_policy(
    log_prob: Tensor, A: Tensor, old_log_prob: Tensor | None = None, clip_range: float | None = None
) -> Tensor:
    """Checks a policy gradient's arguments; gives A, a constant of log_prob's shape.

    One advantage per sample, A (B,), holds for all S steps of log_prob (B, S).
    Raises: ValueError for shapes that do not agree, a clip range outside (0, 1), log-probabilities without gradient
    or too coarse for the ratio.
    """
    if log_prob.ndim == 2 and A.shape == log_prob.shape[:1]:
        A = A[:, None].expand_as(log_prob)  # (B, S)
    check_shapes(log_prob=log_prob, A=A, **({} if old_log_prob is None else {"old_log_prob": old_log_prob}))
    check_gradient("log_prob", log_prob)
    if clip_range is not None and not 0 < clip_range < 1:
        raise ValueError(
            f"clip_range={clip_range} must lie in (0, 1), the papers use 1e-4; give how far r may be off 1"
        )
    coarse = {
        name: tensor.dtype
        for name, tensor in {"log_prob": log_prob, "old_log_prob": old_log_prob}.items()
        # The mean over C, h, w moves in the fifth digit, which half precision has not.
        if tensor is not None and tensor.dtype not in (torch.float32, torch.float64)
    }
    if coarse:
        raise ValueError(f"{coarse} must be float32 or float64: half precision cannot tell ratios near 1 apart")
    return A.detach().to(log_prob)
