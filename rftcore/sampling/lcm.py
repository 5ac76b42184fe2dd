"""Latent consistency models: their steps, and the guidance scale as a distilled UNet is told it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rftcore.sampling.prediction import prediction

# Of the boundary condition: the data's standard deviation.
_SIGMA_DATA = 0.5


def lcm_rows(scheduler: Any) -> list[list[float]]:
    """One row of `Coefficient` for each of the timesteps that an `LCMScheduler` is set to, formed in fp64.

    Each step predicts the image, c_out x0 + c_skip x, and noises that to the next timestep; the last one ends on it.

    Source: Luo et al. 2023 (latent consistency models), eq. 9 and Algorithm 3.
    """
    alphas = scheduler.alphas_cumprod.double().tolist()
    times = scheduler.timesteps.tolist()
    rows = []
    for t, following in zip(times, [*times[1:], None], strict=True):
        a_t, a_p = alphas[t], 1.0 if following is None else alphas[following]
        scaled = t * scheduler.config.timestep_scaling
        c_skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
        c_out = scaled / math.hypot(scaled, _SIGMA_DATA)
        signal = math.sqrt(a_p)
        predicted = prediction(scheduler.config.prediction_type, math.sqrt(a_t), math.sqrt(1 - a_t))
        rows.append(
            predicted.row(from_x0=signal * c_out, from_sample=signal * c_skip, sigma=math.sqrt(max(1 - a_p, 0.0)))
        )
    return rows


def guidance_embedding(guidance_scale: float, width: int) -> Tensor:
    """(1, width) fp32 on the CPU: sines, then cosines, of 1000 (guidance_scale - 1), as diffusers' pipelines make it.

    In fp32, whose rounding a distilled model has been trained with: at a scale of 8 it is 1e-4 of the embedding.

    Source: Meng et al. 2023 (distillation of guided models), section 3.1; Kingma et al. 2021 for the frequencies.
    """
    half = width // 2
    step = torch.log(torch.tensor(10000.0)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -step)
    angles = torch.tensor([[guidance_scale - 1]], dtype=torch.float32) * 1000.0 * frequencies  # (1, half)
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))
