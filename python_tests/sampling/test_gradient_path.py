"""What each mode of a gradient path stops, against chains written out with `detach`."""

import pytest
import torch

import rftcore
from rftcore import GradientPath
from rftcore.ops.sampler_step import Coefficient

GUIDANCE = 2.0


@pytest.fixture
def chain(make_unet, make_scheduler, conditioning):
    """(sampler, given, noise, parameters, by_hand): by_hand(modes, output) is the chain in plain autograd."""
    unet = make_unet()
    given, noise = conditioning("sd1"), torch.randn(2, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    scheduler = make_scheduler(clip_sample=True, clip_sample_range=2.0)
    sampler = rftcore.CheckpointedSampler(unet, scheduler, num_inference_steps=4, guidance_scale=GUIDANCE)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    prompts = torch.cat([given["negative_prompt_embeds"], given["prompt_embeds"]])

    def by_hand(modes, output="latents", guidance="both"):
        x = noise
        for step, mode in enumerate(modes):
            c = sampler.table.coefficients[step]
            if mode in ("none", "detach_x"):
                x = x.detach()
            seen = x.detach() if mode == "detach_input" else x
            negative, positive = unet(
                torch.cat([seen, seen]), sampler.table.timesteps[step], prompts, return_dict=False
            )[0].chunk(2)
            m = negative + GUIDANCE * (positive - negative)
            if guidance == "positive":
                # FlowBP's: the negative branch detached, the gradient divided by the scale.
                m = m.detach() + (GUIDANCE * positive - (GUIDANCE * positive).detach()) / GUIDANCE
            if mode in ("none", "detach_eps"):
                m = m.detach()
            x0 = (c[Coefficient.X0_FROM_SAMPLE] * x + c[Coefficient.X0_FROM_OUTPUT] * m).clamp(-2, 2)
            if output == "x0" and step == len(modes) - 1:
                return x0
            x = c[Coefficient.MEAN_FROM_X0] * x0 + c[Coefficient.MEAN_FROM_OUTPUT] * m
        return x

    return sampler, given, noise, parameters, by_hand


@pytest.mark.covering(1)
@pytest.mark.parametrize("modes", [
    ("full", "full", "full", "full"),
    ("none", "full", "none", "full"),
    ("full", "detach_x", "full", "full"),
    ("full", "detach_eps", "full", "detach_eps"),
    ("detach_eps", "full", "detach_eps", "full"),
    ("detach_input", "detach_eps", "detach_input", "full"),
    ("none", "detach_input", "detach_eps", "detach_eps"),
    ("detach_eps",) * 4,
])  # fmt: skip
@pytest.mark.parametrize(("output", "guidance"), [("latents", "both"), ("x0", "both"), ("latents", "positive")])
def test_modes(chain, modes, output, guidance):
    sampler, given, noise, parameters, by_hand = chain
    weight = torch.randn_like(noise)
    truth = by_hand(modes, output, guidance)
    path = GradientPath(modes, output=output, guidance=guidance)
    trajectory = sampler(**given, latents=noise, gradient_path=path)
    torch.testing.assert_close(trajectory.latents, truth, rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad((truth * weight).sum(), [noise, *parameters], allow_unused=True)
    found = torch.autograd.grad((trajectory.latents * weight).sum(), [noise, *parameters], allow_unused=True)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_early_stop(chain):
    sampler, given, noise, parameters, by_hand = chain
    modes = ("detach_input", "full", "detach_input")
    trajectory = sampler(**given, latents=noise, gradient_path=GradientPath(modes, stop=3, output="x0"))
    assert trajectory.states.shape[0] == 4
    assert trajectory.timesteps.shape == (3,)
    torch.testing.assert_close(trajectory.latents, by_hand(modes, "x0"), rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad(trajectory.latents.sum(), parameters)
    expected = torch.autograd.grad(by_hand(modes, "x0").sum(), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_steps_without_parameters_are_not_run_again(chain):
    sampler, given, noise, _, _ = chain
    calls = []
    sampler.denoiser.module.register_forward_hook(lambda *_: calls.append(1))
    modes = ("full", "detach_eps", "detach_eps", "detach_x")
    trajectory = sampler(**given, latents=noise, gradient_path=GradientPath(modes))
    trajectory.latents.sum().backward()
    assert len(calls) == 4 + 1


def test_backprop_steps_is_its_short_form():
    assert GradientPath.last(None, 3) == GradientPath(("full",) * 3)
    assert GradientPath.last(1, 3) == GradientPath(("none", "none", "full"))
    assert not GradientPath.last(0, 3).differentiates


def test_effective_modes():
    assert GradientPath(("full", "none", "full")).effective_modes == ("none", "none", "full")
    assert GradientPath(("full", "detach_x", "detach_eps")).effective_modes == ("none", "detach_x", "detach_eps")
    assert not GradientPath(("full", "none")).differentiates
    assert GradientPath(("detach_eps", "full")).reaches_start
    assert not GradientPath(("detach_x", "full")).reaches_start
    assert not GradientPath(("full", "none", "detach_eps")).reaches_model


@pytest.mark.parametrize(("arguments", "message"), [
    ({"modes": ("full", "half")}, r"modes\[1\]='half'"),
    ({"modes": ()}, "empty"),
    ({"modes": ("full",), "output": "image"}, "output='image'"),
    ({"modes": ("full",), "stop": 2}, "stop=2"),
])  # fmt: skip
def test_bad_paths(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradientPath(**arguments)


def test_path_must_fit_the_sampler(chain):
    sampler, given, *_ = chain
    with pytest.raises(ValueError, match="3 modes and the sampler takes 4 steps"):
        sampler(**given, gradient_path=GradientPath(("full",) * 3))
    with pytest.raises(ValueError, match="stop=5 is beyond"):
        sampler(**given, gradient_path=GradientPath(("full",) * 5, stop=5))


def test_one_evaluation_through_the_positive_branch(chain):
    """`predict` gives the same value, and the positive branch's own gradient."""
    sampler, given, noise, parameters, _ = chain
    x, t = noise.detach().requires_grad_(), 500
    output = sampler.predict(x, t, **given, guidance_gradient="positive")
    assert torch.allclose(output, sampler.predict(x, t, **given), rtol=0, atol=1e-14)
    weight = torch.randn_like(output)
    ours = torch.autograd.grad((output * weight).sum(), [x, *parameters])
    alone = sampler.denoiser.module(x, t, given["prompt_embeds"], return_dict=False)[0]
    truth = torch.autograd.grad((alone * weight).sum(), [x, *parameters])
    assert all((a - b).norm() <= 1e-11 * b.norm() for a, b in zip(ours, truth, strict=True))


def test_unknown_branches_are_refused(chain):
    sampler, given, noise, *_ = chain
    with pytest.raises(ValueError, match="guidance='negative' is not known; allowed are 'both', 'positive'"):
        GradientPath(("full",), guidance="negative")
    with pytest.raises(ValueError, match="guidance_gradient='negative' is not known"):
        sampler.predict(noise, 500, **given, guidance_gradient="negative")
