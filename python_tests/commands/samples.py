"""Images by `rftcore sample`, and the pipelines that they are compared with."""

import json

import diffusers
import numpy
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from rftcore import digits
from rftcore.commands import sample as sample_command
from rftcore.commands.sample_options import SampleOptions
from rftcore.digits.vocabulary import write_tokenizer

PROMPTS = ["a handwritten four", "a handwritten two"]
ENDINGS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]


def sample(folder, **options):
    """Pixels by file name, and the record."""
    given = {"prompt": PROMPTS, "num_inference_steps": 4, "guidance_scale": 2.0, "output_dir": str(folder)}
    if "prompts" in options:
        del given["prompt"]
    sample_command.sample(SampleOptions(**{**given, **options}))
    record = json.loads((folder / "metadata.json").read_text())
    return {item["file"]: pixels(folder / item["file"]) for item in record["images"]}, record


def pixels(path):
    return numpy.asarray(Image.open(path)).astype(int)


def largest_difference(found, expected):
    assert found.keys() == expected.keys()
    return max(abs(found[name] - expected[name]).max() for name in found)


def stock(**options):
    return StableDiffusionPipeline.from_pretrained(
        digits.path(), safety_checker=None, requires_safety_checker=False, **options
    )


def sdxl_pipeline(folder):
    """SDXL with few weights: 16-px images from latents (4, 8, 8)."""
    torch.manual_seed(0)
    write_tokenizer(folder / "words")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "words")
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        projection_dim=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=4 * 6 + 16,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        add_watermarker=False,
    )
