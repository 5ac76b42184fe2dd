"""Euler and Euler ancestral: states, gradients and densities, against diffusers' own steps."""

import itertools

import pytest
import stock
import torch
from chains import (
    STABLE_DIFFUSION,
    Denoiser,
    by_diffusers,
    by_table,
    exact_steps,
    guided,
    relative_error,
    table_of,
)
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from diffusers.schedulers import scheduling_euler_ancestral_discrete
from torch.distributions import Normal, kl_divergence

from rftcore.ops.sampler_step import Coefficient, sampler_step

SDXL = {
    **STABLE_DIFFUSION, "clip_sample": False, "interpolation_type": "linear", "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False,
}  # fmt: skip
BOTH = [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler]


@pytest.fixture
def noise():
    return torch.randn(2, 4, 8, 8, dtype=torch.float64)


def assert_equal_chains(model, scheduler, noise, steps, tolerance=1e-12):
    table = table_of(scheduler, steps)
    truth, _ = by_diffusers(model, scheduler, noise, steps)
    states = by_table(model, table, noise)
    assert len(states) == len(truth) == len(table) + 1
    for ours, theirs in zip(states, truth, strict=True):
        assert relative_error(ours, theirs) <= tolerance
    return table


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("options", [
    *({"timestep_spacing": spacing} for spacing in ("linspace", "leading", "trailing")),
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"prediction_type": "v_prediction"},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    {"beta_schedule": "squaredcos_cap_v2"},
])  # fmt: skip
@pytest.mark.parametrize("scheduler", BOTH)
@torch.no_grad()
def test_states_equal_diffusers(monkeypatch, noise, scheduler, options, steps):
    exact_steps(monkeypatch)
    assert_equal_chains(Denoiser(), scheduler(**{**STABLE_DIFFUSION, **options}), noise, steps)


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize("options", [
    {"prediction_type": "sample"},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"interpolation_type": "log_linear"},
    {"interpolation_type": "log_linear", "use_karras_sigmas": True, "timestep_spacing": "trailing"},
    {"final_sigmas_type": "sigma_min"},
    {"final_sigmas_type": "sigma_min", "timestep_spacing": "leading", "use_karras_sigmas": True},
    {"timestep_type": "continuous", "prediction_type": "v_prediction"},
])  # fmt: skip
@torch.no_grad()
def test_states_of_options_that_euler_alone_has(monkeypatch, noise, options, steps):
    exact_steps(monkeypatch)
    scheduler = EulerDiscreteScheduler(**{**STABLE_DIFFUSION, **options})
    table = assert_equal_chains(Denoiser(), scheduler, noise, steps)
    assert table.timesteps.dtype == torch.float32
    assert not any(table.stochastic)


@torch.no_grad()
def test_ancestral_of_a_predicted_sample(noise):
    """diffusers' class refuses it: its steps by k-diffusion's `get_ancestral_step`, in fp64."""
    model = Denoiser()
    scheduler = EulerAncestralDiscreteScheduler(**STABLE_DIFFUSION, prediction_type="sample")
    table = table_of(scheduler, 5)
    states = by_table(model, table, noise)
    scheduler.set_timesteps(5)
    sigmas = scheduler.sigmas.double()
    generator = torch.Generator().manual_seed(7)
    for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        x = states[step]
        x0 = guided(model(x / (sigma**2 + 1).sqrt(), table.timesteps[step]))
        up = (following**2 * (sigma**2 - following**2) / sigma**2).sqrt()
        down = (following**2 - up**2).sqrt()
        x = x + (x - x0) / sigma * (down - sigma) + up * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        assert relative_error(states[step + 1], x) <= 1e-12


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", BOTH)
@torch.no_grad()
def test_fp32_is_as_near_to_the_truth_as_diffusers(noise, scheduler, prediction_type):
    model = Denoiser()
    scheduler = scheduler.from_config({**SDXL, "prediction_type": prediction_type})
    table = table_of(scheduler, 20)
    truth = by_table(model, table, noise.float().double(), drawn_in=torch.float32)
    model, noise = model.float(), noise.float()
    ours = by_table(model, table, noise)
    theirs, _ = by_diffusers(model, scheduler, noise, 20, fp64=False)
    assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth)


@pytest.mark.parametrize("scheduler", BOTH)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_gradients_equal_plain_autograd(monkeypatch, make_unet, conditioning, noise, scheduler, prediction_type, kind):
    exact_steps(monkeypatch)
    unet, branches = make_unet(kind), [conditioning(kind, guided=False) for _ in range(2)]
    parameters = [p for p in unet.parameters() if p.requires_grad]

    def model(x, t):
        return torch.cat([stock.unet_output(unet, x, t, branch, 1.0) for branch in branches])

    scheduler = scheduler.from_config({**SDXL, "prediction_type": prediction_type})
    noise.requires_grad_()
    weight = torch.randn_like(noise)
    leaves = [noise, *parameters]
    truth, _ = by_diffusers(model, scheduler, noise, 4)
    ours = by_table(model, table_of(scheduler, 4), noise)
    assert relative_error(ours, truth) <= 1e-12
    truth, ours = (torch.autograd.grad((states[-1] * weight).sum(), leaves) for states in (truth, ours))
    assert all(gradient.abs().max() > 0 for gradient in truth)
    flat = [torch.cat([gradient.flatten() for gradient in gradients[1:]]) for gradients in (ours, truth)]
    assert relative_error(*flat) <= 1e-11
    assert relative_error(ours[0], truth[0]) <= 1e-11


