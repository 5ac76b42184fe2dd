"""Multistep schedulers, for sampling without a gradient: each state as a combination of all that was predicted."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from rftcore.ops.sampler_step import Coefficient
from rftcore.sampling.prediction import prediction

_ALGORITHM_TYPES = ("dpmsolver++", "dpmsolver")


@dataclasses.dataclass(frozen=True)
class MultistepTable:
    """Every step of a chain of T steps that is linear in its first state and the predicted x0 of each step.

    A step takes two: `sampler_step(x, model_output, coefficients[i])` gives x0_i, and then
    `next_state(history, weights[i, : i + 2])` of the history (x, x0_0, ..., x0_i) the next state. Of x0 rather than of
    the model's outputs, whose weights cancel: in fp32 they lose 15 times what diffusers' own steps do (eps, 20 steps).

    Attributes:
        scheduler: the name of its class.
        timesteps: (T,) the model's time of each step, as the scheduler has it.
        coefficients: (T, 9) fp64 on the CPU, the columns of `Coefficient`, for a mean that is x0.
        weights: (T, T+1) fp64 on the CPU, row i of state i+1, of the first state and of x0_0, ..., x0_i.
        input_scales: (T,) fp64, what each step's state is multiplied by before the model sees it: ones.
        init_noise_sigma: the standard deviation of the chain's first state.
    """

    scheduler: str
    timesteps: Tensor
    coefficients: Tensor
    weights: Tensor
    input_scales: Tensor
    init_noise_sigma: float

    differentiable = False
    eta = None

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def stochastic(self) -> tuple[bool, ...]:
        return (False,) * len(self)

    @property
    def reason(self) -> str:
        """Why it has no gradient and no log-probability, and what to do."""
        return (
            f"scheduler={self.scheduler} is a scheduler whose order or noise cannot be replayed: a step of it depends "
            "on the model's outputs at earlier steps, so it samples without a gradient only, and has no "
            "log-probability. Sample with backprop_steps=0, or convert with e.g. "
            "EulerDiscreteScheduler.from_config(scheduler.config)."
        )

    @property
    def fingerprint(self) -> str:
        """The same for the same chain."""
        digest = hashlib.sha256(self.timesteps.numpy().tobytes())
        digest.update(self.coefficients.numpy().tobytes())
        digest.update(self.weights.numpy().tobytes())
        return digest.hexdigest()[:12]

    def stopped(self, stop: int, output: str) -> MultistepTable:
        """The first `stop` steps; with `output="x0"` the last one gives the predicted x0."""
        weights = self.weights[:stop, : stop + 1].clone()
        if output == "x0":
            weights[-1] = 0.0
            weights[-1, -1] = 1.0
        return dataclasses.replace(
            self,
            timesteps=self.timesteps[:stop],
            coefficients=self.coefficients[:stop],
            weights=weights,
            input_scales=self.input_scales[:stop],
        )


def next_state(history: Tensor, weights: Tensor) -> Tensor:
    """The state that a row of a `MultistepTable` makes of what came before it.

    Args:
        history: (K, B, ...) the first state, then the predicted x0 of each step so far.
        weights: (K,) the first entries of that row, in the dtype of `history` and on its device.

    Shapes: (B, ...).
    """
    # No matrix product: on a GPU it would round to TF32 where the caller allows that.
    return (history * weights.reshape(-1, *[1] * (history.dim() - 1))).sum(0)


def multistep_table(scheduler: Any, guidance_scale: float) -> MultistepTable:
    """The table of a `DPMSolverMultistepScheduler` or `UniPCMultistepScheduler` that is set to its timesteps.

    The weights are what diffusers' own steps make of unit vectors; `scheduler` is stepped through, so give a copy.

    Raises:
        ValueError: for an option of the scheduler that is not linear or draws noise, or a chain that is not finite.

    Source: Lu et al. 2022 (DPM-Solver, DPM-Solver++); Zhao et al. 2023 (UniPC).
    """
    _refuse_unserved_options(scheduler)
    prediction_type = scheduler.config.prediction_type
    # Of diffusers' own fp32 sigmas, everything in fp64.
    scheduler.sigmas = scheduler.sigmas.double()
    timesteps = scheduler.timesteps.cpu()
    rows = []
    for sigma in scheduler.sigmas[: len(timesteps)]:
        signal, noise = (s.item() for s in scheduler._sigma_to_alpha_sigma_t(sigma))
        rows.append(prediction(prediction_type, signal, noise).row(from_x0=1.0, sigma=0.0))
    coefficients = torch.tensor(rows, dtype=torch.float64, device="cpu")
    coefficients[:, Coefficient.GUIDANCE] = guidance_scale
    weights = _weights(scheduler)
    broken = (~weights.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"the scheduler's chain is not finite from t={timesteps[broken[0]].item()} on, in diffusers' own steps "
            f"too: its options do not go with its last sigma of {scheduler.sigmas[-1].item():.4g}; use "
            "final_sigmas_type='sigma_min', or the class's default solver_type, predict_x0 and lower_order_final."
        )
    return MultistepTable(
        scheduler=type(scheduler).__name__,
        timesteps=timesteps,
        coefficients=coefficients,
        weights=weights,
        input_scales=torch.ones(len(timesteps), dtype=torch.float64, device="cpu"),
        init_noise_sigma=float(scheduler.init_noise_sigma),
    )


def _weights(scheduler: Any) -> Tensor:
    """(T, T+1): the chain of unit vectors, one for the first state and one for each step's x0."""
    scheduler.register_to_config(prediction_type="sample")
    # Every sigma in order, also where two timesteps were rounded to the same.
    scheduler.set_begin_index(0)
    unit = torch.eye(len(scheduler.timesteps) + 1, dtype=torch.float64, device="cpu").as_subclass(_KeepsDtype)
    states = [unit[:1]]  # (1, T+1) each: a sample whose elements are its weights
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            states.append(scheduler.step(unit[step + 1 : step + 2], t, states[-1], return_dict=False)[0])
    return torch.cat(states[1:]).as_subclass(Tensor)


class _KeepsDtype(Tensor):
    """A tensor that stays fp64 where diffusers' steps cast the state to fp32."""

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return self


def _refuse_unserved_options(scheduler: Any) -> None:
    config = scheduler.config
    # Only what the class reads: a config converted from another class carries that one's options along.
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        if config.algorithm_type not in _ALGORITHM_TYPES:
            raise ValueError(
                f"algorithm_type={config.algorithm_type!r} in the scheduler's config is not served: its noise cannot "
                f"be replayed; allowed are {', '.join(map(repr, _ALGORITHM_TYPES))}. To sample with noise use e.g. "
                "EulerAncestralDiscreteScheduler.from_config(scheduler.config)."
            )
        if config.variance_type in ("learned", "learned_range"):
            raise ValueError(
                f"variance_type={config.variance_type!r} in the scheduler's config is not served: these UNets predict "
                "no variance; set variance_type=None."
            )
    for option in ("use_flow_sigmas", "use_dynamic_shifting"):
        if config.get(option):
            raise ValueError(
                f"{option}=True in the scheduler's config is not served: it is flow matching's, and these UNets are "
                f"diffusion models; set {option}=False."
            )
    if getattr(scheduler, "solver_p", None) is not None:
        raise ValueError(
            f"solver_p={type(scheduler.solver_p).__name__} is not served: the predictor must be UniPC's own; set "
            "solver_p=None."
        )
