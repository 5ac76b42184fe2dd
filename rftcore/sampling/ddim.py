"""DDIM's steps, for any eta."""

from __future__ import annotations

import math
from typing import Any

from rftcore.sampling.prediction import prediction


def ddim_rows(scheduler: Any, eta: float, final_step: str) -> list[list[float]]:
    """One row of `Coefficient` for each of the timesteps that a `DDIMScheduler` is set to, formed in fp64.

    Args:
        final_step: "scheduler" ends on `final_alpha_cumprod`, "clamp" on `alphas_cumprod[0]` (ddpo-pytorch).

    Raises:
        ValueError: for an eta that is no finite number >= 0, or asks for more noise than a state holds.

    Source: Song et al. 2021, eq. 12 and 16.
    """
    if not eta >= 0 or math.isinf(eta):
        raise ValueError(f"eta={eta} must be a finite number >= 0; 0 is deterministic, 1 is ancestral (DDPM-like).")
    alphas = scheduler.alphas_cumprod.double().tolist()
    final = float(scheduler.final_alpha_cumprod.double())
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    rows = []
    for t in scheduler.timesteps.tolist():
        previous = t - stride
        if final_step == "clamp":
            previous = max(previous, 0)
        a_t, a_p = alphas[t], alphas[previous] if previous >= 0 else final
        sigma = eta * math.sqrt((1 - a_p) / (1 - a_t)) * math.sqrt(max(1 - a_t / a_p, 0.0))
        direction = 1 - a_p - sigma**2
        if direction < -1e-12:
            raise ValueError(
                f"eta={eta} asks for more noise at t={t} than the next state holds: sigma^2={sigma**2:.4g} exceeds "
                f"1 - alphas_cumprod[{previous}]={1 - a_p:.4g}; use eta <= 1."
            )
        predicted = prediction(scheduler.config.prediction_type, math.sqrt(a_t), math.sqrt(1 - a_t))
        rows.append(predicted.row(from_x0=math.sqrt(a_p), from_eps=math.sqrt(max(direction, 0.0)), sigma=sigma))
    return rows
