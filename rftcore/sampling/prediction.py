"""What a model's output says of x0 and of eps, as linear functions of the state and the output."""

from __future__ import annotations

import math
from typing import NamedTuple

from rftcore.ops.sampler_step import Coefficient

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class Prediction(NamedTuple):
    """x0 = x0_from_sample x + x0_from_output m, and eps likewise, of a state x and the model's output m there."""

    x0_from_sample: float
    x0_from_output: float
    eps_from_sample: float
    eps_from_output: float

    def row(
        self,
        *,
        from_x0: float = 0.0,
        from_eps: float = 0.0,
        from_sample: float = 0.0,
        from_output: float = 0.0,
        sigma: float,
    ) -> list[float]:
        """`Coefficient`'s columns for mean = from_x0 x0 + from_eps eps + from_sample x + from_output m, unclipped."""
        row = [0.0] * len(Coefficient)
        row[Coefficient.X0_FROM_SAMPLE] = self.x0_from_sample
        row[Coefficient.X0_FROM_OUTPUT] = self.x0_from_output
        row[Coefficient.CLIP] = math.inf
        row[Coefficient.MEAN_FROM_X0] = from_x0
        row[Coefficient.MEAN_FROM_SAMPLE] = from_sample + from_eps * self.eps_from_sample
        row[Coefficient.MEAN_FROM_OUTPUT] = from_output + from_eps * self.eps_from_output
        row[Coefficient.SIGMA] = sigma
        row[Coefficient.EPS_FROM_OUTPUT] = self.eps_from_output
        return row


def prediction(prediction_type: str, signal: float, noise: float, scale: float = 1.0) -> Prediction:
    """Reads an output of one of `PREDICTION_TYPES` at a state x with scale x = signal x0 + noise eps.

    Where it does not determine x0 (no signal) or eps (no noise), those coefficients are infinite.

    Args:
        signal, noise: their squares sum to 1.
        scale: what the state is multiplied by for the model, 1 where it is kept at unit variance.

    Source: Salimans and Ho 2022, section 4 (v = signal eps - noise x0).
    """
    if prediction_type == "epsilon":
        if signal == 0:
            return Prediction(math.inf, math.inf, 0.0, 1.0)
        return Prediction(scale / signal, -noise / signal, 0.0, 1.0)
    if prediction_type == "v_prediction":
        return Prediction(signal * scale, -noise, noise * scale, signal)
    if noise == 0:
        return Prediction(0.0, 1.0, math.inf, math.inf)
    return Prediction(0.0, 1.0, scale / noise, -signal / noise)
