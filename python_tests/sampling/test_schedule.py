"""Which schedulers and options are served, what the others are answered, and DDPM's and DDIM's rows."""

import itertools

import diffusers
import pytest
import torch
from chains import STABLE_DIFFUSION, Denoiser, by_diffusers, by_table, relative_error, table_of
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
from rftcore.sampling.multistep import MultistepTable
from rftcore.sampling.prediction import prediction
from rftcore.sampling.schedule import StepTable

WITH_GRADIENT = (DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, LCMScheduler)
SAMPLING_ONLY = (DPMSolverMultistepScheduler, UniPCMultistepScheduler)
EVERY = (*WITH_GRADIENT, *SAMPLING_ONLY)


def refusal(scheduler, steps=4, **arguments):
    with pytest.raises(ValueError) as error:
        table_of(scheduler, steps, **arguments)
    return str(error.value)


@pytest.mark.parametrize("scheduler", EVERY)
def test_every_class_that_is_served(scheduler):
    table = table_of(scheduler(**STABLE_DIFFUSION), 5)
    assert isinstance(table, StepTable if scheduler in WITH_GRADIENT else MultistepTable)
    assert table.differentiable == (scheduler in WITH_GRADIENT) and bool(table.reason) != table.differentiable
    assert len(table) == len(table.timesteps) == len(table.stochastic) == 5
    assert table.coefficients.dtype == table.input_scales.dtype == torch.float64
    assert (table.input_scales == 1).all() == (
        scheduler not in (EulerDiscreteScheduler, EulerAncestralDiscreteScheduler)
    )
    assert (table.coefficients[:, Coefficient.GUIDANCE] == 3.0).all()


@pytest.mark.parametrize("scheduler", [diffusers.HeunDiscreteScheduler, diffusers.PNDMScheduler])
def test_unknown_classes_are_told_what_is_served(scheduler):
    message = refusal(scheduler(**STABLE_DIFFUSION))
    assert message == (
        f"scheduler={scheduler.__name__} is not served; allowed are DDIMScheduler, DDPMScheduler, "
        "EulerDiscreteScheduler, EulerAncestralDiscreteScheduler, LCMScheduler with gradient, and "
        "DPMSolverMultistepScheduler, UniPCMultistepScheduler for sampling only. Convert with e.g. "
        "DDIMScheduler.from_config(scheduler.config)."
    )


@pytest.mark.parametrize(("scheduler", "method"), [
    *((scheduler, "step") for scheduler in EVERY),
    (DDIMScheduler, "_get_variance"),
    (DDPMScheduler, "previous_timestep"),
    (EulerDiscreteScheduler, "scale_model_input"),
    (EulerAncestralDiscreteScheduler, "init_noise_sigma"),
    (DPMSolverMultistepScheduler, "convert_model_output"),
    (UniPCMultistepScheduler, "multistep_uni_c_bh_update"),
])  # fmt: skip
def test_a_subclass_with_maths_of_its_own(scheduler, method):
    table_of(type("Renamed", (scheduler,), {})(**STABLE_DIFFUSION), 3)
    other = type("Mine", (scheduler,), {method: property(lambda self: 1.0) if "sigma" in method else lambda self: 1.0})
    assert "scheduler=Mine is not served" in refusal(other(**STABLE_DIFFUSION))
    patched = scheduler(**STABLE_DIFFUSION)
    if "sigma" not in method:
        setattr(patched, method, lambda *args: None)
        assert f"scheduler={scheduler.__name__} is not served" in refusal(patched)


@pytest.mark.parametrize(("scheduler", "why"), [
    (DDPMScheduler, "whose noise is its variance_type"),
    (EulerDiscreteScheduler, "which draws no noise"),
    (EulerAncestralDiscreteScheduler, "whose noise is what its sigmas leave"),
    (DPMSolverMultistepScheduler, "which draws no noise"),
    (UniPCMultistepScheduler, "which draws no noise"),
])  # fmt: skip
def test_arguments_of_ddim(scheduler, why):
    name, scheduler = scheduler.__name__, scheduler(**STABLE_DIFFUSION)
    message = refusal(scheduler, eta=0.0)
    assert message.startswith(f"eta=0.0 has no meaning for {name}, {why}; leave eta=None, or use DDIMScheduler")
    message = refusal(scheduler, final_step="clamp")
    assert message == f"final_step='clamp' is DDIM's; {name} takes final_step='scheduler'."
    assert "final_step='last' is not known; allowed are 'scheduler', 'clamp'" in refusal(scheduler, final_step="last")


@pytest.mark.parametrize("scheduler", EVERY)
def test_steps_and_options_that_are_not_served(scheduler):
    for steps in (0, -1, 1001, 2.5, True, "4"):
        message = refusal(scheduler(**STABLE_DIFFUSION), steps)
        assert f"num_inference_steps={steps!r} must be a whole number from 1 to 1000" in message
    message = refusal(scheduler(**STABLE_DIFFUSION, prediction_type="flow"))
    assert "prediction_type='flow' in the scheduler's config is not known; allowed are 'epsilon'" in message
    if scheduler is LCMScheduler:  # which knows no spacing
        return
    # numpy.arange(1000, 0, -1000 / 61) has 62 elements.
    message = refusal(scheduler(**STABLE_DIFFUSION, timestep_spacing="trailing"), 61)
    assert message.startswith("num_inference_steps=61 with timestep_spacing='trailing' gives the timestep -1")


