"""Euler's steps, plain and ancestral: states are x0 + sigma eps, and the model is given them at unit variance."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from rftcore.sampling.prediction import prediction


def input_scales(scheduler: Any) -> list[float]:
    """What each step's state is multiplied by before the model sees it, 1 / sqrt(sigma^2 + 1)."""
    return [1 / math.hypot(1.0, sigma) for sigma, _ in _steps(scheduler)]


def euler_rows(scheduler: Any) -> list[list[float]]:
    """One row of `Coefficient` for each step that an `EulerDiscreteScheduler` is set to, formed in fp64.

    Its `step` has an s_churn, which no config holds and which is 0 here, as by default there.

    Source: Karras et al. 2022, Algorithm 2 without churn.
    """
    return [_row(scheduler, sigma, to=following, noise=0.0) for sigma, following in _steps(scheduler)]


def euler_ancestral_rows(scheduler: Any) -> list[list[float]]:
    """One row of `Coefficient` for each step that an `EulerAncestralDiscreteScheduler` is set to, formed in fp64.

    A step goes down to sigma_down and adds noise of sigma_up, sigma_up^2 + sigma_down^2 = sigma_following^2.

    Source: Katherine Crowson's k-diffusion, `get_ancestral_step` with eta = 1.
    """
    rows = []
    for sigma, following in _steps(scheduler):
        # Closed forms of k-diffusion's differences of squares, which cancel where sigma_up is nearly all there is.
        down = following * (following / sigma)
        up = following * math.sqrt(max((sigma - following) * (sigma + following), 0.0)) / sigma
        rows.append(_row(scheduler, sigma, to=down, noise=up))
    return rows


def _steps(scheduler: Any) -> list[tuple[float, float]]:
    """(sigma, following sigma) of each step; "log_linear" schedules have a sigma more, which no step uses."""
    sigmas = scheduler.sigmas[: len(scheduler.timesteps) + 1].double().tolist()
    return list(pairwise(sigmas))


def _row(scheduler: Any, sigma: float, *, to: float, noise: float) -> list[float]:
    signal = 1 / math.hypot(1.0, sigma)
    predicted = prediction(scheduler.config.prediction_type, signal, sigma * signal, scale=signal)
    # x0 + to eps, folded here in fp64: in a step of its own, x0 would round at the size of sigma eps.
    return predicted.row(
        from_sample=predicted.x0_from_sample, from_output=predicted.x0_from_output, from_eps=to, sigma=noise
    )
