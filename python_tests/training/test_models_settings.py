"""What is set on a pipeline that a trainer is given is respected, or refused with the way to undo it."""

import pytest
import tiny
import torch
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from peft import LoraConfig

import rftcore
from rftcore.training import UsageError, pipeline
from rftcore.training.config import ModelConfig

CPU = torch.device("cpu")
PROMPTS = tiny.TRAIN_PROMPTS[:2]


class Doubled(AttnProcessor):
    """A user's own attention."""

    def __call__(self, attn, hidden_states, *arguments, **given):
        return 2 * super().__call__(attn, hidden_states, *arguments, **given)


def load(folder):
    pipe = pipeline.load(ModelConfig(pretrained_model_name_or_path=str(folder)), torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, noise):
    """As the trainer makes them: accelerated, in chains with a gradient, decoded."""
    pipeline.check_given(pipe)
    inputs = pipeline.encode_prompts(pipe, PROMPTS, "", CPU, 8)
    for model in (pipe.unet, pipe.vae):
        rftcore.accelerate(model)
    pipe.unet.requires_grad_(False).conv_in.weight.requires_grad_(True)
    sampler = rftcore.CheckpointedSampler(
        pipe.unet, pipe.scheduler, num_inference_steps=2, guidance_scale=2.0, backprop_steps=1
    )
    return rftcore.decode(pipe.vae, sampler(**inputs.batch(PROMPTS), latents=noise).latents)


def stock_images(pipe, noise):
    return pipe(PROMPTS, latents=noise, num_inference_steps=2, guidance_scale=2.0, output_type="pt").images


def _set_without_effect(pipe):
    pipe.enable_attention_slicing(1)
    pipe.vae.enable_slicing()
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.unet.enable_gradient_checkpointing()


def _tile(pipe):
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 8


def _adapt(pipe):
    torch.manual_seed(1)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


# What is set, and whether it changes images.
RESPECTED = {
    "slicing, channels_last and checkpointing": ([_set_without_effect], False),
    "an attention processor and VAE tiling": ([lambda pipe: pipe.unet.set_attn_processor(Doubled()), _tile], True),
    "FreeU and an adapter of the text encoder": (
        [lambda pipe: pipe.enable_freeu(s1=0.6, s2=0.3, b1=1.5, b2=1.6), _adapt],
        True,
    ),
}


@pytest.mark.parametrize("setting", RESPECTED)
def test_settings_that_are_respected(folders, setting):
    """Images are those of the pipeline's own call with these settings, each of which changes them, or none does."""
    changes, matters = RESPECTED[setting]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    stock, ours = load(folders["sd"]), load(folders["sd"])
    before = stock_images(stock, noise)
    for change in changes:
        change(ours)
        change(stock)
        expected = stock_images(stock, noise)
        assert (torch.linalg.norm(expected - before) > 1e-3 * torch.linalg.norm(before)) == matters
        before = expected
    found = images(ours, noise)
    assert torch.linalg.norm(found - expected) < 1e-5 * torch.linalg.norm(expected)
    if not matters:
        assert any(isinstance(processor, SlicedAttnProcessor) for processor in ours.unet.attn_processors.values())
    # The gradient passes them all.
    (gradient,) = torch.autograd.grad(found.square().sum(), ours.unet.conv_in.weight)
    assert gradient.isfinite().all() and gradient.any()


def _offload(pipe):
    pipe.enable_sequential_cpu_offload(device="cpu")


def _offload_unet(pipe):
    from accelerate.hooks import CpuOffload, add_hook_to_module

    # What enable_model_cpu_offload attaches; itself it asks for an accelerator.
    add_hook_to_module(pipe.unet, CpuOffload(execution_device=CPU))


def _compile(pipe):
    pipe.unet = torch.compile(pipe.unet)


def _replace_forward(pipe):
    own = pipe.unet.forward
    pipe.unet.forward = lambda *arguments, **given: own(*arguments, **given)


def _quantise(pipe):
    layer = pipe.unet.conv_in
    layer.weight = torch.nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)


def _subclass(pipe):
    class Packed(torch.Tensor):
        pass

    layer = pipe.unet.conv_in
    layer.weight = torch.nn.Parameter(layer.weight.data.as_subclass(Packed), requires_grad=False)


def _project(pipe):
    pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")


REFUSED = {
    "sequential offload": (_offload, "offloaded .*remove_all_hooks"),
    "model offload": (_offload_unet, "unet is offloaded .CpuOffload., .*remove_all_hooks"),
    "group offload": (
        lambda pipe: pipe.unet.enable_group_offload(CPU, CPU, offload_type="leaf_level"),
        "unet has diffusers' hooks .*group_offload",
    ),
    "layerwise casting": (
        lambda pipe: pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
        "unet has diffusers' hooks .*layerwise_casting",
    ),
    "device map": (lambda pipe: setattr(pipe, "hf_device_map", {"unet": 0}), "device_map=.*reset_device_map"),
    "meta": (lambda pipe: pipe.vae.to("meta"), "vae has weights on the meta device"),
    "compiled": (_compile, "unet is compiled; give its _orig_mod, and set memory.compile"),
    "a cache": (_replace_forward, "unet.forward was replaced"),
    "quantised": (_quantise, "unet is quantised .conv_in.weight is torch.int8.*without a quantization_config"),
    "packed": (_subclass, "unet is quantised .conv_in.weight is a Packed"),
    "IP-Adapter": (_project, "IP-Adapter.*pipeline.unload_ip_adapter"),
    "fused projections": (lambda pipe: pipe.fuse_qkv_projections(), "unfuse_qkv_projections"),
}


@pytest.mark.parametrize("setting", REFUSED)
def test_settings_that_are_refused(folders, setting):
    change, message = REFUSED[setting]
    pipe = load(folders["sd"])
    pipeline.check_given(pipe)
    change(pipe)
    with pytest.raises(UsageError, match=f"the pipeline cannot be trained as it is set: .*{message}"):
        pipeline.check_given(pipe)


def test_what_undoes_a_setting_is_what_the_message_says(folders):
    pipe = load(folders["sd"])
    pipe.enable_sequential_cpu_offload(device="cpu")
    pipe.remove_all_hooks()
    pipe.fuse_qkv_projections()
    pipe.unfuse_qkv_projections()
    pipeline.check_given(pipe)
