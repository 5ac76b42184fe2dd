"""A scheduler's sampling chain as a table of linear coefficients, one row a step."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import torch
from diffusers import DDIMScheduler, DDPMScheduler

from rftcore.ops.sampler_step import Coefficient
from rftcore.sampling.gradient_path import is_whole

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
FINAL_STEPS = ("scheduler", "clamp")


@dataclasses.dataclass(frozen=True)
class StepTable:
    """Every step of a chain of T steps, in the form that `rftcore.ops.sampler_step` takes.

    Attributes:
        timesteps: (T,) the model's time of each step, as the scheduler has it.
        coefficients: (T, 9) fp64 on the CPU, the columns of `Coefficient`.
        stochastic: T booleans, False where sigma = 0 (no noise is drawn, no density exists).
        init_noise_sigma: the standard deviation of the chain's first state.
        eta: DDIM's, None for a scheduler without one.
    """

    timesteps: torch.Tensor
    coefficients: torch.Tensor
    stochastic: tuple[bool, ...]
    init_noise_sigma: float
    eta: float | None

    def __len__(self) -> int:
        return len(self.stochastic)

    def stopped(self, stop: int, output: str) -> StepTable:
        """The first `stop` steps; with `output="x0"` the last one gives the predicted x0, without noise."""
        coefficients = self.coefficients[:stop].clone()
        stochastic = self.stochastic[:stop]
        if output == "x0":
            last = coefficients[-1]
            last[Coefficient.MEAN_FROM_X0] = 1.0
            last[Coefficient.MEAN_FROM_SAMPLE] = 0.0
            last[Coefficient.MEAN_FROM_OUTPUT] = 0.0
            last[Coefficient.SIGMA] = 0.0
            stochastic = (*stochastic[:-1], False)
        return dataclasses.replace(
            self, timesteps=self.timesteps[:stop], coefficients=coefficients, stochastic=stochastic
        )


def step_table(
    scheduler, num_inference_steps: int, *, guidance_scale: float, eta: float | None, final_step: str
) -> StepTable:
    """The chain that `scheduler`, as its user configured it, runs in `num_inference_steps` steps.

    The scheduler itself is left as it is. Coefficients are formed in fp64 from its `alphas_cumprod`.

    Args:
        scheduler: a diffusers `DDIMScheduler` or `DDPMScheduler`.
        eta: DDIM's eta, None for 0; a DDPM step has its own noise and takes none.
        final_step: "scheduler" ends on `final_alpha_cumprod`, "clamp" on `alphas_cumprod[0]` (ddpo-pytorch).

    Raises:
        ValueError: for a scheduler, an option of it or an argument that is not served.

    Source: Song et al. 2021 (DDIM), eq. 12 and 16; Ho et al. 2020 (DDPM), eq. 7.
    """
    build = _builder(scheduler)
    _refuse_unserved_options(scheduler)
    if final_step not in FINAL_STEPS:
        raise ValueError(f"final_step={final_step!r} is not known; allowed are {', '.join(map(repr, FINAL_STEPS))}.")
    maximum = scheduler.config.num_train_timesteps
    if not is_whole(num_inference_steps) or not 1 <= num_inference_steps <= maximum:
        raise ValueError(
            f"num_inference_steps={num_inference_steps!r} must be a whole number from 1 to {maximum}, "
            "the scheduler's num_train_timesteps."
        )
    chain = copy.deepcopy(scheduler)
    chain.set_timesteps(num_inference_steps)
    timesteps = chain.timesteps.cpu()
    if not 0 <= int(timesteps.min()) <= int(timesteps.max()) < maximum:
        raise ValueError(
            f"num_inference_steps={num_inference_steps} with steps_offset={scheduler.config.steps_offset} gives the "
            f"timestep {int(timesteps.max())}, beyond the {maximum} that were trained; take fewer steps."
        )
    if eta is None and build is _ddim_rows:
        eta = 0.0
    eta = None if eta is None else float(eta)
    rows = build(chain, timesteps.tolist(), eta, final_step)
    coefficients = torch.tensor(rows, dtype=torch.float64)
    coefficients[:, Coefficient.GUIDANCE] = guidance_scale
    if scheduler.config.clip_sample:
        coefficients[:, Coefficient.CLIP] = scheduler.config.clip_sample_range
    finite = coefficients.clone()
    finite[:, Coefficient.CLIP] = 0.0
    broken = (~finite.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"the scheduler's coefficients are not finite at t={timesteps[broken[0]].item()}: "
            f"prediction_type={scheduler.config.prediction_type!r} has no x0 there (zero terminal SNR?); "
            "use prediction_type='v_prediction' or a schedule without rescale_betas_zero_snr."
        )
    stochastic = tuple(bool(s) for s in coefficients[:, Coefficient.SIGMA] > 0)
    return StepTable(timesteps, coefficients, stochastic, float(chain.init_noise_sigma), eta)


def _builder(scheduler) -> Callable:
    for known, build in _BUILDERS.items():
        if isinstance(scheduler, known) and not _overridden(scheduler, known):
            return build
    known = ", ".join(cls.__name__ for cls in _BUILDERS)
    raise ValueError(
        f"scheduler={type(scheduler).__name__} is not served; allowed are {known}. "
        f"Convert with e.g. DDIMScheduler.from_config(scheduler.config)."
    )


def _overridden(scheduler, known: type) -> bool:
    """Whether a subclass or an instance brings a step of its own: then it is another scheduler."""
    return any(
        name in vars(scheduler) or getattr(type(scheduler), name, None) is not getattr(known, name, None)
        for name in ("step", "_get_variance", "previous_timestep")
    )


def _refuse_unserved_options(scheduler) -> None:
    config = scheduler.config
    if config.thresholding:
        raise ValueError(
            "thresholding=True in the scheduler's config is not served: its quantile over a whole image has no "
            "per-element gradient. Set thresholding=False (latent models do not use it) and clip_sample if wanted."
        )
    if config.prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type={config.prediction_type!r} in the scheduler's config is not known; "
            f"allowed are {', '.join(map(repr, PREDICTION_TYPES))}."
        )


def _row(scheduler, a_t: float) -> list[float]:
    """x0 and eps as linear functions of the state and the model's output; the mean is still empty."""
    x0_from_sample, x0_from_output, _, eps_from_output = _prediction(scheduler.config.prediction_type, a_t)
    row = [0.0] * len(Coefficient)
    row[Coefficient.X0_FROM_SAMPLE] = x0_from_sample
    row[Coefficient.X0_FROM_OUTPUT] = x0_from_output
    row[Coefficient.EPS_FROM_OUTPUT] = eps_from_output
    row[Coefficient.CLIP] = math.inf
    return row


