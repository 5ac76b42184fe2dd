"""A tiny pipeline of each kind that the trainer serves, of random weights, and the settings that go with each."""

from __future__ import annotations

from pathlib import Path

import tiny
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from rftcore.digits.vocabulary import write_tokenizer


def build_xl(folder: Path) -> StableDiffusionXLPipeline:
    """SDXL's two text encoders, of widths 16 and 24, and a pooled text of 20; 16-px images from latents (4, 8, 8)."""
    torch.manual_seed(0)
    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoders = [
        kind(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=width,
                projection_dim=20,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        for kind, width in ((CLIPTextModel, 16), (CLIPTextModelWithProjection, 24))
    ]
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=16 + 24,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 20,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.13025,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        # SDXL's own, in the words of its base model's config.
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )


def build_pixels(folder: Path) -> DDPMPipeline:
    """An unconditional model of 16-px RGB images, with the clipping scheduler of the published ones."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_num_groups=4,
    )
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler(clip_sample=True, variance_type="fixed_small"))


BUILDERS = {"sd": tiny.build_pipeline, "sdxl": build_xl, "pixels": build_pixels}
# A model without a prompt has none to be guided by.
GUIDANCE = {"sd": 2.0, "sdxl": 2.0, "pixels": 1.0}


def save(kind: str, folder: Path) -> DiffusionPipeline:
    """Writes the pipeline of that kind into the folder, and returns it."""
    pipeline = (BUILDERS | VARIANT_BUILDERS)[kind](folder)
    pipeline.save_pretrained(folder)
    return pipeline


def _build_sd2(folder: Path) -> StableDiffusionPipeline:
    """SD 2's linear projections, a head size for each level, and v-prediction."""
    pipe = tiny.build_pipeline(folder)
    torch.manual_seed(1)
    pipe.unet = UNet2DConditionModel.from_config(
        pipe.unet.config, use_linear_projection=True, attention_head_dim=(2, 4)
    )
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    return pipe


def _build_turbo(folder: Path) -> StableDiffusionXLPipeline:
    """SDXL-Turbo: SDXL with the scheduler of its config."""
    pipe = build_xl(folder)
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe


def _build_lcm(folder: Path) -> StableDiffusionPipeline:
    """Distilled from a guided model: its UNet is told the guidance scale, at a width of 6."""
    pipe = tiny.build_pipeline(folder)
    torch.manual_seed(1)
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, time_cond_proj_dim=6)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return pipe


# Those that differ from the kinds above in their settings alone, and what they are sampled with.
VARIANT_BUILDERS = {"sd2": _build_sd2, "turbo": _build_turbo, "lcm": _build_lcm}
SAMPLING = {
    "sd": {"guidance_scale": 2.0},
    "sd2": {"guidance_scale": 2.0},
    "sdxl": {"guidance_scale": 2.0},
    "turbo": {"guidance_scale": 1.0, "scheduler": "euler_ancestral"},
    "lcm": {"guidance_scale": 8.0, "scheduler": "lcm"},
    "pixels": {"guidance_scale": 1.0},
}
