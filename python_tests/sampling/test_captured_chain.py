"""Whole chains as captured graphs, emulated on the CPU: the same numbers as chains that run as they are, bit for bit."""

import dataclasses

import pytest
import torch
from recorded import RecordedGraphs

import rftcore
from rftcore.sampling import Plan
from rftcore.sampling.captures import Captures

STEPS, BATCH = 4, 2
REPLAYED = Plan.replayed(["full"] * STEPS, BATCH)
PLANS = {
    "stored": dataclasses.replace(REPLAYED, stored=(0,) * STEPS, levels=("none",)),
    "half": dataclasses.replace(REPLAYED, stored=(None, None, 0, 1), levels=("none", "block"), replay_batch=1),
    "replayed": REPLAYED,
}


@pytest.fixture
def samplers(make_unet, make_scheduler):
    """A UNet, the same sampler without graphs and with emulated ones, and their recorder."""

    def make(kind="sd1", accelerated=True, dtype=torch.float32, scheduler="ddim", **options):
        unet = make_unet(kind, dtype=dtype)
        if accelerated:
            rftcore.accelerate(unet)
        settings = {"num_inference_steps": STEPS, "guidance_scale": 1.0 if kind == "unconditional" else 2.0, **options}
        plain = rftcore.CheckpointedSampler(unet, make_scheduler(scheduler), capture=False, **settings)
        captured = rftcore.CheckpointedSampler(unet, make_scheduler(scheduler), **settings)
        recorder = RecordedGraphs()
        captured._captures = Captures(captured.denoiser, True, lambda device: recorder, "cpu")
        return unet, plain, captured, recorder

    return make


def step(unet, sampler, given, seed):
    """The chain's end, its log-probabilities and the gradients, written into `grad` as training does."""
    unet.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    trajectory = sampler(**given, generator=generator, batch_size=BATCH)
    trajectory.latents.square().sum().backward()
    return [trajectory.latents.detach(), trajectory.states, trajectory.log_probs, *(
        p.grad for p in unet.parameters() if p.requires_grad
    )]  # fmt: skip


@pytest.mark.parametrize(
    "plan", ["half", *(pytest.param(each, marks=pytest.mark.slow) for each in ("stored", "replayed"))]
)
@pytest.mark.parametrize(
    "kind", ["sd1", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sdxl", "unconditional"))]
)
def test_captured_chains_are_plain_ones_bit_for_bit(kind, plan, samplers, conditioning):
    """Over five chains, with other prompts, other noise and, in place, other weights."""
    unet, plain, captured, recorder = samplers(kind, plan=PLANS[plan], eta=0.5)
    for seed in range(5):
        given = conditioning(kind, BATCH, dtype=torch.float32)
        expected = [t.clone() for t in step(unet, plain, given, seed)]
        for ours, theirs in zip(step(unet, captured, given, seed), expected, strict=True):
            assert torch.equal(ours, theirs), (seed, captured.uncaptured)
        assert captured.uncaptured is None
        with torch.no_grad():
            for parameter in unet.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn_like(parameter))
    assert "capture" in recorder.calls and "launch" in recorder.calls


def test_sampling_alone_is_captured(samplers, conditioning):
    unet, plain, captured, recorder = samplers(backprop_steps=0, eta=1.0)
    for seed in range(4):
        given = conditioning("sd1", BATCH, dtype=torch.float32)
        found = [s(**given, generator=torch.Generator().manual_seed(seed)).states for s in (plain, captured)]
        assert torch.equal(*found)
    assert captured.uncaptured is None and "launch" in recorder.calls


@pytest.mark.slow
def test_a_changed_scale_is_captured_anew(samplers, conditioning):
    """PEFT's scale is a number in a launch."""
    unet, plain, captured, _ = samplers(plan=PLANS["half"])
    given = conditioning("sd1", BATCH, dtype=torch.float32)
    for scale in (1.0, 1.0, 1.0, 0.25, 0.25, 0.25):
        for module in unet.modules():
            if hasattr(module, "scaling"):
                module.scaling = dict.fromkeys(module.scaling, scale)
        expected = [t.clone() for t in step(unet, plain, given, 0)]
        for ours, theirs in zip(step(unet, captured, given, 0), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_gradients_that_were_handed_out_are_not_written_to(samplers, conditioning):
    unet, _, captured, _ = samplers(plan=PLANS["half"])
    given = conditioning("sd1", BATCH, dtype=torch.float32)
    for _ in range(3):
        first = step(unet, captured, given, 0)
    kept = [tensor.clone() for tensor in first]
    step(unet, captured, given, 1)
    for tensor, copy in zip(first, kept, strict=True):
        assert torch.equal(tensor, copy)


def test_a_second_backward_pass_of_a_captured_chain(samplers, conditioning):
    unet, plain, captured, _ = samplers(plan=PLANS["half"], dtype=torch.float64)
    given, noise = conditioning("sd1", BATCH), torch.randn(BATCH, 4, 8, 8, dtype=torch.float64)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    for _ in range(3):
        loss = captured(**given, latents=noise).latents.square().sum()
        first = torch.autograd.grad(loss, parameters, retain_graph=True)
    captured(**conditioning("sd1", BATCH), latents=noise).latents.sum().backward()
    second = torch.autograd.grad(loss, parameters)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def test_a_capture_that_fails_costs_nothing_but_the_capture(samplers, conditioning):
    unet, plain, captured, recorder = samplers(plan=PLANS["half"])
    recorder.fail_at = 2
    given = conditioning("sd1", BATCH, dtype=torch.float32)
    for seed in range(3):
        expected = [t.clone() for t in step(unet, plain, given, seed)]
        for ours, theirs in zip(step(unet, captured, given, seed), expected, strict=True):
            assert torch.equal(ours, theirs)
    assert "could not be captured" in captured.uncaptured


def test_why_a_chain_is_not_captured(samplers, conditioning, make_unet, make_scheduler):
    given = conditioning("sd1", BATCH, dtype=torch.float32)
    unet, plain, captured, recorder = samplers()
    assert captured.uncaptured == "no chain has run yet"
    with torch.no_grad():
        plain(**given)
        assert plain.uncaptured == "capture=False"
        on_cpu = rftcore.CheckpointedSampler(unet, make_scheduler(), num_inference_steps=STEPS, guidance_scale=2.0)
        on_cpu(**given)
        assert "graphs are captured on cuda" in on_cpu.uncaptured
        handle = unet.mid_block.register_forward_hook(lambda *_: None)
        captured(**given)
        assert "it has hooks, which a launched graph would leave out (mid_block)" in captured.uncaptured
        handle.remove()
        captured(**given, merged=True)
        assert "merged weights live for one chain" in captured.uncaptured
    assert recorder.calls == []
