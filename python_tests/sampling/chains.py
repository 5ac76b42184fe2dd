"""One chain of a small denoiser, by diffusers' own scheduler and by a table: what the schedules' tests compare."""

import copy
import math

import torch
from diffusers.schedulers import (
    scheduling_dpmsolver_multistep,
    scheduling_euler_ancestral_discrete,
    scheduling_euler_discrete,
)
from torch.nn import functional as F

from rftcore.ops.sampler_step import sampler_step
from rftcore.sampling.multistep import next_state
from rftcore.sampling.schedule import step_table

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
GUIDANCE = 3.0


class Denoiser(torch.nn.Module):
    """Smooth in the state, the time and its weights; the second half of a batch is of another prompt."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.convolution = torch.nn.Conv2d(4, 4, 3, padding=1, dtype=dtype)
        self.prompt = torch.nn.Parameter(0.3 * torch.randn(4, 1, 1, dtype=dtype))

    def forward(self, x, t):
        negative, positive = torch.cat([x, x]).chunk(2)
        hidden = torch.cat([negative, positive + self.prompt]) * (1 + 0.5 * math.sin(0.01 * float(t)))
        return F.silu(self.convolution(hidden)) + 0.8 * hidden


def guided(outputs, guidance_scale=GUIDANCE):
    negative, positive = outputs.chunk(2)
    return negative + guidance_scale * (positive - negative)


class _Fp64Torch:
    """The torch that a scheduler's module sees, whose float32 is fp64: their steps cast the state to it."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def exact_steps(monkeypatch):
    for module in (scheduling_dpmsolver_multistep, scheduling_euler_ancestral_discrete, scheduling_euler_discrete):
        monkeypatch.setattr(module, "torch", _Fp64Torch())


def by_diffusers(model, scheduler, noise, steps, *, seed=7, fp64=True, **options):
    """Every state (T+1, B, ...) and every x0 that is predicted, the way diffusers' pipelines make them."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    if fp64 and hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    generator = torch.Generator().manual_seed(seed)
    states, predicted = [noise * scheduler.init_noise_sigma], []
    for t in scheduler.timesteps:
        output = guided(model(scheduler.scale_model_input(states[-1], t), t))
        if hasattr(scheduler, "model_outputs"):
            stepped = scheduler.step(output, t, states[-1])
        else:
            stepped = scheduler.step(output, t, states[-1], generator=generator, **options)
        states.append(stepped.prev_sample)
        predicted.append(getattr(stepped, "pred_original_sample", None))
    return torch.stack(states), predicted


def by_table(model, table, noise, *, seed=7, drawn_in=None):
    """Every state (T+1, B, ...), by `sampler_step` and a table; a generator draws other numbers in another dtype."""
    generator = torch.Generator().manual_seed(seed)
    x = noise * table.init_noise_sigma
    states, history = [x], [x]
    coefficients, scales = table.coefficients.to(x.dtype), table.input_scales.to(x.dtype)
    for step, t in enumerate(table.timesteps):
        outputs = model(x * scales[step], t)
        drawn = None
        if table.stochastic[step]:
            drawn = torch.randn(x.shape, generator=generator, dtype=drawn_in or x.dtype).to(x.dtype)
        x = sampler_step(x, outputs, coefficients[step], noise=drawn).next_sample
        if not table.differentiable:
            history.append(x)
            x = next_state(torch.stack(history), table.weights[step, : step + 2].to(x.dtype))
        states.append(x)
    return torch.stack(states)


def table_of(scheduler, steps, *, guidance_scale=GUIDANCE, eta=None, final_step="scheduler"):
    return step_table(scheduler, steps, guidance_scale=guidance_scale, eta=eta, final_step=final_step)


def relative_error(ours, truth):
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()
