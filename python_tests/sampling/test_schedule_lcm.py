"""Few steps: latent consistency models, guided or told their guidance scale, and SDXL-Turbo; against diffusers."""

import pytest
import torch
from chains import STABLE_DIFFUSION, Denoiser, by_diffusers, by_table, exact_steps, relative_error, table_of
from diffusers import EulerAncestralDiscreteScheduler, LCMScheduler, StableDiffusionPipeline
from recorded import RecordedGraphs
from stock import unet_output
from torch.distributions import Normal

import rftcore
from rftcore.ops.sampler_step import Coefficient
from rftcore.sampling import Plan
from rftcore.sampling.captures import Captures
from rftcore.sampling.conditioning import Conditioning
from rftcore.sampling.lcm import guidance_embedding

STEPS, BATCH, WIDTH = 4, 2, 8
TURBO = {
    **STABLE_DIFFUSION, "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "steps_offset": 1, "timestep_spacing": "trailing", "trained_betas": None,
}  # fmt: skip


class InFp64(LCMScheduler):
    """diffusers' own steps: of a time that is a tensor, its boundary condition would be fp32."""

    def __init__(self, **options):
        super().__init__(**{**STABLE_DIFFUSION, **options})
        self.alphas_cumprod = self.alphas_cumprod.double()

    def step(self, output, t, x, **options):
        return super().step(output, t.item(), x, **options)


def scheduler_of(**options):
    scheduler = LCMScheduler(**{**STABLE_DIFFUSION, **options})
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return scheduler


