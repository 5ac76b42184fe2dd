"""A StableDiffusionPipeline of a few thousand weights, rewards of every temper, and a run small enough for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from rftcore.digits.vocabulary import write_tokenizer
from rftcore.rewards import declare
from rftcore.training.algorithm_configs import DraftConfig
from rftcore.training.parsing import build

TRAIN_PROMPTS = ["a handwritten one", "a handwritten two", "a handwritten three"]
HELD_OUT_PROMPTS = ["a handwritten four", "a handwritten five"]


def build_pipeline(folder: Path) -> StableDiffusionPipeline:
    """Random weights: 16-px images from latents (4, 8, 8)."""
    torch.manual_seed(0)
    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            projection_dim=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def values(model: Path | str, output_dir: Path, /, **groups) -> dict:
    """A run's config as a nested mapping; `groups` is merged over it, group by group."""
    base = {
        "output_dir": str(output_dir),
        "prompts": TRAIN_PROMPTS,
        "model": {"pretrained_model_name_or_path": str(model)},
        "sampling": {"num_inference_steps": 3, "guidance_scale": 2.0},
        "train": {"max_train_steps": 3, "batch_size": 2, "learning_rate": 1e-2, "backprop_steps": 2},
        "lora": {"rank": 2},
        "reward": {"function": "tiny.brightness"},
        "eval": {
            "validation_prompts": HELD_OUT_PROMPTS,
            "num_validation_images": 1,
            "held_out_reward": "tiny.contrast",
            "lora_scales": [],
        },
    }
    for key, value in groups.items():
        base[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    return base


def config(model: Path | str, output_dir: Path, /, **groups) -> DraftConfig:
    """The same as a config object."""
    return build(DraftConfig, values(model, output_dir, **groups))


@declare(differentiable=True, unit="points")
def brightness(images, prompts, metadata=None):
    return -(images - 0.7).square().mean(dim=(1, 2, 3))


@declare(differentiable=False)
def contrast(images, prompts, metadata=None):
    return images.detach().std(dim=(1, 2, 3))


@declare(differentiable=True)
def detached(images, prompts, metadata=None):
    return images.detach().mean(dim=(1, 2, 3))


@declare(differentiable=True)
def scalar(images, prompts, metadata=None):
    return images.mean()


@declare(differentiable=True)
def not_a_number(images, prompts, metadata=None):
    return images.mean(dim=(1, 2, 3)) * float("nan")


@declare(differentiable=True)
def flat(images, prompts, metadata=None):
    return (images * 0).sum(dim=(1, 2, 3))


def undeclared(images, prompts, metadata=None):
    return images.mean(dim=(1, 2, 3))
