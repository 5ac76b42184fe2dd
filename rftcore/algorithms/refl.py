"""ReFL: reward feedback learning (Xu et al., ImageReward, arXiv 2304.05977)."""

from __future__ import annotations

from torch import Tensor

from rftcore.algorithms.arguments import check_rewards


def refl(r: Tensor, margin: float = 2.0, scale: float = 1e-3) -> Tensor:
    """L = scale E[relu(margin - r(x_0', c))], x_0' the x_0 that one late step predicts.

    Which step is drawn by `rftcore.algorithms.paths.refl`. Margin (in ImageReward's points) and scale are the released
    code's. The paper adds a pre-training loss, the released SD 1.4 script does not. A reward at or above the margin has
    no gradient.

    Shapes: r (B,), scalar result. Units: scale times reward points.
    Raises: ValueError for an empty batch, another shape, or rewards that carry no gradient.
    """
    check_rewards(r)
    return scale * (margin - r).relu().mean()
