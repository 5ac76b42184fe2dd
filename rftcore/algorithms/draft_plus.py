"""DRaFT+: DRaFT-K held near the pre-trained model (NVIDIA NeMo-Aligner)."""

from __future__ import annotations

from torch import Tensor


def divergence(eps: Tensor, eps_base: Tensor) -> Tensor:
    """d = mean over C, H, W of (eps_theta(x_t, c, t) - sg(eps_base(x_t, c, t)))^2 at one step.

    L = draft(r) + kl_coeff E[d], over the batch and the last K steps; kl_coeff is 1.0 in the released configuration,
    0.2 in its documentation. d is the KL of the two models' Gaussians of that step, without its coefficient of the
    variance. eps_base is the same UNet's with its adapter off, and a constant. In the released code d's gradient also
    goes on through x_t, within the last K steps; where x_t is given detached it does not.

    Shapes: eps, eps_base (B, C, H, W), result (B,). Units: squared eps, per element.
    Raises: ValueError where the shapes differ or have nothing after B.
    """
    if eps.shape != eps_base.shape or eps.ndim < 2:
        raise ValueError(
            f"eps has shape {tuple(eps.shape)} and eps_base {tuple(eps_base.shape)}; both must be (B, C, H, W), the "
            "outputs of the same UNet at the same x_t, with its adapter on and off"
        )
    return (eps - eps_base.detach()).square().flatten(1).mean(1)
