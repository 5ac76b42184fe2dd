"""DDPO: denoising diffusion policy optimisation (Black, Janner, Du, Kostrikov and Levine, arXiv 2305.13301)."""

from __future__ import annotations

import torch
from torch import Tensor

from rftcore.algorithms.arguments import check_policy, check_shapes

# Everywhere: log_prob = log p_theta(x_t' | x_t, c), the mean over C, h, w (nats per element), (N,) or (B, S), and A
# likewise or (B,), clipped by the caller (ddpo-pytorch: to +-5, jannerm/ddpo: to +-10) and held constant.


def score_function(log_prob: Tensor, A: Tensor) -> Tensor:
    """DDPO-SF: L = mean(-A log p_theta), one update per fresh batch.

    Shapes: log_prob (N,) or (B, S), A the same or (B,); scalar result. Units: nats per element times A's.
    Raises: ValueError for shapes that do not agree, or log-probabilities without gradient or in half precision.
    Source: the paper; no released code has it as a path of its own.
    """
    A = check_policy(log_prob, A)
    return (-A * log_prob).mean()


def importance_sampling(log_prob: Tensor, old_log_prob: Tensor, A: Tensor, clip_range: float = 1e-4) -> Tensor:
    """DDPO-IS: L = mean(max(-A r, -A clip(r, 1-c, 1+c))), r = exp(log p_theta - log p_old).

    Where r has left the band in the direction A asked for the gradient is 0; on the other side it is not.
    Shapes: as `score_function`, old_log_prob as log_prob; scalar result. Units: A's.
    Raises: as `score_function`; ValueError for a clip range outside (0, 1).
    Source: ddpo-pytorch and TRL; the clipping is PPO's (arXiv 1707.06347).
    """
    A = check_policy(log_prob, A, old_log_prob, clip_range)
    r = (log_prob - old_log_prob.detach()).exp()
    return torch.maximum(-A * r, -A * r.clamp(1 - clip_range, 1 + clip_range)).mean()


@torch.no_grad()
def approx_kl(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """0.5 mean((log p_theta - log p_old)^2), as ddpo-pytorch logs it. Shapes: (N,) or (B, S) each; scalar result."""
    check_shapes(log_prob=log_prob, old_log_prob=old_log_prob)
    return 0.5 * (log_prob - old_log_prob).square().mean()


@torch.no_grad()
def clip_fraction(log_prob: Tensor, old_log_prob: Tensor, clip_range: float = 1e-4) -> Tensor:
    """The share of |r - 1| > clip_range, both sides, as ddpo-pytorch logs it. Shapes: as `approx_kl`; in [0, 1]."""
    check_shapes(log_prob=log_prob, old_log_prob=old_log_prob)
    r = (log_prob - old_log_prob).exp()
    return ((r - 1).abs() > clip_range).to(r.dtype).mean()
