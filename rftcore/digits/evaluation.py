"""Samples from the digits pipeline and counts what a judge reads in them."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline

from rftcore.digits.judges import Kernel, Reader, coarsen, ink_of

_BATCH = 50


def sample(
    pipeline: StableDiffusionPipeline, prompts: list[str], *, guidance_scale: float, steps: int, seed: int
) -> torch.Tensor:
    """Draw one image per prompt by deterministic DDIM: (B, 3, 32, 32) in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    settings = {"guidance_scale": guidance_scale, "num_inference_steps": steps, "eta": 0.0, "output_type": "pt"}
    batches = [prompts[start : start + _BATCH] for start in range(0, len(prompts), _BATCH)]
    return torch.cat([pipeline(batch, generator=generator, **settings).images for batch in batches])


@torch.no_grad()
def agreement(judge: Reader | Kernel, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Give the share of images (B, 3, H, W) in [0, 1] in which a judge reads the right digit of ``labels`` (B,)."""
    ink = ink_of(images)
    scores = judge(coarsen(ink) if isinstance(judge, Kernel) else ink)
    return (scores.argmax(dim=1) == labels).float().mean().item()