def _prediction(prediction_type: str, a_t: float) -> tuple[float, float, float, float]:
    """(x0 per sample, x0 per output, eps per sample, eps per output) at signal share a_t."""
    signal, noise = math.sqrt(a_t), math.sqrt(1 - a_t)
    if prediction_type == "epsilon":
        if signal == 0:
            return math.inf, math.inf, 0.0, 1.0
        return 1 / signal, -noise / signal, 0.0, 1.0
    if prediction_type == "v_prediction":
        return signal, -noise, noise, signal
    return 0.0, 1.0, 1 / noise, -signal / noise


def _ddim_rows(scheduler, timesteps: list[int], eta: float, final_step: str) -> list[list[float]]:
    if not eta >= 0 or math.isinf(eta):
        raise ValueError(f"eta={eta} must be a finite number >= 0; 0 is deterministic, 1 is ancestral (DDPM-like).")
    alphas = scheduler.alphas_cumprod.double().tolist()
    final = float(scheduler.final_alpha_cumprod.double())
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    rows = []
    for t in timesteps:
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
        direction = math.sqrt(max(direction, 0.0))
        _, _, eps_from_sample, eps_from_output = _prediction(scheduler.config.prediction_type, a_t)
        row = _row(scheduler, a_t)
        row[Coefficient.MEAN_FROM_X0] = math.sqrt(a_p)
        row[Coefficient.MEAN_FROM_SAMPLE] = direction * eps_from_sample
        row[Coefficient.MEAN_FROM_OUTPUT] = direction * eps_from_output
        row[Coefficient.SIGMA] = sigma
        rows.append(row)
    return rows


_DDPM_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")


def _ddpm_rows(scheduler, timesteps: list[int], eta: float | None, final_step: str) -> list[list[float]]:
    if eta is not None:
        raise ValueError(
            f"eta={eta} has no meaning for DDPMScheduler, whose noise is its variance_type; leave eta=None, "
            "or use DDIMScheduler.from_config(scheduler.config) for DDIM with an eta."
        )
    if final_step != "scheduler":
        raise ValueError(f"final_step={final_step!r} is DDIM's; DDPMScheduler takes final_step='scheduler'.")
    variance_type = scheduler.variance_type
    if variance_type not in _DDPM_VARIANCES:
        raise ValueError(
            f"variance_type={variance_type!r} in the scheduler's config is not served; allowed are "
            f"{', '.join(map(repr, _DDPM_VARIANCES))}."
        )
    alphas = scheduler.alphas_cumprod.double().tolist()
    rows = []
    for t in timesteps:
        previous = int(scheduler.previous_timestep(t))
        a_t, a_p = alphas[t], alphas[previous] if previous >= 0 else 1.0
        alpha = a_t / a_p
        beta = 1 - alpha
        variance = beta if variance_type == "fixed_large" else (1 - a_p) / (1 - a_t) * beta
        row = _row(scheduler, a_t)
        row[Coefficient.MEAN_FROM_X0] = math.sqrt(a_p) * beta / (1 - a_t)
        row[Coefficient.MEAN_FROM_SAMPLE] = math.sqrt(alpha) * (1 - a_p) / (1 - a_t)
        row[Coefficient.SIGMA] = math.sqrt(variance) if t > 0 else 0.0
        rows.append(row)
    return rows


_BUILDERS: dict[type, Callable] = {DDIMScheduler: _ddim_rows, DDPMScheduler: _ddpm_rows}
