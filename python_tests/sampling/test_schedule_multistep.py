"""DPM-Solver and UniPC as tables of weights, against diffusers' own steps."""

import copy
import itertools

import pytest
import torch
from chains import STABLE_DIFFUSION, Denoiser, by_diffusers, by_table, exact_steps, relative_error, table_of
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from rftcore.sampling.multistep import next_state

# What stable-diffusion-v1-5's scheduler folder holds.
SD15 = {
    **STABLE_DIFFUSION, "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip
DPM, UNIPC = DPMSolverMultistepScheduler, UniPCMultistepScheduler
NOISE = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}


@pytest.fixture
def noise():
    return torch.randn(2, 4, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 17])
@pytest.mark.parametrize(("scheduler", "options"), [
    *((DPM, {"solver_order": order, "prediction_type": kind})
      for order, kind in itertools.product((1, 2, 3), ("epsilon", "v_prediction", "sample"))),
    *((DPM, {**NOISE, "solver_order": order, "prediction_type": kind})
      for order, kind in itertools.product((1, 2, 3), ("epsilon", "v_prediction", "sample"))),
    *((UNIPC, {"solver_order": order, "prediction_type": kind})
      for order, kind in itertools.product((1, 2, 3), ("epsilon", "v_prediction", "sample"))),
    (DPM, {"solver_type": "heun"}),
    (DPM, {**NOISE, "solver_type": "heun"}),
    (DPM, {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    (DPM, {"solver_order": 3, "euler_at_final": True, "final_sigmas_type": "sigma_min"}),
    (DPM, {"use_karras_sigmas": True}),
    (DPM, {"use_exponential_sigmas": True}),
    (DPM, {"use_beta_sigmas": True}),
    (DPM, {"use_lu_lambdas": True}),
    (DPM, {"timestep_spacing": "leading", "steps_offset": 1}),
    (DPM, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    (DPM, {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1, "timestep_spacing": "trailing"}),
    (UNIPC, {"solver_order": 3, "solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    (UNIPC, {"solver_order": 3, "predict_x0": False, "final_sigmas_type": "sigma_min"}),
    (UNIPC, {"solver_order": 3, "lower_order_final": False, "final_sigmas_type": "sigma_min"}),
    (UNIPC, {"disable_corrector": [0, 1, 5]}),
    (UNIPC, {"use_karras_sigmas": True}),
    (UNIPC, {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
])  # fmt: skip
@torch.no_grad()
def test_states_equal_diffusers(monkeypatch, noise, scheduler, options, steps):
    exact_steps(monkeypatch)
    model, scheduler = Denoiser(), scheduler(**{**STABLE_DIFFUSION, **options})
    table = table_of(scheduler, steps)
    truth, _ = by_diffusers(model, scheduler, noise, steps)
    states = by_table(model, table, noise)
    assert len(states) == len(truth) == len(table) + 1
    for ours, theirs in zip(states, truth, strict=True):
        assert relative_error(ours, theirs) <= 1e-10


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("scheduler", "options"), [
    (DPM, {}), (DPM, {"solver_order": 3}), (DPM, {"use_karras_sigmas": True}), (DPM, NOISE),
    (UNIPC, {}), (UNIPC, {"solver_order": 3}),
])  # fmt: skip
@torch.no_grad()
def test_fp32_is_as_near_to_the_truth_as_diffusers(monkeypatch, noise, scheduler, options, prediction_type, steps):
    model, scheduler = Denoiser(), scheduler.from_config({**SD15, **options, "prediction_type": prediction_type})
    table = table_of(scheduler, steps)
    with monkeypatch.context() as patched:
        exact_steps(patched)
        truth, _ = by_diffusers(model, scheduler, noise.float().double(), steps)
    model, noise = model.float(), noise.float()
    ours = by_table(model, table, noise)
    theirs, _ = by_diffusers(model, scheduler, noise, steps, fp64=False)
    assert relative_error(ours[-1], truth[-1]) <= 2 * relative_error(theirs[-1], truth[-1])
    assert relative_error(ours, truth) <= 2 * relative_error(theirs, truth)


@pytest.mark.parametrize(("scheduler", "options"), [
    (DPM, {"use_karras_sigmas": True}), (UNIPC, {"solver_order": 3}), (DPM, {"prediction_type": "v_prediction"}),
])  # fmt: skip
@torch.no_grad()
def test_stopped_early(noise, scheduler, options):
    model = Denoiser()
    scheduler = scheduler.from_config({**SD15, **options})
    table = table_of(scheduler, 8)
    states = by_table(model, table, noise)
    copied = copy.deepcopy(scheduler)
    copied.set_timesteps(8)
    for stop in (1, 5, 8):
        stopped = table.stopped(stop, "latents")
        assert len(stopped) == len(stopped.stochastic) == stop
        assert torch.equal(by_table(model, stopped, noise), states[: stop + 1])
        *before, x0 = by_table(model, table.stopped(stop, "x0"), noise)
        assert torch.equal(torch.stack(before), states[:stop])
        # x = (x0 + sigma eps) / sqrt(1 + sigma^2), eps and v being what diffusers' schedulers mean by them.
        x, sigma = states[stop - 1], copied.sigmas[stop - 1].double()
        negative, positive = model(x, copied.timesteps[stop - 1]).chunk(2)
        output = negative + 3.0 * (positive - negative)
        scale = (1 + sigma**2).sqrt()
        if options.get("prediction_type") == "v_prediction":
            expected = x / scale - output * sigma / scale
        else:
            expected = x * scale - output * sigma
        assert relative_error(x0, expected) <= 1e-12


def test_sd15s_published_configuration():
    for scheduler in (DPM, UNIPC):
        table = table_of(scheduler.from_config(SD15), 20)
        assert table.timesteps.tolist() == torch.linspace(0, 999, 21).round().int().flip(0)[:-1].tolist()
        assert table.init_noise_sigma == 1.0 and torch.equal(table.input_scales, torch.ones(20, dtype=torch.float64))
        # The last sigma is 0: what is left is the last x0.
        torch.testing.assert_close(table.weights[-1], torch.eye(21, dtype=torch.float64)[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("scheduler", [DPM, UNIPC])
def test_an_x0_that_never_changes_is_reached_exactly(scheduler, order):
    """State i of signal a and noise s is then a_i x0 + (s_i / s_0) (x_0 - a_0 x0), whatever the order."""
    scheduler = scheduler.from_config(SD15, solver_order=order)
    table = table_of(scheduler, 12)
    scheduler.set_timesteps(12)
    sigmas = scheduler.sigmas.double()
    a, s = 1 / (1 + sigmas**2).sqrt(), sigmas / (1 + sigmas**2).sqrt()
    torch.testing.assert_close(table.weights[:, 0], s[1:] / s[0], rtol=1e-11, atol=1e-12)
    expected = a[1:] - a[0] * s[1:] / s[0]
    torch.testing.assert_close(table.weights[:, 1:].sum(1), expected, rtol=1e-11, atol=1e-12)
    assert table.weights.triu(2).abs().max() == 0


def test_weights_of_the_first_order():
    """DDIM's steps: x' = (s'/s) x + (a' - a s'/s) x0, of signal a and noise s."""
    scheduler = DPM(**STABLE_DIFFUSION, solver_order=1)
    table = table_of(scheduler, 5)
    scheduler.set_timesteps(5)
    sigmas = scheduler.sigmas.double()
    a, s = 1 / (1 + sigmas**2).sqrt(), sigmas / (1 + sigmas**2).sqrt()
    row = torch.zeros(6, dtype=torch.float64)
    row[0] = 1.0
    for step in range(5):
        row = row * s[step + 1] / s[step]
        row[step + 1] = a[step + 1] - a[step] * s[step + 1] / s[step]
        torch.testing.assert_close(table.weights[step], row, rtol=1e-12, atol=1e-14)


def test_two_timesteps_rounded_to_the_same(noise):
    """diffusers' own loop leaves the sigmas' end there, unless it is told where to begin."""
    scheduler = DPM(**STABLE_DIFFUSION, use_karras_sigmas=True)
    copied = copy.deepcopy(scheduler)
    copied.set_timesteps(400)
    assert (copied.timesteps[:-1] == copied.timesteps[1:]).any()
    table = table_of(scheduler, 400)
    assert len(table) == 400 and table.weights.isfinite().all()


def test_next_state():
    history, weights = torch.randn(3, 2, 4, 5), torch.randn(3)
    expected = torch.einsum("k,k...->...", weights.double(), history.double())
    torch.testing.assert_close(next_state(history, weights), expected.float(), rtol=1e-5, atol=1e-6)
    assert next_state(history.double(), weights.double()).dtype == torch.float64


def test_is_for_sampling_only():
    for scheduler in (DPM, UNIPC):
        table = table_of(scheduler.from_config(SD15), 4)
        assert not table.differentiable and table.eta is None and table.stochastic == (False,) * 4
        assert table.reason.startswith(
            f"scheduler={scheduler.__name__} is a scheduler whose order or noise cannot be replayed"
        )
        assert "backprop_steps=0" in table.reason


def test_scheduler_is_not_changed():
    scheduler = UNIPC.from_config(SD15)
    sigmas, config = scheduler.sigmas.clone(), dict(scheduler.config)
    table_of(scheduler, 4)
    assert torch.equal(scheduler.sigmas, sigmas) and dict(scheduler.config) == config
    assert scheduler.num_inference_steps is None and scheduler.model_outputs == [None, None]


def test_fingerprint():
    tables = [table_of(DPM.from_config(SD15, **options), 6) for options in ({}, {}, {"solver_order": 3})]
    assert tables[0].fingerprint == tables[1].fingerprint != tables[2].fingerprint
    assert tables[0].fingerprint != table_of(DPM.from_config(SD15), 6, guidance_scale=2.0).fingerprint


@pytest.mark.parametrize(("scheduler", "options", "message"), [
    (DPM, {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type='sde-dpmsolver\\+\\+' .* noise cannot be replayed; "
     "allowed are 'dpmsolver\\+\\+', 'dpmsolver'.*EulerAncestral"),
    (DPM, {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}, "algorithm_type='sde-dpmsolver'"),
    (DPM, {"thresholding": True}, "thresholding=True"),
    (UNIPC, {"thresholding": True}, "thresholding=True"),
    (DPM, {"variance_type": "learned_range"}, "variance_type='learned_range'.* set variance_type=None"),
    (DPM, {"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
    (DPM, {"use_flow_sigmas": True}, "use_flow_sigmas=True .* flow matching's"),
    (UNIPC, {"use_flow_sigmas": True}, "use_flow_sigmas=True .* set use_flow_sigmas=False"),
    (UNIPC, {"solver_p": DDIMScheduler()}, "solver_p=DDIMScheduler is not served"),
    (UNIPC, {"solver_type": "bh1"}, "not finite from t=.*last sigma of 0; use final_sigmas_type='sigma_min'"),
    (UNIPC, {"lower_order_final": False}, "not finite from t="),
    (UNIPC, {"predict_x0": False}, "not finite from t="),
])  # fmt: skip
def test_options_that_are_not_served(scheduler, options, message):
    with pytest.raises(ValueError, match=message):
        table_of(scheduler(**{**STABLE_DIFFUSION, **options}), 6)


def test_options_of_another_class_are_not_read():
    """What a config carries along from a class that knows it."""
    stochastic = DPM(**STABLE_DIFFUSION, algorithm_type="sde-dpmsolver++", variance_type="learned")
    assert UNIPC.from_config(stochastic.config).config.algorithm_type == "sde-dpmsolver++"
    table_of(UNIPC.from_config(stochastic.config), 6)
    clipped = DDPMScheduler(**STABLE_DIFFUSION, variance_type="fixed_small", clip_sample=True)
    assert table_of(DPM.from_config(clipped.config), 6).coefficients[:, 2].isinf().all()
