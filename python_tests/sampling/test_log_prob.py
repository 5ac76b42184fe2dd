"""Log-probabilities and divergences of a trajectory, against their formulas."""

import math

import pytest
import torch
from stock import unet_output

import rftcore
from rftcore.ops.sampler_step import Coefficient
from rftcore.sampling.adapters import adapters_off

GUIDANCE = 3.0


@pytest.fixture
def rollout(make_unet, make_scheduler, conditioning):
    def make(kind="sd1", dtype=torch.float64, eta=1.0, batch=2, steps=4, **options):
        unet = make_unet(kind, dtype)
        sampler = rftcore.CheckpointedSampler(
            unet, make_scheduler(**options), num_inference_steps=steps, guidance_scale=GUIDANCE, eta=eta
        )
        given = conditioning(kind, batch, dtype)
        with torch.no_grad():
            trajectory = sampler(**given, generator=torch.Generator().manual_seed(1))
        return unet, sampler, given, trajectory

    return make


def by_formula(unet, sampler, given, trajectory, step):
    """(mean, sigma) of algorithms' DDIM step in fp64, epsilon prediction."""
    c = sampler.table.coefficients[step]
    x = trajectory.states[step]
    eps = unet_output(unet, x, trajectory.timesteps[step], given, GUIDANCE)
    x0 = c[Coefficient.X0_FROM_SAMPLE] * x + c[Coefficient.X0_FROM_OUTPUT] * eps
    return c[Coefficient.MEAN_FROM_X0] * x0 + c[Coefficient.MEAN_FROM_OUTPUT] * eps, c[Coefficient.SIGMA]