def ancestral_densities(model, scheduler, states):
    """Of every step but the last: Normal(mean, sigma_up), the mean by diffusers' step without its noise."""
    scheduler.set_timesteps(len(states) - 1)
    scheduler.sigmas = scheduler.sigmas.double()
    for step, t in enumerate(scheduler.timesteps[:-1]):
        output = guided(model(scheduler.scale_model_input(states[step], t), t))
        sigma, following = scheduler.sigmas[step], scheduler.sigmas[step + 1]
        up = (following**2 * (sigma**2 - following**2) / sigma**2).sqrt()
        yield Normal(scheduler.step(output, t, states[step]).prev_sample, up), output


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_log_prob_and_divergences(monkeypatch, noise, prediction_type):
    scheduler = EulerAncestralDiscreteScheduler.from_config({**SDXL, "prediction_type": prediction_type})
    table = table_of(scheduler, 6)
    assert table.stochastic == (True,) * 5 + (False,)
    model, reference = Denoiser(), Denoiser()
    states = by_table(model, table, noise).detach()
    exact_steps(monkeypatch)
    monkeypatch.setattr(scheduling_euler_ancestral_discrete, "randn_tensor", lambda shape, **_: torch.zeros(shape))
    densities = list(ancestral_densities(model, scheduler, states))
    references = list(ancestral_densities(reference, scheduler, states))
    parameters = list(model.parameters())
    for step, ((density, output), (other, other_output)) in enumerate(zip(densities, references, strict=True)):
        x = states[step]
        scaled, t = x * table.input_scales[step], table.timesteps[step]
        scores = [
            sampler_step(
                x, model(scaled, t), table.coefficients[step], next_sample=states[step + 1],
                reference_output=reference(scaled, t), divergence=divergence,
            )
            for divergence in ("exact", "uniform")
        ]  # fmt: skip
        expected = density.log_prob(states[step + 1]).mean((1, 2, 3))
        torch.testing.assert_close(scores[0].log_prob, expected, rtol=1e-10, atol=1e-10)
        exact = kl_divergence(density, other).mean((1, 2, 3))
        torch.testing.assert_close(scores[0].divergence, exact, rtol=1e-10, atol=1e-12)
        # eps = (x - x0) / sigma of each.
        sigma = scheduler.sigmas[step]
        eps, other_eps = (
            m if prediction_type == "epsilon" else x * sigma / (sigma**2 + 1) + m / (sigma**2 + 1).sqrt()
            for m in (output, other_output)
        )
        uniform = (eps - other_eps).pow(2).mean((1, 2, 3))
        torch.testing.assert_close(scores[1].divergence, uniform, rtol=1e-10, atol=1e-12)
        ours = torch.autograd.grad((scores[0].log_prob + scores[1].divergence).sum(), parameters)
        truth = torch.autograd.grad((expected + uniform).sum(), parameters)
        for a, b in zip(ours, truth, strict=True):
            assert relative_error(a, b) <= 1e-10


@pytest.mark.parametrize("options", [{}, {"prediction_type": "v_prediction"}])
@pytest.mark.parametrize("scheduler", BOTH)
@torch.no_grad()
def test_stopped_early(monkeypatch, noise, scheduler, options):
    exact_steps(monkeypatch)
    model, scheduler = Denoiser(), scheduler.from_config({**SDXL, **options})
    states, predicted = by_diffusers(model, scheduler, noise, 9)
    table = table_of(scheduler, 9)
    for stop in (1, 4, 9):
        stopped = table.stopped(stop, "x0")
        assert len(stopped) == len(stopped.input_scales) == stop and not stopped.stochastic[-1]
        assert relative_error(by_table(model, stopped, noise)[-1], predicted[stop - 1]) <= 1e-11
        assert relative_error(by_table(model, table.stopped(stop, "latents"), noise), states[: stop + 1]) <= 1e-12


@pytest.mark.parametrize("scheduler", BOTH)
def test_sdxls_published_configuration(scheduler):
    scheduler = scheduler.from_config(SDXL)
    table = table_of(scheduler, 50)
    assert table.timesteps.tolist() == list(range(981, 0, -20))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    a = (1 - betas).cumprod(0)[range(981, 0, -20)]
    torch.testing.assert_close(table.input_scales, a.sqrt(), rtol=1e-5, atol=0)
    assert table.init_noise_sigma == pytest.approx(a[0].item() ** -0.5, rel=1e-5)
    sigmas = ((1 - a) / a).sqrt()
    following = torch.cat([sigmas[1:], torch.zeros(1)])
    if any(table.stochastic):
        expected = following * (1 - (following / sigmas) ** 2).sqrt()
        torch.testing.assert_close(table.coefficients[:, Coefficient.SIGMA], expected, rtol=1e-4, atol=0)
        following = following**2 / sigmas
    torch.testing.assert_close(
        table.coefficients[:, Coefficient.MEAN_FROM_OUTPUT], following - sigmas, rtol=1e-4, atol=1e-6
    )
    assert table.differentiable and table.reason == "" and table.eta is None


def test_options_of_another_class_are_not_read():
    """A converted config carries DDIM's clip_sample and thresholding along, which Euler's step does not know."""
    ddim = DDIMScheduler(**STABLE_DIFFUSION, clip_sample=True, thresholding=True)
    scheduler = EulerDiscreteScheduler.from_config(ddim.config)
    assert scheduler.config.clip_sample and scheduler.config.thresholding
    assert table_of(scheduler, 3).coefficients[:, Coefficient.CLIP].isinf().all()
