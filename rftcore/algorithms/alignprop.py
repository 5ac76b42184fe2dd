"""AlignProp: reward backpropagation with randomised truncation (Prabhudesai et al., arXiv 2310.03739)."""

from __future__ import annotations

from torch import Tensor

from rftcore.algorithms.arguments import check_rewards


def alignprop(r: Tensor, target: float | None = 10.0, scale: float = 0.01) -> Tensor:
    """L = scale E|r(x_0, c) - target|, to be minimised; target=None is the paper's L = -scale E[r(x_0, c)].

    The released code's aesthetic loss is target=10, its HPS loss 0.01 (1 - r) is target=1 for the rewards below 1 that
    HPS gives. A reward beyond its target is pulled back to it. Where the gradient flows is a path of
    `rftcore.algorithms.paths`: `alignprop_released`, `alignprop_paper` or `alignprop_gaussian`.

    Shapes: r (B,), scalar result. Units: scale times reward points.
    Raises: ValueError for an empty batch, another shape, or rewards that carry no gradient.
    """
    check_rewards(r)
    if target is None:
        return -scale * r.mean()
    return scale * (r - target).abs().mean()
