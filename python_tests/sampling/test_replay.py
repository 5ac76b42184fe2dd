"""What surrounds a replay: memory, randomness, autocast, wrappers, the adapters' scale."""

import copy

import pytest
import stock
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

import rftcore
from benchmarks.memory import PeakBytes, saved_bytes
from rftcore.sampling import Plan
from rftcore.sampling.replay import GradientSum


def make_gradients(sampler, given, noise, **options):
    parameters = [p for p in sampler.denoiser.module.parameters() if p.requires_grad]
    return torch.autograd.grad(sampler(**given, latents=noise, **options).latents.sum(), parameters)


def assert_same(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_peak_memory_does_not_grow_with_the_steps(make_unet, make_scheduler, conditioning):
    """Beyond T + 1 states, T outputs of both branches, and as many for a moment while they are stacked."""
    unet, given = make_unet(dtype=torch.float32), conditioning("sd1", dtype=torch.float32)
    noise = torch.randn(2, 4, 8, 8)

    def peak(steps):
        sampler = rftcore.CheckpointedSampler(
            unet, make_scheduler(), num_inference_steps=steps, guidance_scale=2.0,
            plan=Plan.replayed(["full"] * steps, batch=2),
        )  # fmt: skip
        with saved_bytes() as saved:
            sampler(**given, latents=noise)
        with PeakBytes() as counted:
            sampler(**given, latents=noise).latents.sum().backward()
        unet.zero_grad()
        return counted.peak, saved["bytes"]

    few, saved_by_few = peak(3)
    many, saved_by_many = peak(12)
    latent = noise.numel() * noise.element_size()
    assert few > 100 * latent  # activations dominate, so that growth would be seen
    assert saved_by_many - saved_by_few == 9 * 3 * latent
    # A random state of 5 KiB a step comes on top.
    assert many - few <= 9 * 4 * latent + 9 * 5056 + latent


def test_dropout_is_replayed(make_unet, make_scheduler, conditioning):
    """With a fixed seed plain autograd draws the same masks, step by step."""
    unet = make_unet(dropout=0.3).train()
    given, noise = conditioning("sd1"), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    scheduler = make_scheduler()
    sampler = rftcore.CheckpointedSampler(unet, scheduler, num_inference_steps=3, guidance_scale=2.0)
    torch.manual_seed(5)
    ours = make_gradients(sampler, given, noise)
    after = torch.rand(1)
    torch.manual_seed(5)
    latents = stock.sample(
        unet, copy.deepcopy(scheduler), noise, given, steps=3, guidance_scale=2.0, backprop_steps=3, generator=None
    )
    theirs = torch.autograd.grad(latents.sum(), [p for p in unet.parameters() if p.requires_grad])
    assert_same(ours, theirs, rtol=1e-10, atol=1e-13)
    assert torch.equal(after, torch.rand(1)), "the backward must leave the random state as it found it"


def test_dropout_of_rescored_steps_is_replayed(make_unet, make_scheduler, conditioning):
    unet = make_unet(dropout=0.3).train()
    sampler = rftcore.CheckpointedSampler(unet, make_scheduler(), num_inference_steps=3, guidance_scale=2.0, eta=1.0)
    with torch.no_grad():
        trajectory = sampler(**conditioning("sd1"))
    parameters = [p for p in unet.parameters() if p.requires_grad]

    def gradients(steps_of_each_call):
        torch.manual_seed(3)
        log_probs = [sampler.log_prob(trajectory, steps, reference="exact") for steps in steps_of_each_call]
        return torch.autograd.grad(sum(scores.sum() + d.sum() for scores, d in log_probs), parameters)

    # One step a call is plain autograd, three are replayed.
    assert_same(gradients([[0, 1, 2]]), gradients([[0], [1], [2]]), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("inside", [True, False])
def test_autocast_is_restored(make_unet, make_scheduler, conditioning, inside):
    """bf16 autocast with fp32 weights, backward inside and outside of it: as plain autograd under autocast."""
    unet = make_unet(dtype=torch.float32)
    given, noise = conditioning("sd1", dtype=torch.float32), torch.randn(2, 4, 8, 8)
    sampler = rftcore.CheckpointedSampler(unet, make_scheduler(), num_inference_steps=3, guidance_scale=2.0)
    parameters = [p for p in unet.parameters() if p.requires_grad]

    def replayed():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = sampler(**given, latents=noise).latents.sum()
            if inside:
                return torch.autograd.grad(loss, parameters)
        return torch.autograd.grad(loss, parameters)

    def plain():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            latents = stock.sample(unet, make_scheduler(), noise, given, steps=3, guidance_scale=2.0,
                                   backprop_steps=3, generator=None)  # fmt: skip
        return torch.autograd.grad(latents.sum(), parameters)

    ours, theirs = replayed(), plain()
    exact = make_gradients(sampler, given, noise)
    norm = torch.stack([e.norm() for e in exact]).norm()
    ours_off = torch.stack([(o - e).norm() for o, e in zip(ours, exact, strict=True)]).norm() / norm
    theirs_off = torch.stack([(t - e).norm() for t, e in zip(theirs, exact, strict=True)]).norm() / norm
    assert ours_off > 1e-4, "autocast was not on in the replay"
    assert ours_off <= 2 * theirs_off


def test_sampling_without_grad_leaves_autocast_usable(make_unet, make_scheduler, conditioning):
    """Casts that a no-grad chain caches would cut the gradient of what follows in the same autocast block."""
    unet = make_unet(dtype=torch.float32)
    given = conditioning("sd1", dtype=torch.float32)
    sampler = rftcore.CheckpointedSampler(unet, make_scheduler(), num_inference_steps=2, guidance_scale=2.0)
    x = torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            sampler(**given, latents=x)
        sampler.predict(x, 5, **given).sum().backward()
    for name, parameter in unet.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_grad_scaler(make_unet, make_scheduler, conditioning):
    unet = make_unet(dtype=torch.float32)
    given, noise = conditioning("sd1", dtype=torch.float32), torch.randn(2, 4, 8, 8)
    sampler = rftcore.CheckpointedSampler(unet, make_scheduler(), num_inference_steps=2, guidance_scale=2.0)
    expected = make_gradients(sampler, given, noise)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    scaler.scale(sampler(**given, latents=noise).latents.sum()).backward()
    scaler.unscale_(optimizer)
    assert_same([p.grad for p in parameters], expected)


def test_the_callers_grad_mode(make_unet, make_scheduler, conditioning):
    sampler = rftcore.CheckpointedSampler(make_unet(), make_scheduler(), num_inference_steps=2)
    given = conditioning("sd1", guided=False)
    with torch.no_grad():
        assert not sampler(**given).latents.requires_grad
    with torch.inference_mode():
        assert sampler(**given).latents.is_inference()
    assert sampler(**given).latents.requires_grad
    truncated = rftcore.CheckpointedSampler(make_unet(), make_scheduler(), num_inference_steps=2, backprop_steps=0)
    assert not truncated(**given).latents.requires_grad


@pytest.fixture
def gradients_of(make_scheduler, conditioning):
    given, noise = conditioning("sd1"), torch.randn(2, 4, 8, 8, dtype=torch.float64)

    def gradients(module):
        sampler = rftcore.CheckpointedSampler(module, make_scheduler(), num_inference_steps=2, guidance_scale=2.0)
        return make_gradients(sampler, given, noise)

    return gradients


@pytest.mark.slow
def test_compiled_unet(make_unet, gradients_of):
    unet = make_unet()
    compiled = gradients_of(torch.compile(unet, backend="aot_eager"))
    assert_same(compiled, gradients_of(unet), rtol=1e-9, atol=1e-12)


def test_wrapped_unets(make_unet, gradients_of):
    unet = make_unet()
    prepared = Accelerator(cpu=True).prepare(copy.deepcopy(unet))
    assert_same(gradients_of(prepared), gradients_of(unet))
    peft_model = get_peft_model(
        make_unet(lora=False), LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    ).double()
    assert sum(g.abs().sum() > 0 for g in gradients_of(peft_model)) > 0


def test_scale_of_the_adapter(make_unet, make_scheduler, conditioning):
    unet, given = make_unet(), conditioning("sd1", guided=False)
    noise = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    options = {"num_inference_steps": 2}
    full = rftcore.CheckpointedSampler(unet, make_scheduler(), **options)
    halved = rftcore.CheckpointedSampler(unet, make_scheduler(), **options, cross_attention_kwargs={"scale": 0.5})
    half_latents = halved(**given, latents=noise).latents
    assert (half_latents - full(**given, latents=noise).latents).abs().max() > 1e-6
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.5)
    torch.testing.assert_close(half_latents, full(**given, latents=noise).latents)


def test_many_small_gradients_are_not_lost_in_low_precision():
    """In bf16 1 + 2^-9 is 1; what autograd handed out first is not added to."""
    like = [torch.ones((), dtype=dtype) for dtype in (torch.bfloat16, torch.float64, torch.float32)]
    total, first = GradientSum(like), [like[0].clone(), like[1].clone(), None]
    total.add(first)
    for _ in range(256):
        total.add([like[0] * 2**-9, None, None])
    low, wide, none = total.result()
    assert low.dtype == torch.bfloat16 and low.item() == 1.5 and first[0].item() == 1
    assert wide.dtype == torch.float64 and wide.item() == 1 and none is None
    total.add([None, first[1], None])
    assert total.result()[1].item() == 2 and first[1].item() == 1
    total.clear()
    assert total.result()[0].item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_low_precision_adapters_are_summed_in_fp32(make_unet, make_scheduler, conditioning, dtype):
    """fp32 LoRA masters on a low-precision base give fp32 gradients."""
    unet = make_unet(dtype=dtype)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    given = conditioning("sd1", dtype=dtype)
    sampler = rftcore.CheckpointedSampler(unet, make_scheduler(), num_inference_steps=2, guidance_scale=2.0)
    trajectory = sampler(**given)
    assert trajectory.latents.dtype == torch.float32
    trajectory.latents.sum().backward()
    assert {p.grad.dtype for p in unet.parameters() if p.requires_grad} == {torch.float32}
