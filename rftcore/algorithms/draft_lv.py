"""DRaFT-LV: the last step's gradient with less variance (Clark et al., arXiv 2309.17400)."""

from __future__ import annotations

import math

from torch import Tensor

from rftcore.sampling.prediction import PREDICTION_TYPES, prediction


def renoise(x_0: Tensor, noise: Tensor, alpha_bar_1: float) -> Tensor:
    """x_1 = sqrt(alpha_bar_1) sg(x_0) + sqrt(1 - alpha_bar_1) noise: the sample, noised again to the last timestep.

    DRaFT-LV's loss is `draft`'s of the sample itself (DRaFT-1) plus `draft`'s of each of n `denoise(x_1, ...)`, every
    one of noise of its own; the paper's n is 2. alpha_bar_1 is alphas_cumprod at the chain's last timestep t_1 (1 for
    SD's 50 steps), and x_1 has unit variance where x_0 has: it is what the UNet sees, whatever the scheduler scales.

    Shapes: x_0, noise, result (B, C, H, W).
    Raises: ValueError for another shape of noise, or alpha_bar_1 outside (0, 1).
    """
    _check_alpha_bar(alpha_bar_1)
    if x_0.shape != noise.shape:
        raise ValueError(f"noise has shape {tuple(noise.shape)}; it must be that of x_0, {tuple(x_0.shape)}")
    return math.sqrt(alpha_bar_1) * x_0.detach() + math.sqrt(1 - alpha_bar_1) * noise


def denoise(x_1: Tensor, output: Tensor, alpha_bar_1: float, prediction_type: str) -> Tensor:
    """x_0' = (x_1 - sqrt(1 - alpha_bar_1) eps_theta(x_1, t_1)) / sqrt(alpha_bar_1), and likewise for v and x_0.

    Args:
        output: the UNet's at (x_1, t_1), with guidance as in the chain.
        prediction_type: what it is: "epsilon", "v_prediction" or "sample".

    A scheduler's `clip_sample` is not applied.

    Shapes: x_1, output, result (B, C, H, W).
    Raises: ValueError for another shape of output, another prediction type, or alpha_bar_1 outside (0, 1).
    """
    _check_alpha_bar(alpha_bar_1)
    if prediction_type not in PREDICTION_TYPES:
        allowed = ", ".join(map(repr, PREDICTION_TYPES))
        raise ValueError(f"prediction_type={prediction_type!r} is not known; allowed are {allowed}")
    if x_1.shape != output.shape:
        raise ValueError(f"output has shape {tuple(output.shape)}; it must be that of x_1, {tuple(x_1.shape)}")
    p = prediction(prediction_type, math.sqrt(alpha_bar_1), math.sqrt(1 - alpha_bar_1))
    return p.x0_from_sample * x_1 + p.x0_from_output * output


def _check_alpha_bar(alpha_bar_1: float) -> None:
    if not 0 < alpha_bar_1 < 1:
        raise ValueError(f"alpha_bar_1={alpha_bar_1} must lie in (0, 1): give alphas_cumprod at the last timestep")
