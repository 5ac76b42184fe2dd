"""DRaFT+: DRaFT-K held near the pre-trained model (NVIDIA NeMo-Aligner)."""

from __future__ import annotations

from torch import Tensor

from rftcore.algorithms.draft import draft


def divergence(eps: Tensor, eps_base: Tensor) -> Tensor:
    """d = mean over C, H, W of (eps_theta(x_t, c, t) - sg(eps_base(x_t, c, t)))^2 at one step.

    The KL of the two models' Gaussians of that step, without its coefficient of the variance. eps_base is the same
    UNet's with its adapter off, and a constant.

    Shapes: eps, eps_base (B, C, H, W), result (B,). Units: squared eps, per element.
    Raises: ValueError where the shapes differ or have nothing after B.
    """
    if eps.shape != eps_base.shape or eps.ndim < 2:
        raise ValueError(
            f"eps has shape {tuple(eps.shape)} and eps_base {tuple(eps_base.shape)}; both must be (B, C, H, W), the "
            "outputs of the same UNet at the same x_t, with its adapter on and off"
        )
    return (eps - eps_base.detach()).square().flatten(1).mean(1)


def draft_plus(r: Tensor, d: Tensor, kl_coeff: float) -> Tensor:
    """L = -E[r(x_0, c)] + kl_coeff E[d] over the batch and the last K steps, to be minimised.

    kl_coeff is 1.0 in the released configuration and 0.2 in its documentation.

    Shapes: r (B,), d (B,) or (B, K) of `divergence`, scalar result. Units: reward points.
    Raises: ValueError as `draft`.
    """
    return draft(r) + kl_coeff * d.mean()
