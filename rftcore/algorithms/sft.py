"""KL-regularised supervised fine-tuning on the pretrained model's samples: DPOK's baselines (arXiv 2305.16381).

From memory of the paper's section on supervised learning, unverified against it, and absent from the released code.
"""

from __future__ import annotations

from torch import Tensor

from rftcore.algorithms.arguments import check_gradient, check_shapes


def kl_o(nll: Tensor, r: Tensor, gamma: float) -> Tensor:
    """KL-O: L = mean((r + gamma) nll), for E_{x_0 ~ p_pre}[-(r(x_0, c) + gamma) log p_theta(x_0 | c)].

    gamma is the weight of KL(p_pre || p_theta) over final images, whose only part that depends on theta is
    -log p_theta. nll bounds it from above up to constants: the denoising loss, mean over C, h, w of (eps - noise)^2.
    The bound holds where r + gamma >= 0; a sample below that is pushed away without limit.
    Shapes: nll and r (N,) or (B, S) each; scalar result. Units: reward points times nll's.
    Raises: ValueError for shapes that do not agree or nll without gradient.
    """
    check_shapes(nll=nll, r=r)
    check_gradient("nll", nll)
    return ((r.detach().to(nll) + gamma) * nll).mean()


def kl_d(nll: Tensor, r: Tensor, gamma: float, beta: float, divergence: Tensor) -> Tensor:
    """KL-D: KL-O's loss + beta mean(divergence), the divergence of every denoising step from the pretrained model.

    Shapes: as `kl_o`, divergence as nll: mean over C, h, w of (eps_theta - eps_pre)^2; scalar result.
    Raises: as `kl_o`; ValueError for a divergence without gradient.
    """
    check_shapes(nll=nll, divergence=divergence)
    check_gradient("divergence", divergence)
    return kl_o(nll, r, gamma) + beta * divergence.mean()
