"""Euler's and the multistep schedulers through the sampler itself: diffusers' own loops and plain autograd."""

import pytest
import stock
import torch
from chains import exact_steps
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

import rftcore
from rftcore.sampling import GradientPath, Plan

STEPS, BATCH = 4, 2
NOISE_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
EULERS = (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler)
MULTISTEPS = (DPMSolverMultistepScheduler, UniPCMultistepScheduler)


class InFp64:
    """A scheduler for `stock.sample`: states start at its sigma, models see them scaled, sigmas are fp64."""

    def __init__(self, scheduler):
        self._scheduler = scheduler

    def set_timesteps(self, steps):
        self._scheduler.set_timesteps(steps)
        self._scheduler.sigmas = self._scheduler.sigmas.double()

    def step(self, *args, generator, **kwargs):
        # Not all of them take one.
        drawing = {"generator": generator} if isinstance(self._scheduler, EULERS) else {}
        return self._scheduler.step(*args, **drawing, **kwargs)

    def __getattr__(self, name):
        return getattr(self._scheduler, name)


class Scaled(torch.nn.Module):
    """A UNet that sees the scheduler's states as diffusers' pipelines give them."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.unet, self.scheduler = unet, scheduler

    def forward(self, x, t, **kwargs):
        return self.unet(self.scheduler.scale_model_input(x, t), t, **kwargs)


@pytest.fixture
def exact(monkeypatch):
    exact_steps(monkeypatch)


def by_diffusers(unet, scheduler, given, noise, guidance_scale=2.0):
    scheduler = InFp64(scheduler)
    scheduler.set_timesteps(STEPS)
    x = noise * scheduler.init_noise_sigma
    return stock.sample(
        Scaled(unet, scheduler), scheduler, x, given, steps=STEPS, guidance_scale=guidance_scale, backprop_steps=STEPS,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip


@pytest.mark.covering(1)
@pytest.mark.parametrize("replayed", [False, True], ids=["stored", "replayed"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("scheduler", EULERS)
def test_eulers_are_plain_autograd(exact, make_unet, conditioning, scheduler, kind, replayed):
    unet, given = rftcore.accelerate(make_unet(kind)), conditioning(kind, BATCH)
    noise = torch.randn(BATCH, 4, 8, 8, dtype=torch.float64)
    sampler = rftcore.CheckpointedSampler(
        unet, scheduler(**NOISE_SCHEDULE), num_inference_steps=STEPS, guidance_scale=2.0,
        plan=Plan.replayed(["full"] * STEPS, BATCH) if replayed else None,
    )  # fmt: skip
    parameters = [p for p in unet.parameters() if p.requires_grad]
    latents = sampler(**given, latents=noise, generator=torch.Generator().manual_seed(3)).latents
    found = torch.autograd.grad(latents.square().sum(), parameters)
    expected = by_diffusers(rftcore.restore(unet), scheduler(**NOISE_SCHEDULE), given, noise)
    torch.testing.assert_close(latents, expected, rtol=1e-11, atol=1e-11)
    for ours, theirs in zip(found, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
        assert (ours - theirs).norm() <= 1e-11 * theirs.norm() + 1e-13


@pytest.mark.parametrize("scheduler", MULTISTEPS)
def test_multistep_schedulers_sample(exact, make_unet, conditioning, scheduler):
    unet, given = rftcore.accelerate(make_unet()), conditioning("sd1", BATCH)
    noise = torch.randn(BATCH, 4, 8, 8, dtype=torch.float64)
    sampler = rftcore.CheckpointedSampler(
        unet, scheduler(**NOISE_SCHEDULE), num_inference_steps=STEPS, guidance_scale=2.0, backprop_steps=0
    )
    trajectory = sampler(**given, latents=noise)
    with torch.no_grad():
        expected = by_diffusers(unet, scheduler(**NOISE_SCHEDULE), given, noise)
    torch.testing.assert_close(trajectory.latents, expected, rtol=1e-9, atol=1e-9)
    assert not trajectory.stochastic.any() and not trajectory.log_probs.any()


@pytest.mark.parametrize("scheduler", MULTISTEPS)
def test_what_multistep_schedulers_have_not(make_unet, conditioning, scheduler):
    unet, given = make_unet(), conditioning("sd1", BATCH)
    options = {"num_inference_steps": STEPS, "guidance_scale": 2.0}
    refused = pytest.raises(ValueError, match="whose order or noise cannot be replayed.*backprop_steps=0, or convert")
    with refused:
        rftcore.CheckpointedSampler(unet, scheduler(**NOISE_SCHEDULE), backprop_steps=2, **options)
    with refused:
        path = GradientPath(("none",) * (STEPS - 1) + ("full",))
        rftcore.CheckpointedSampler(unet, scheduler(**NOISE_SCHEDULE), gradient_path=path, **options)
    sampler = rftcore.CheckpointedSampler(unet, scheduler(**NOISE_SCHEDULE), **options)
    with refused:
        sampler(**given)
    with torch.no_grad():
        trajectory = sampler(**given)
    with refused:
        sampler.log_prob(trajectory, [0])


def test_ancestral_steps_are_scored_again(make_unet, conditioning):
    unet, given = make_unet(), conditioning("sd1", BATCH)
    sampler = rftcore.CheckpointedSampler(
        unet, EulerAncestralDiscreteScheduler(**NOISE_SCHEDULE), num_inference_steps=STEPS, guidance_scale=2.0
    )
    with torch.no_grad():
        trajectory = sampler(**given)
        again, _ = sampler.log_prob(trajectory, range(STEPS - 1))
    assert torch.equal(again, trajectory.log_probs[:, :-1])
    assert trajectory.stochastic.tolist() == [True] * (STEPS - 1) + [False]
    with pytest.raises(ValueError, match="deterministic"):
        sampler.log_prob(trajectory, [STEPS - 1])


def test_predict_scales_a_state_as_its_step_does(make_unet, conditioning):
    unet, given = make_unet(), conditioning("sd1", BATCH)
    scheduler = EulerDiscreteScheduler(**NOISE_SCHEDULE)
    sampler = rftcore.CheckpointedSampler(unet, scheduler, num_inference_steps=STEPS, guidance_scale=2.0)
    x = torch.randn(BATCH, 4, 8, 8, dtype=torch.float64)
    scheduler.set_timesteps(STEPS)
    t = scheduler.timesteps[1]
    expected = stock.unet_output(unet, x / (scheduler.sigmas[1].double() ** 2 + 1) ** 0.5, t, given, 2.0)
    with torch.no_grad():
        torch.testing.assert_close(sampler.predict(x, t, **given), expected, rtol=1e-6, atol=1e-8)
        assert sampler.predict(x, 0.5, **given).isnan().all(), "a time of no step has no scale"


def test_a_merged_rollout_is_scored_again_before_it_is_trained_on(make_unet, make_scheduler, conditioning):
    unet, given = make_unet(dtype=torch.float32), conditioning("sd1", BATCH, dtype=torch.float32)
    sampler = rftcore.CheckpointedSampler(
        unet, make_scheduler(), num_inference_steps=STEPS, guidance_scale=2.0, eta=1.0
    )
    with pytest.raises(ValueError, match="merged=True under grad mode"):
        sampler(**given, merged=True)
    with torch.no_grad():
        rollout = sampler(**given, merged=True, generator=torch.Generator().manual_seed(3))
        assert rollout.settings["merged"]
        rescored = sampler.rescored(rollout)
        steps = [step for step, noisy in enumerate(rescored.stochastic.tolist()) if noisy]
        again, _ = sampler.log_prob(rescored, steps)
    assert not rescored.settings["merged"]
    assert torch.equal(again, rescored.log_probs[:, steps]), "the ratio is exactly 1"
    assert not torch.equal(rollout.log_probs, rescored.log_probs)
    torch.testing.assert_close(rollout.log_probs, rescored.log_probs, rtol=1e-3, atol=1e-3)