def test_sigma_of_sd15():
    """t = 981, ..., 1 and sigma .4545, .2877, .0206 (50 steps, eta 1)."""
    from diffusers import DDIMScheduler

    from rftcore.sampling.schedule import step_table

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    for final_step in ("scheduler", "clamp"):
        table = step_table(scheduler, 50, guidance_scale=5.0, eta=1.0, final_step=final_step)
        sigma = table.coefficients[:, Coefficient.SIGMA]
        assert table.timesteps.tolist() == list(range(981, 0, -20))
        assert sigma[[0, 25, -1]].tolist() == pytest.approx([0.4545, 0.2877, 0.0206], abs=6e-3)
    assert sigma[[0, -1]].tolist() == pytest.approx([0.4545, 0.0206], abs=5e-5)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_values_and_gradients(rollout, kind):
    unet, sampler, given, trajectory = rollout(kind)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    steps = [2, 0, 3]
    log_prob, divergence = sampler.log_prob(trajectory, steps)
    assert divergence is None
    expected = []
    for step in steps:
        mean, sigma = by_formula(unet, sampler, given, trajectory, step)
        z = (trajectory.states[step + 1] - mean) / sigma
        expected.append(-0.5 * z.pow(2).flatten(1).mean(1) - sigma.log() - 0.5 * math.log(2 * math.pi))
    expected = torch.stack(expected, dim=1)
    torch.testing.assert_close(log_prob, expected, rtol=1e-11, atol=1e-11)
    weight = torch.randn_like(expected)
    ours = torch.autograd.grad((log_prob * weight).sum(), parameters)
    theirs = torch.autograd.grad((expected * weight).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("reference", ["exact", "uniform"])
@pytest.mark.parametrize("steps", [[1], [0, 3]])
def test_divergence_from_the_base_model(rollout, reference, steps):
    unet, sampler, given, trajectory = rollout()
    parameters = [p for p in unet.parameters() if p.requires_grad]
    flags = [p.requires_grad for p in unet.parameters()]
    log_prob, divergence = sampler.log_prob(trajectory, steps, reference=reference)
    assert [p.requires_grad for p in unet.parameters()] == flags
    expected = []
    for step in steps:
        mean, sigma = by_formula(unet, sampler, given, trajectory, step)
        eps = unet_output(unet, trajectory.states[step], trajectory.timesteps[step], given, GUIDANCE)
        with torch.no_grad(), adapters_off(unet):
            base_mean, _ = by_formula(unet, sampler, given, trajectory, step)
            base_eps = unet_output(unet, trajectory.states[step], trajectory.timesteps[step], given, GUIDANCE)
        difference = (mean - base_mean).pow(2) / (2 * sigma**2) if reference == "exact" else (eps - base_eps).pow(2)
        expected.append(difference.flatten(1).mean(1))
    expected = torch.stack(expected, dim=1)
    assert (expected > 0).all()
    torch.testing.assert_close(divergence, expected, rtol=1e-10, atol=1e-12)
    ours = torch.autograd.grad((divergence + 0.1 * log_prob).sum(), parameters)
    again, _ = sampler.log_prob(trajectory, steps)
    theirs = torch.autograd.grad((expected + 0.1 * again).sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_replayed_before_an_update_the_ratio_is_exactly_one(rollout, dtype, kind):
    _, sampler, _, trajectory = rollout(kind, dtype)
    assert trajectory.states.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    every_step, _ = sampler.log_prob(trajectory, list(range(4)))
    assert torch.equal(every_step, trajectory.log_probs)
    for step in range(4):
        one_step, _ = sampler.log_prob(trajectory, [step])
        assert torch.equal(one_step[:, 0], trajectory.log_probs[:, step])


def test_other_batch_sizes_in_fp32(rollout):
    _, sampler, _, trajectory = rollout(dtype=torch.float32, batch=5)
    for index in range(5):
        with torch.no_grad():
            alone, _ = sampler.log_prob(trajectory[index], list(range(4)))
        assert (alone - trajectory.log_probs[index]).abs().max() <= 1e-5


def test_steps_of_each_samples_own(rollout):
    _, sampler, _, trajectory = rollout()
    steps = torch.tensor([[3, 0], [1, 2]])
    log_prob, _ = sampler.log_prob(trajectory, steps)
    torch.testing.assert_close(log_prob, trajectory.log_probs.gather(1, steps), rtol=1e-12, atol=1e-12)


def test_deterministic_steps(rollout):
    _, sampler, _, trajectory = rollout(eta=0.0)
    assert not trajectory.stochastic.any()
    assert (trajectory.log_probs == 0).all()
    with pytest.raises(ValueError, match=r"steps holds 0, which is deterministic .* sample with eta > 0"):
        sampler.log_prob(trajectory, [0])
    _, sampler, _, trajectory = rollout(set_alpha_to_one=True, steps_offset=0)
    assert trajectory.stochastic.tolist() == [True, True, True, False]
    assert (trajectory.log_probs[:, -1] == 0).all() and trajectory.log_probs.isfinite().all()
    with pytest.raises(ValueError, match=r"steps holds 3.*steps with noise are 0-2"):
        sampler.log_prob(trajectory, [0, 3])


def test_clamped_final_step_is_stochastic(make_unet, make_scheduler, conditioning):
    sampler = rftcore.CheckpointedSampler(
        make_unet(), make_scheduler(set_alpha_to_one=True), num_inference_steps=4, eta=1.0, final_step="clamp"
    )
    with torch.no_grad():
        trajectory = sampler(conditioning("sd1")["prompt_embeds"])
    assert trajectory.stochastic.all()


@pytest.mark.parametrize(("steps", "error", "message"), [
    ([4], IndexError, "steps 0 to 3"),
    ([-1], IndexError, "steps 0 to 3"),
    ([], ValueError, "steps is empty|whole numbers"),
    ([0.5], ValueError, "whole numbers"),
    ([[0], [1], [2]], ValueError, "3 rows for 2 samples"),
])  # fmt: skip
def test_bad_steps(rollout, steps, error, message):
    _, sampler, _, trajectory = rollout()
    with pytest.raises(error, match=message):
        sampler.log_prob(trajectory, steps)


def test_bad_arguments(rollout, make_unet, make_scheduler):
    unet, sampler, given, trajectory = rollout()
    with pytest.raises(ValueError, match="reference='kl'"):
        sampler.log_prob(trajectory, [0], reference="kl")
    other = rftcore.CheckpointedSampler(unet, make_scheduler(), num_inference_steps=4, guidance_scale=2.0, eta=1.0)
    with pytest.raises(ValueError, match="guidance_scale 3.0 and 2.0"):
        other.log_prob(trajectory, [0])
    bare = make_unet(lora=False)
    bare_sampler = rftcore.CheckpointedSampler(
        bare, make_scheduler(), num_inference_steps=4, guidance_scale=GUIDANCE, eta=1.0
    )
    with pytest.raises(ValueError, match="no PEFT adapter"):
        bare_sampler.log_prob(trajectory, [0], reference="exact")
    with torch.inference_mode():
        inferred = sampler(**given)
    with pytest.raises(ValueError, match="inference_mode"):
        sampler.log_prob(inferred, [0])
    with torch.no_grad():
        sampler.log_prob(inferred, [0])


def test_predict(rollout):
    unet, sampler, given, trajectory = rollout()
    x = trajectory.states[1]
    t = trajectory.timesteps[1]
    expected = unet_output(unet, x, t, given, GUIDANCE)
    torch.testing.assert_close(sampler.predict(x, t, **given), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sampler.predict(x, t.expand(2), **given), expected, rtol=1e-12, atol=1e-12)
    assert sampler.predict(x, int(t), **given).requires_grad
    with adapters_off(unet):
        base = unet_output(unet, x, t, given, GUIDANCE)
    assert (base - expected).abs().max() > 1e-6
    torch.testing.assert_close(sampler.predict(x, t, **given, adapter=False), base, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="batch size 1"):
        sampler.predict(x[:1], t, **given)
