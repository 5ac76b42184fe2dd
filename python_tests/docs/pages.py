"""The pages that users read, and what their code blocks may name."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from models import text_unet
from peft import LoraConfig

import rftcore

ROOT = Path(__file__).parents[2]


def pages():
    """README.md, CONTRIBUTING.md, CHANGELOG.md and docs/."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def label(page):
    return str(page.relative_to(ROOT))


@rftcore.rewards.declare(differentiable=True)
def brightness(images, prompts, metadata=None):
    return images.mean((1, 2, 3))


def names():
    """A reader's surroundings, in the small: models, a scheduler, embeddings, prompts, and a reward."""
    torch.manual_seed(0)
    prompt_embeds, negative_prompt_embeds = torch.randn(2, 2, 5, 12).unbind(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    return {
        "torch": torch,
        "rftcore": rftcore,
        "LoraConfig": LoraConfig,
        "unet": text_unet(
            block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
        ),
        "vae": vae.requires_grad_(False),
        "scheduler": DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False),
        "prompts": ["a handwritten seven", "the digit two"],
        "prompt_embeds": prompt_embeds,
        "negative_prompt_embeds": negative_prompt_embeds,
        "positive": prompt_embeds,
        "negative": negative_prompt_embeds,
        "rows": torch.arange(2),
        "steps": torch.tensor([3, 7]),
        "generator": torch.Generator().manual_seed(0),
        "reward": brightness,
        "my_reward": brightness,
    }