@pytest.mark.parametrize("steps", [1, 4, 8])
@pytest.mark.parametrize("options", [
    {}, {"prediction_type": "v_prediction"}, {"prediction_type": "sample"}, {"clip_sample": True},
    {"original_inference_steps": 20, "set_alpha_to_one": False}, {"timestep_scaling": 0.01},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, {"original_inference_steps": 1000},
])  # fmt: skip
@torch.no_grad()
def test_states_equal_diffusers(options, steps):
    model, noise = Denoiser(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    table = table_of(scheduler_of(**options), steps)
    truth, _ = by_diffusers(model, InFp64(**options), noise, steps)
    assert table.stochastic == (True,) * (steps - 1) + (False,)
    for ours, theirs in zip(by_table(model, table, noise), truth, strict=True):
        assert relative_error(ours, theirs) <= 1e-12


@pytest.mark.parametrize(("scale", "width"), [(7.5, 256), (1.0, 256), (8, 9), (0.0, 6)])
def test_the_embedding_is_diffusers_own(scale, width):
    """Bit for bit: the distilled weights have seen its fp32 rounding."""
    told = torch.tensor([scale - 1])
    expected = StableDiffusionPipeline.get_guidance_scale_embedding(None, told, embedding_dim=width)
    assert torch.equal(guidance_embedding(scale, width), expected)


def by_plain_autograd(unet, scheduler, given, noise, scale, backprop_steps):
    """diffusers' loop; with a UNet that embeds the scale as its pipelines call it."""
    scheduler.set_timesteps(STEPS)
    generator, x = torch.Generator().manual_seed(3), noise
    told = torch.tensor(scale - 1).repeat(BATCH)
    for index, t in enumerate(scheduler.timesteps):
        with torch.set_grad_enabled(index >= STEPS - backprop_steps):
            if unet.config.time_cond_proj_dim is None:
                output = unet_output(unet, x, t, given, scale)
            else:
                condition = StableDiffusionPipeline.get_guidance_scale_embedding(None, told, embedding_dim=WIDTH)
                output = unet(
                    x, t, given["prompt_embeds"], timestep_cond=condition.to(x),
                    added_cond_kwargs=given.get("added_cond_kwargs"), return_dict=False,
                )[0]  # fmt: skip
            x = scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
    return x


@pytest.mark.covering(1)
@pytest.mark.parametrize("replayed", [False, True], ids=["stored", "replayed"])
@pytest.mark.parametrize(("kind", "embedded", "backprop_steps"), [
    ("sd1", True, STEPS), ("sd1", True, 1), ("sdxl", True, STEPS), ("sd1", False, STEPS), ("sdxl", False, 1),
])  # fmt: skip
def test_the_sampler_is_plain_autograd(make_unet, conditioning, kind, embedded, backprop_steps, replayed):
    unet = rftcore.accelerate(make_unet(kind, **({"time_cond_proj_dim": WIDTH} if embedded else {})))
    given, scale = conditioning(kind, BATCH), 7.5 if embedded else 2.0
    noise = torch.randn(BATCH, 4, 8, 8, dtype=torch.float64)
    modes = ["none"] * (STEPS - backprop_steps) + ["full"] * backprop_steps
    sampler = rftcore.CheckpointedSampler(
        unet, scheduler_of(), num_inference_steps=STEPS, guidance_scale=scale, backprop_steps=backprop_steps,
        plan=Plan.replayed(modes, BATCH) if replayed else None,
    )  # fmt: skip
    parameters = [p for p in unet.parameters() if p.requires_grad]
    latents = sampler(**given, latents=noise, generator=torch.Generator().manual_seed(3)).latents
    found = torch.autograd.grad(latents.square().sum(), parameters)
    assert sampler.branches == (1 if embedded else 2)
    assert sampler.evaluations == sampler.branches * (STEPS + (backprop_steps if replayed else 0))
    expected = by_plain_autograd(rftcore.restore(unet), InFp64(), given, noise, scale, backprop_steps)
    torch.testing.assert_close(latents, expected, rtol=1e-11, atol=1e-11)
    for ours, theirs in zip(found, torch.autograd.grad(expected.square().sum(), parameters), strict=True):
        assert (ours - theirs).norm() <= 1e-11 * theirs.norm() + 1e-13


@pytest.fixture
def distilled(make_unet, conditioning):
    """A UNet that embeds its scale, what makes samplers of it, and their conditioning."""
    unet, given = make_unet(time_cond_proj_dim=WIDTH), conditioning("sd1", BATCH, guided=False)

    def make(scale=7.5, **options):
        options = {"num_inference_steps": STEPS, "guidance_scale": scale, **options}
        return rftcore.CheckpointedSampler(unet, scheduler_of(), **options)

    return unet, make, given


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_steps_are_scored_again(distilled, dtype):
    unet, make, given = distilled
    unet.to(dtype)
    given, sampler, steps = {name: t.to(dtype) for name, t in given.items()}, make(), range(STEPS - 1)
    with torch.no_grad():
        trajectory = sampler(**given)
        again, divergence = sampler.log_prob(trajectory, steps, "exact")
        scattered, _ = sampler.transition_log_prob(trajectory.transitions(torch.zeros(BATCH, 1, dtype=torch.int64)))
    assert torch.equal(again, trajectory.log_probs[:, :-1]), "the ratio is exactly 1"
    assert torch.equal(scattered, again[:, 0])
    assert (divergence > 0).all()
    scheduler = InFp64()
    scheduler.set_timesteps(STEPS)
    for step, (t, following) in enumerate(zip(scheduler.timesteps, scheduler.timesteps[1:], strict=False)):
        with torch.no_grad():
            output = sampler.predict(trajectory.states[step], t, **given)
        a, b = scheduler.alphas_cumprod[t], scheduler.alphas_cumprod[following]
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(t.double())
        x = trajectory.states[step].double()
        mean = b.sqrt() * (out * (x - (1 - a).sqrt() * output.double()) / a.sqrt() + skip * x)
        expected = Normal(mean, (1 - b).sqrt()).log_prob(trajectory.states[step + 1].double()).mean((1, 2, 3))
        tolerance = 1e-10 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(again[:, step].double(), expected, rtol=tolerance, atol=tolerance)
    with pytest.raises(ValueError, match="steps holds 3, which is deterministic .* steps with noise are 0-2"):
        sampler.log_prob(trajectory, [STEPS - 1])
    with pytest.raises(ValueError, match="guidance_scale"):
        make(3.0).log_prob(trajectory, [0])


def test_every_scale_is_told(distilled):
    _, make, given = distilled
    noise = torch.randn(BATCH, 4, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        ends = [
            make(scale)(**given, latents=noise, generator=torch.Generator().manual_seed(1)).latents
            for scale in (0.0, 1.0, 7.5)
        ]
    assert all((ends[0] - other).abs().max() > 1e-6 for other in ends[1:])
    assert (ends[1] - ends[2]).abs().max() > 1e-6


def test_a_unet_that_is_not_told_says_so(distilled):
    _, make, given = distilled
    untold = Conditioning.build(given["prompt_embeds"], None, None, None, guided=False).joined()
    with pytest.raises(ValueError, match="time_cond_proj_dim=8, and its conditioning lacks timestep_cond"):
        make().denoiser(torch.randn(BATCH, 4, 8, 8), torch.tensor(9), untold, guided=False)


def test_a_told_chain_is_planned_and_captured(distilled):
    unet, make, given = distilled
    plain, captured = make(memory_budget="1GiB", capture=False), make(memory_budget="1GiB")
    captured._captures = Captures(captured.denoiser, True, lambda device: RecordedGraphs(), "cpu")
    parameters = [p for p in unet.parameters() if p.requires_grad]
    for seed in range(4):
        found = []
        for sampler in (plain, captured):
            end = sampler(**given, generator=torch.Generator().manual_seed(seed)).latents
            found.append([end, *torch.autograd.grad(end.square().sum(), parameters)])
        assert all(map(torch.equal, *found))
    assert captured.uncaptured is None
    assert plain.plan.flops > 0 and not plain.plan.reasons


@pytest.mark.parametrize(("steps", "options", "arguments", "message"), [
    (51, {}, {}, "num_inference_steps=51 of an LCMScheduler must be at most its original_inference_steps=50"),
    (4, {}, {"eta": 1.0}, "eta=1.0 has no meaning for LCMScheduler, whose noise is that of its next timestep"),
    (4, {}, {"final_step": "clamp"}, "final_step='clamp' is DDIM's"),
    (4, {"thresholding": True}, {}, "thresholding=True"),
])  # fmt: skip
def test_refused(steps, options, arguments, message):
    with pytest.raises(ValueError, match=message):
        table_of(scheduler_of(**options), steps, **arguments)


@pytest.mark.parametrize("times", [[999], [999, 499], [999, 666, 332], [999, 749, 499, 249]])
@torch.no_grad()
def test_turbo_states_equal_diffusers(monkeypatch, times):
    """SDXL-Turbo's scheduler, and no guidance."""
    exact_steps(monkeypatch)
    model, noise = Denoiser(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    scheduler = EulerAncestralDiscreteScheduler.from_config(TURBO)
    table = table_of(scheduler, len(times), guidance_scale=1.0)
    assert table.timesteps.tolist() == times
    assert (table.coefficients[:, Coefficient.GUIDANCE] == 1.0).all()
    unguided = lambda x, t: model(x, t).chunk(2)[1]  # noqa: E731
    # The helper guides two branches: of two that are equal it makes one.
    truth, _ = by_diffusers(lambda x, t: torch.cat([unguided(x, t)] * 2), scheduler, noise, len(times))
    for ours, theirs in zip(by_table(unguided, table, noise), truth, strict=True):
        assert relative_error(ours, theirs) <= 1e-12
