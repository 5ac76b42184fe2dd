"""DDPM's ancestral steps."""

from __future__ import annotations

import math
from typing import Any

from rftcore.sampling.prediction import prediction

_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")


def ddpm_rows(scheduler: Any) -> list[list[float]]:
    """One row of `Coefficient` for each of the timesteps that a `DDPMScheduler` is set to, formed in fp64.

    Raises:
        ValueError: for a variance_type that is not served.

    Source: Ho et al. 2020, eq. 7.
    """
    variance_type = scheduler.variance_type
    if variance_type not in _VARIANCES:
        raise ValueError(
            f"variance_type={variance_type!r} in the scheduler's config is not served; allowed are "
            f"{', '.join(map(repr, _VARIANCES))}."
        )
    alphas = scheduler.alphas_cumprod.double().tolist()
    rows = []
    for t in scheduler.timesteps.tolist():
        previous = int(scheduler.previous_timestep(t))
        a_t, a_p = alphas[t], alphas[previous] if previous >= 0 else 1.0
        alpha = a_t / a_p
        beta = 1 - alpha
        variance = beta if variance_type == "fixed_large" else (1 - a_p) / (1 - a_t) * beta
        predicted = prediction(scheduler.config.prediction_type, math.sqrt(a_t), math.sqrt(1 - a_t))
        rows.append(
            predicted.row(
                from_x0=math.sqrt(a_p) * beta / (1 - a_t),
                from_sample=math.sqrt(alpha) * (1 - a_p) / (1 - a_t),
                sigma=math.sqrt(variance) if t > 0 else 0.0,
            )
        )
    return rows
