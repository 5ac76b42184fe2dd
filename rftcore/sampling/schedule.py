"""A scheduler's sampling chain as a table, one row a step."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from rftcore.ops.sampler_step import Coefficient
from rftcore.sampling.ddim import ddim_rows
from rftcore.sampling.ddpm import ddpm_rows
from rftcore.sampling.euler import euler_ancestral_rows, euler_rows, input_scales
from rftcore.sampling.gradient_path import is_whole
from rftcore.sampling.lcm import lcm_rows
from rftcore.sampling.multistep import MultistepTable, multistep_table
from rftcore.sampling.prediction import PREDICTION_TYPES

FINAL_STEPS = ("scheduler", "clamp")


@dataclasses.dataclass(frozen=True)
class StepTable:
    """Every step of a chain of T steps, in the form that `rftcore.ops.sampler_step` takes.

    Attributes:
        timesteps: (T,) the model's time of each step, as the scheduler has it.
        coefficients: (T, 9) fp64 on the CPU, the columns of `Coefficient`.
        stochastic: T booleans, False where sigma = 0 (no noise is drawn, no density exists).
        input_scales: (T,) fp64 on the CPU, what each step's state is multiplied by before the model sees it.
        init_noise_sigma: the standard deviation of the chain's first state.
        eta: DDIM's, None for a scheduler without one.
    """

    timesteps: torch.Tensor
    coefficients: torch.Tensor
    stochastic: tuple[bool, ...]
    input_scales: torch.Tensor
    init_noise_sigma: float
    eta: float | None

    differentiable = True
    reason = ""

    def __len__(self) -> int:
        return len(self.stochastic)

    @property
    def fingerprint(self) -> str:
        """The same for the same chain."""
        digest = hashlib.sha256(self.timesteps.numpy().tobytes())
        digest.update(self.coefficients.numpy().tobytes())
        return digest.hexdigest()[:12]

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
            self,
            timesteps=self.timesteps[:stop],
            coefficients=coefficients,
            stochastic=stochastic,
            input_scales=self.input_scales[:stop],
        )


def step_table(
    scheduler: Any, num_inference_steps: int, *, guidance_scale: float, eta: float | None, final_step: str
) -> StepTable | MultistepTable:
    """The chain that `scheduler`, as its user configured it, runs in `num_inference_steps` steps.

    The scheduler itself is left as it is. Coefficients are formed in fp64 from its `alphas_cumprod` or `sigmas`.

    Args:
        scheduler: of a class that is served: those with a gradient give a `StepTable`, those for sampling only a
            `MultistepTable`.
        eta: DDIM's eta, None for 0; every other scheduler has its own noise, or none, and takes None only.
        final_step: "scheduler" ends as the scheduler does; DDIM's "clamp" on `alphas_cumprod[0]` (ddpo-pytorch).

    Raises:
        ValueError: for a scheduler, an option of it or an argument that is not served.
    """
    kind = _kind(scheduler)
    _refuse_unserved_options(scheduler, kind)
    if final_step not in FINAL_STEPS:
        raise ValueError(f"final_step={final_step!r} is not known; allowed are {', '.join(map(repr, FINAL_STEPS))}.")
    if kind is not DDIMScheduler:
        _refuse_ddims_arguments(kind, eta, final_step)
    chain = _at_timesteps(scheduler, kind, num_inference_steps)
    if kind in _SAMPLING_ONLY:
        return multistep_table(chain, guidance_scale)
    scales = torch.ones(len(chain.timesteps), dtype=torch.float64, device="cpu")
    if kind in _EULERS:
        # Of diffusers' own fp32 sigmas, everything in fp64.
        chain.sigmas = chain.sigmas.double()
        scales = torch.tensor(input_scales(chain), dtype=torch.float64, device="cpu")
    if kind is DDIMScheduler:
        eta = 0.0 if eta is None else float(eta)
        rows = ddim_rows(chain, eta, final_step)
    else:
        rows = _ROWS[kind](chain)
    coefficients = torch.tensor(rows, dtype=torch.float64, device="cpu")
    coefficients[:, Coefficient.GUIDANCE] = guidance_scale
    if kind not in _EULERS and scheduler.config.clip_sample:
        coefficients[:, Coefficient.CLIP] = scheduler.config.clip_sample_range
    _check_finite(coefficients, chain)
    return StepTable(
        timesteps=chain.timesteps.cpu(),
        coefficients=coefficients,
        stochastic=tuple(bool(s) for s in coefficients[:, Coefficient.SIGMA] > 0),
        input_scales=scales,
        init_noise_sigma=float(chain.init_noise_sigma),
        eta=eta,
    )


_ROWS: dict[type, Callable] = {
    DDIMScheduler: ddim_rows,
    DDPMScheduler: ddpm_rows,
    EulerDiscreteScheduler: euler_rows,
    EulerAncestralDiscreteScheduler: euler_ancestral_rows,
    LCMScheduler: lcm_rows,
}
_EULERS = (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler)
_SAMPLING_ONLY = (DPMSolverMultistepScheduler, UniPCMultistepScheduler)
# Where a scheduler without an eta has its noise from.
_NOISE = {
    DDPMScheduler: "whose noise is its variance_type",
    EulerAncestralDiscreteScheduler: "whose noise is what its sigmas leave",
    LCMScheduler: "whose noise is that of its next timestep",
}
# What a table is made of, and a subclass may not have changed.
_MATHS = (
    "step",
    "scale_model_input",
    "init_noise_sigma",
    "previous_timestep",
    "convert_model_output",
    "get_scalings_for_boundary_condition_discrete",
    "dpm_solver_first_order_update",
    "multistep_dpm_solver_second_order_update",
    "multistep_dpm_solver_third_order_update",
    "multistep_uni_c_bh_update",
    "multistep_uni_p_bh_update",
    "_get_variance",
    "_sigma_to_alpha_sigma_t",
)


def _kind(scheduler: Any) -> type:
    """The class among those served that a scheduler is of."""
    for kind in (*_ROWS, *_SAMPLING_ONLY):
        if isinstance(scheduler, kind) and not _overridden(scheduler, kind):
            return kind
    with_gradient, sampling_only = (", ".join(cls.__name__ for cls in group) for group in (_ROWS, _SAMPLING_ONLY))
    raise ValueError(
        f"scheduler={type(scheduler).__name__} is not served; allowed are {with_gradient} with gradient, and "
        f"{sampling_only} for sampling only. Convert with e.g. DDIMScheduler.from_config(scheduler.config)."
    )


def _overridden(scheduler: Any, kind: type) -> bool:
    """Whether a subclass or an instance brings a step of its own: then it is another scheduler."""
    missing = object()
    return any(
        getattr(type(scheduler), name, missing) is not getattr(kind, name, missing)
        or (name in vars(scheduler) and callable(vars(scheduler)[name]))
        for name in _MATHS
    )


def _refuse_unserved_options(scheduler: Any, kind: type) -> None:
    config = scheduler.config
    # Euler's classes read no such option, which a config converted from another class carries along.
    if kind not in _EULERS and config.thresholding:
        raise ValueError(
            "thresholding=True in the scheduler's config is not served: its quantile over a whole image has no "
            "per-element gradient. Set thresholding=False (latent models do not use it) and clip_sample if wanted."
        )
    if config.prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"prediction_type={config.prediction_type!r} in the scheduler's config is not known; "
            f"allowed are {', '.join(map(repr, PREDICTION_TYPES))}."
        )


def _refuse_ddims_arguments(kind: type, eta: float | None, final_step: str) -> None:
    if eta is not None:
        raise ValueError(
            f"eta={eta} has no meaning for {kind.__name__}, {_NOISE.get(kind, 'which draws no noise')}; leave "
            "eta=None, or use DDIMScheduler.from_config(scheduler.config) for DDIM with an eta."
        )
    if final_step != "scheduler":
        raise ValueError(f"final_step={final_step!r} is DDIM's; {kind.__name__} takes final_step='scheduler'.")


def _at_timesteps(scheduler: Any, kind: type, num_inference_steps: int) -> Any:
    """A copy of the scheduler, set to its timesteps."""
    maximum = scheduler.config.num_train_timesteps
    if not is_whole(num_inference_steps) or not 1 <= num_inference_steps <= maximum:
        raise ValueError(
            f"num_inference_steps={num_inference_steps!r} must be a whole number from 1 to {maximum}, "
            "the scheduler's num_train_timesteps."
        )
    if kind is LCMScheduler and num_inference_steps > scheduler.config.original_inference_steps:
        raise ValueError(
            f"num_inference_steps={num_inference_steps} of an LCMScheduler must be at most its "
            f"original_inference_steps={scheduler.config.original_inference_steps}, of which it takes some; take fewer."
        )
    chain = copy.deepcopy(scheduler)
    chain.set_timesteps(num_inference_steps)
    if kind is EulerDiscreteScheduler and _continuous(scheduler.config):
        return chain
    first, last = chain.timesteps.max().item(), chain.timesteps.min().item()
    if first >= maximum:
        raise ValueError(
            f"num_inference_steps={num_inference_steps} with steps_offset={scheduler.config.steps_offset} gives the "
            f"timestep {first}, beyond the {maximum} that were trained; take fewer steps."
        )
    if last < 0:
        raise ValueError(
            f"num_inference_steps={num_inference_steps} with timestep_spacing="
            f"{scheduler.config.timestep_spacing!r} gives the timestep {last}, by a rounding of diffusers'; take "
            "another number of steps."
        )
    return chain


def _continuous(config: Any) -> bool:
    """Whether an Euler scheduler's time is log(sigma) / 4, which is no training step."""
    return config.timestep_type == "continuous" and config.prediction_type == "v_prediction"


def _check_finite(coefficients: torch.Tensor, chain: Any) -> None:
    finite = coefficients.clone()
    finite[:, Coefficient.CLIP] = 0.0
    broken = (~finite.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"the scheduler's coefficients are not finite at t={chain.timesteps[broken[0]].item()}: "
            f"prediction_type={chain.config.prediction_type!r} has no x0 there (zero terminal SNR?); "
            "use prediction_type='v_prediction' or a schedule without rescale_betas_zero_snr."
        )
