"""The mistakes a user of the sampler makes, and what it answers."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import HeunDiscreteScheduler, UNet2DConditionModel

import rftcore


@pytest.fixture
def build(make_unet, make_scheduler):
    def make(kind="sd1", scheduler=None, lora=True, **options):
        options = {"num_inference_steps": 3, **options}
        return rftcore.CheckpointedSampler(
            make_unet(kind, torch.float32, lora=lora), scheduler or make_scheduler(fp64=False), **options
        )

    return make


@pytest.mark.parametrize(("options", "message"), [
    ({"backprop_steps": 4}, "backprop_steps=4 must be None .* 0 to num_inference_steps=3"),
    ({"backprop_steps": -1}, "backprop_steps=-1"),
    ({"backprop_steps": True}, "backprop_steps=True"),
    ({"num_inference_steps": 0}, "num_inference_steps=0 must be a whole number from 1 to 1000"),
    ({"num_inference_steps": 1001}, "num_inference_steps=1001"),
    ({"num_inference_steps": 2.5}, "num_inference_steps=2.5"),
    ({"eta": -0.1}, "eta=-0.1"),
    ({"eta": float("nan")}, "eta=nan"),
    ({"eta": 3.0}, "eta=3.0 asks for more noise"),
    ({"guidance_scale": float("inf")}, "guidance_scale=inf"),
    ({"final_step": "last"}, "final_step='last' is not known; allowed are 'scheduler', 'clamp'"),
    ({"kind": "unconditional", "guidance_scale": 2.0}, "guidance_scale=2.0 with the unconditional UNet2DModel"),
    ({"backprop_steps": 1, "gradient_path": rftcore.GradientPath(("full",) * 3)}, "not both"),
])  # fmt: skip
def test_construction(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize(("kind", "options", "arguments", "message"), [
    ("ddim", {"thresholding": True}, {}, "thresholding=True"),
    ("ddim", {"prediction_type": "flow"}, {}, "prediction_type='flow' .* allowed are 'epsilon'"),
    ("ddim", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {}, "not finite at t=999"),
    ("ddpm", {}, {"eta": 0.0}, "eta=0.0 has no meaning for DDPMScheduler"),
    ("ddpm", {}, {"final_step": "clamp"}, "final_step='clamp' is DDIM's"),
    ("ddpm", {"variance_type": "learned_range"}, {}, "variance_type='learned_range'"),
    ("ddpm", {"variance_type": "fixed_large_log"}, {}, "variance_type='fixed_large_log'"),
])  # fmt: skip
def test_scheduler_options(build, make_scheduler, kind, options, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(scheduler=make_scheduler(kind, fp64=False, **options), **arguments)


def test_unknown_scheduler(build, make_scheduler):
    with pytest.raises(ValueError, match="HeunDiscreteScheduler is not served; allowed are DDIMScheduler, DDPM"):
        build(scheduler=HeunDiscreteScheduler())

    class Mine(type(make_scheduler())):
        def step(self, *args, **kwargs):
            raise NotImplementedError

    with pytest.raises(ValueError, match="scheduler=Mine is not served"):
        build(scheduler=Mine())


def test_fifty_steps_unless_told_otherwise(make_unet, make_scheduler):
    assert rftcore.CheckpointedSampler(make_unet(), make_scheduler()).settings["num_inference_steps"] == 50


def test_scheduler_is_not_changed(build, make_scheduler):
    scheduler = make_scheduler(fp64=False)
    before = scheduler.timesteps.clone()
    build(scheduler=scheduler)
    assert torch.equal(scheduler.timesteps, before) and scheduler.num_inference_steps is None


def test_unknown_models(make_scheduler):
    scheduler = make_scheduler(fp64=False)
    with pytest.raises(TypeError, match="unet=Linear is not a diffusers UNet"):
        rftcore.CheckpointedSampler(torch.nn.Linear(1, 1), scheduler)
    for channels in ("in_channels", "out_channels"):  # of a model that has but one of the two
        other = torch.nn.Linear(1, 1)
        other.config = SimpleNamespace(**{channels: 4})
        with pytest.raises(TypeError, match="unet=Linear is not a diffusers UNet"):
            rftcore.CheckpointedSampler(other, scheduler)
    with pytest.raises(TypeError, match="got str"):
        rftcore.CheckpointedSampler("unet", scheduler)
    inpainting = UNet2DConditionModel(
        in_channels=9, out_channels=4, block_out_channels=(4,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), norm_num_groups=2, layers_per_block=1, attention_head_dim=2,
    )  # fmt: skip
    with pytest.raises(TypeError, match="in_channels=9 and out_channels=4"):
        rftcore.CheckpointedSampler(inpainting, scheduler)
    with pytest.raises(TypeError, match="DataParallel, which is not served"):
        rftcore.CheckpointedSampler(torch.nn.DataParallel(torch.nn.Linear(1, 1)), scheduler)


def embeds(batch=2, tokens=5):
    return torch.randn(batch, tokens, 12)


@pytest.mark.parametrize(("kind", "options", "call", "message"), [
    ("sd1", {}, {"batch_size": 2}, "prompt_embeds=None, but UNet2DConditionModel is conditioned"),
    ("sd1", {"guidance_scale": 2.0}, {"prompt_embeds": embeds()}, "negative_prompt_embeds=None with guidance_scale"),
    ("sd1", {"guidance_scale": 2.0}, {"prompt_embeds": embeds(), "negative_prompt_embeds": embeds(1)},
     r"negative_prompt_embeds has shape \(1, 5, 12\) and prompt_embeds \(2, 5, 12\)"),
    ("sd1", {"guidance_scale": 2.0}, {"prompt_embeds": embeds(), "negative_prompt_embeds": embeds(2, 4)}, "shape"),
    ("sd1", {}, {"prompt_embeds": embeds(), "latents": torch.randn(3, 4, 8, 8)}, "do not agree.*'latents': 3"),
    ("sd1", {}, {"prompt_embeds": embeds(), "batch_size": 3}, "do not agree"),
    ("sd1", {}, {"prompt_embeds": embeds(), "latents": torch.randn(2, 3, 8, 8)}, r"takes \(B, 4, h, w\)"),
    ("sd1", {}, {"prompt_embeds": embeds(), "latents": torch.randn(2, 4, 8, 8), "sample_size": 8}, "not both"),
    ("sd1", {}, {"prompt_embeds": embeds(), "generator": [torch.Generator()]}, "list of 1 for 2 samples"),
    ("sd1", {}, {"prompt_embeds": [1, 2]}, "must be a tensor .* got list"),
    ("sdxl", {"guidance_scale": 2.0},
     {"prompt_embeds": embeds(), "negative_prompt_embeds": embeds(),
      "added_cond_kwargs": {"text_embeds": torch.randn(2, 10), "time_ids": torch.randn(2, 6)}},
     r"negative_added_cond_kwargs lacks \['text_embeds'\]"),
    ("sdxl", {"guidance_scale": 2.0},
     {"prompt_embeds": embeds(), "negative_prompt_embeds": embeds(),
      "added_cond_kwargs": {"time_ids": torch.randn(2, 6)},
      "negative_added_cond_kwargs": {"text_embeds": torch.randn(2, 10)}},
     r"negative_added_cond_kwargs has \['text_embeds'\], which added_cond_kwargs lacks"),
    ("sdxl", {}, {"prompt_embeds": embeds(), "added_cond_kwargs": {"text_embeds": torch.randn(1, 10)}}, "differ"),
    ("unconditional", {}, {}, "batch_size=None"),
    ("unconditional", {}, {"prompt_embeds": embeds()}, "UNet2DModel is unconditional"),
])  # fmt: skip
def test_calls(build, kind, options, call, message):
    with pytest.raises(ValueError, match=message):
        build(kind, **options)(**call)


def test_nothing_trainable(build):
    sampler = build(lora=False)
    sampler.denoiser.module.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing that it reaches requires grad: add an adapter"):
        sampler(embeds())
    with torch.no_grad():
        sampler(embeds())


def test_embeddings_of_inference_mode(build):
    with torch.inference_mode():
        prompts = embeds()
    with pytest.raises(ValueError, match="inference_mode"):
        build()(prompts)


def test_a_plan_is_a_plan(build):
    with pytest.raises(TypeError, match=r"plan must be an rftcore.sampling.Plan, got dict; see Plan.from_dict"):
        build(plan={"batch": 2})
