"""RWR: reward-weighted regression on sampled images (Lee et al., arXiv 2302.12192; as DDPO's baseline, 2305.13301)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rftcore.algorithms.arguments import check_gradient, check_per_image


def dense_weights(r: Tensor, temperature: float = 0.2) -> Tensor:
    """w = N softmax(temperature r) over all N samples of an iteration, mean 1.

    The temperature multiplies. Source: jannerm/ddpo, with 0.2.
    Shapes: r (N,), result (N,). Raises: ValueError for another shape.
    """
    check_per_image(r)
    return torch.softmax(temperature * r, dim=0) * len(r)


def sparse_weights(r: Tensor, top: float = 0.1) -> Tensor:
    """w = 1 for the best floor(top N) samples, at least one, and those that tie with the last of them; 0 for others.

    Shapes: r (N,), result (N,). Raises: ValueError for another shape or `top` outside (0, 1].
    """
    check_per_image(r)
    if not 0 < top <= 1:
        raise ValueError(f"top={top} must lie in (0, 1]; give the share of samples to keep, DDPO's baseline keeps 0.1")
    # 0.29 * 100 is 28.999999999999996.
    kept = max(1, math.floor(top * len(r) + 1e-9))
    return (r >= r.topk(kept).values[-1]).to(r.dtype)


def per_prompt(weights_function: Callable[[Tensor], Tensor], prompts: Sequence[str], r: Tensor) -> Tensor:
    """The weights of each prompt's samples among themselves.

    Shapes: r (N,), one prompt each; result (N,). Raises: ValueError where prompts and rewards differ in number.
    """
    check_per_image(r, prompts)
    w = torch.empty_like(r)
    for prompt in dict.fromkeys(prompts):
        rows = torch.tensor([p == prompt for p in prompts], device=r.device)
        w[rows] = weights_function(r[rows])
    return w


def weighted_mse(eps: Tensor, noise: Tensor, w: Tensor) -> Tensor:
    """L = mean_b w_b mean_{C,h,w} (eps_theta(x_t, c, t) - noise)^2, eps guided (jannerm/ddpo's `train_cfg`).

    Shapes: eps and noise (B, C, h, w), w (B,); scalar result. Raises: ValueError for other shapes, eps without gradient.
    """
    if eps.ndim < 2 or not eps.numel() or noise.shape != eps.shape or w.shape != eps.shape[:1]:
        shapes = f"eps {tuple(eps.shape)}, noise {tuple(noise.shape)}, w {tuple(w.shape)}"
        raise ValueError(f"eps and noise must have one shape (B, C, h, w), and w (B,), not {shapes}")
    check_gradient("eps", eps)
    return (w.detach() * (eps - noise).square().flatten(1).mean(1)).mean()
