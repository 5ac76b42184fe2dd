"""The sampler over an accelerated UNet, and rewards through an accelerated decoder: the same numbers."""

import pytest
import torch
from checks import relative_error
from diffusers import AutoencoderKL
from models import UNETS

import rftcore

LEVELS = [{"recompute": "none"}, {"recompute": "block"}, {"recompute": "auto", "memory_budget": "1MiB"}]


def sampler_of(unet, make_scheduler, **options):
    return rftcore.CheckpointedSampler(unet, make_scheduler(), num_inference_steps=4, **options)


def gradients_of(sampler, unet, given):
    parameters = [p for p in unet.parameters() if p.requires_grad]
    trajectory = sampler(**given, latents=torch.linspace(-1, 1, 512).double().reshape(2, 4, 8, 8))
    return [trajectory.latents.detach(), *torch.autograd.grad(trajectory.latents.square().sum(), parameters)]


@pytest.mark.covering(1)
@pytest.mark.parametrize("options", LEVELS, ids=lambda o: o["recompute"])
@pytest.mark.parametrize("kind", UNETS)
def test_a_chain(kind, options, make_unet, make_scheduler, conditioning):
    unet = make_unet(kind)
    given = conditioning(kind)
    sampler = sampler_of(unet, make_scheduler, guidance_scale=1.0 if kind == "unconditional" else 3.0, eta=0.0)
    expected = gradients_of(sampler, unet, given)
    rftcore.accelerate(unet, **options)
    for mine, theirs in zip(gradients_of(sampler, unet, given), expected, strict=True):
        assert relative_error(mine, theirs) <= 1e-11
    assert not rftcore.report(unet).stock


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", LEVELS, ids=lambda o: o["recompute"])
def test_the_ratio_before_an_update_is_one_bit_for_bit(options, dtype, make_unet, make_scheduler, conditioning):
    unet = rftcore.accelerate(make_unet("sd1", dtype), **options)
    sampler = rftcore.CheckpointedSampler(
        unet, make_scheduler(fp64=False), num_inference_steps=4, guidance_scale=3.0, eta=1.0
    )
    with torch.no_grad():
        trajectory = sampler(**conditioning("sd1", dtype=dtype), generator=torch.Generator().manual_seed(1))
    log_probs, _ = sampler.log_prob(trajectory, torch.arange(4))
    assert log_probs.requires_grad
    assert torch.equal(log_probs, trajectory.log_probs)


def test_a_reference_with_the_adapters_off(make_unet, make_scheduler, conditioning):
    unet = make_unet("sd1")
    sampler = sampler_of(unet, make_scheduler, guidance_scale=3.0, eta=1.0)
    found = []
    for accelerated in (False, True):
        if accelerated:
            rftcore.accelerate(unet, "qkv")
        torch.manual_seed(0)
        given = conditioning("sd1")
        with torch.no_grad():
            trajectory = sampler(**given, generator=torch.Generator().manual_seed(1))
        _, divergence = sampler.log_prob(trajectory, torch.arange(4), reference="exact")
        found.append(divergence)
    assert found[0].abs().min() > 0
    assert relative_error(found[1], found[0]) <= 1e-10


def test_a_reward_through_an_accelerated_decoder():
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    ).double()
    found = []
    for accelerated in (False, True):
        if accelerated:
            rftcore.accelerate(vae)
        latents = torch.linspace(-1, 1, 512).double().reshape(2, 4, 8, 8).requires_grad_()
        rewards = rftcore.score(vae, latents, lambda images, prompts, metadata: images.mean((1, 2, 3)), ["a", "b"])
        (gradient,) = torch.autograd.grad(rewards.sum(), latents)
        found.append((rewards.detach(), gradient))
    for mine, theirs in zip(found[1], found[0], strict=True):
        assert relative_error(mine, theirs) <= 1e-11
