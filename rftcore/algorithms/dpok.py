"""DPOK: policy gradients under a KL to the pretrained model (Fan et al., arXiv 2305.16381)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from rftcore.algorithms.arguments import check_gradient, check_policy, check_shapes


def policy(log_prob: Tensor, old_log_prob: Tensor, A: Tensor, reward_weight: float, clip_range: float = 1e-4) -> Tensor:
    """L = mean(-reward_weight A clamp(r, 1-c, 1+c)), r = exp(log p_theta - log p_old), A = r(x_0, c) - V(x_t, c, t).

    Only a clamp, without PPO's maximum: the gradient is 0 outside the band on both sides, whatever A's sign.
    log_prob is the mean over C, h, w (nats per element); A is held constant. Without a value function A is the reward.
    Shapes: log_prob and old_log_prob (N,) or (B, S), A the same or (B,); scalar result. Units: reward points.
    Raises: ValueError for shapes that do not agree, log-probabilities without gradient or in half precision, or a clip
    range outside (0, 1).
    Source: google-research/dpok, train_online_pg.py.
    """
    A = check_policy(log_prob, A, old_log_prob, clip_range)
    r = (log_prob - old_log_prob.detach()).exp()
    return (-reward_weight * A * r.clamp(1 - clip_range, 1 + clip_range)).mean()


def dpok(
    log_prob: Tensor,
    old_log_prob: Tensor,
    A: Tensor,
    divergence: Tensor,
    reward_weight: float,
    kl_weight: float,
    clip_range: float = 1e-4,
) -> Tensor:
    """L = policy loss + kl_weight mean(divergence).

    The divergence from the adapter-off model comes from the sampler: "exact", the paper's KL of a step in nats per
    element, or "uniform", the released code's (eps_theta - eps_pre)^2 without the KL's coefficient.
    Shapes: as `policy`, divergence as log_prob; scalar result. Raises: as `policy`; a divergence without gradient.
    """
    check_shapes(log_prob=log_prob, divergence=divergence)
    check_gradient("divergence", divergence)
    return policy(log_prob, old_log_prob, A, reward_weight, clip_range) + kl_weight * divergence.mean()


def value_loss(v: Tensor, r: Tensor) -> Tensor:
    """L = mean((V(x_t, c, t) - r(x_0, c))^2), the final reward for every step of its chain.

    Shapes: v and r (N,) or (B, S) each; scalar result. Units: reward points squared.
    Raises: ValueError for shapes that do not agree or values without gradient. Source: as `policy`.
    """
    check_shapes(v=v, r=r)
    check_gradient("v", v)
    return F.mse_loss(v, r.detach().to(v))