@pytest.mark.parametrize("scheduler", WITH_GRADIENT[:-1])
def test_a_step_beyond_those_trained(scheduler):
    message = refusal(scheduler(**STABLE_DIFFUSION, timestep_spacing="leading", steps_offset=1), 1000)
    assert message.startswith("num_inference_steps=1000 with steps_offset=1 gives the timestep 1000")


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
def test_no_x0_at_zero_terminal_snr(scheduler):
    options = {**STABLE_DIFFUSION, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    message = refusal(scheduler(**options))
    assert "not finite at t=999: prediction_type='epsilon'" in message
    table_of(scheduler(**options, prediction_type="v_prediction"), 4)


@pytest.mark.parametrize("scheduler", EVERY)
def test_a_fingerprint_for_each_chain(scheduler):
    chains = [
        table_of(scheduler(**STABLE_DIFFUSION, **options), steps, guidance_scale=guidance)
        for options, steps, guidance in (
            ({}, 4, 3.0), ({}, 4, 3.0), ({}, 5, 3.0), ({}, 4, 2.0), ({"prediction_type": "v_prediction"}, 4, 3.0),
        )
    ]  # fmt: skip
    assert chains[0].fingerprint == chains[1].fingerprint
    assert len({chain.fingerprint for chain in chains}) == 4


@pytest.mark.parametrize(("prediction_type", "model_output"), [
    ("epsilon", lambda x0, eps, signal, noise: eps),
    ("v_prediction", lambda x0, eps, signal, noise: signal * eps - noise * x0),
    ("sample", lambda x0, eps, signal, noise: x0),
])  # fmt: skip
@pytest.mark.parametrize("exploding", [False, True])
def test_predictions(prediction_type, model_output, exploding):
    """From x = (signal x0 + noise eps) / scale and the output, x0 and eps again."""
    signal, noise, x0, eps = 0.6, 0.8, -1.7, 0.4
    scale = signal if exploding else 1.0
    x, m = (signal * x0 + noise * eps) / scale, model_output(x0, eps, signal, noise)
    found = prediction(prediction_type, signal, noise, scale)
    assert found.x0_from_sample * x + found.x0_from_output * m == pytest.approx(x0, rel=1e-13)
    assert found.eps_from_sample * x + found.eps_from_output * m == pytest.approx(eps, rel=1e-13)


@pytest.mark.parametrize(("variance_type", "clip"), [
    ("fixed_small", False), ("fixed_small", True), ("fixed_small_log", False), ("fixed_large", True),
])  # fmt: skip
@pytest.mark.parametrize(("spacing", "prediction_type"), itertools.product(
    ("linspace", "leading", "trailing"), ("epsilon", "v_prediction", "sample"),
))  # fmt: skip
@torch.no_grad()
def test_ddpm_equals_diffusers(make_scheduler, variance_type, clip, spacing, prediction_type):
    """The unconditional pipelines' betas (clipped) and SDXL's; where sigma = 0, diffusers may add noise of 1e-10."""
    betas = {"steps_offset": 1 if spacing == "leading" else 0}
    if clip:
        betas = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample_range": 0.9}
    scheduler = make_scheduler(
        "ddpm", variance_type=variance_type, clip_sample=clip, timestep_spacing=spacing,
        prediction_type=prediction_type, **betas,
    )  # fmt: skip
    model, noise = Denoiser(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    for steps in (1, 7, 30):
        truth, _ = by_diffusers(model, scheduler, noise, steps)
        assert relative_error(by_table(model, table_of(scheduler, steps), noise), truth) <= 1e-9


@pytest.mark.parametrize("steps", [1, 7, 30, 333])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@torch.no_grad()
def test_ddim_of_odd_step_counts(make_scheduler, spacing, steps):
    scheduler = make_scheduler("ddim", timestep_spacing=spacing, clip_sample=True)
    model, noise = Denoiser(), torch.randn(1, 4, 4, 4, dtype=torch.float64)
    for eta in (0.0, 0.7):
        truth, _ = by_diffusers(model, scheduler, noise, steps, eta=eta)
        assert relative_error(by_table(model, table_of(scheduler, steps, eta=eta), noise), truth) <= 1e-11


@pytest.mark.parametrize("scheduler", [DDPMScheduler, EulerAncestralDiscreteScheduler])
@pytest.mark.parametrize("output", ["latents", "x0"])
def test_a_chain_that_is_stopped_early(scheduler, output):
    """Its first steps; where it ends on x0 the last one's mean is x0, without noise."""
    whole = table_of(scheduler(**STABLE_DIFFUSION), 5)
    before = whole.coefficients.clone()
    table = whole.stopped(3, output)
    assert len(table) == len(table.coefficients) == 3
    assert torch.equal(table.timesteps, whole.timesteps[:3])
    assert torch.equal(table.input_scales, whole.input_scales[:3])
    if output == "x0":
        c = Coefficient
        before[2, [c.MEAN_FROM_SAMPLE, c.MEAN_FROM_OUTPUT, c.SIGMA]] = 0
        before[2, c.MEAN_FROM_X0] = 1
    assert torch.equal(table.coefficients, before[:3]) and torch.equal(whole.coefficients[3:], before[3:])
    assert table.stochastic == (True, True, output != "x0") and whole.stochastic[:3] == (True,) * 3
    assert whole.coefficients[2, Coefficient.SIGMA] > 0
