"""The pipeline that is fine-tuned: loading it, encoding the prompts once, letting the text encoder go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from rftcore import digits
from rftcore.training.config import ModelConfig, SamplingConfig
from rftcore.training.errors import UsageError

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
}


def load(config: ModelConfig, dtype: torch.dtype) -> StableDiffusionPipeline:
    """The pipeline of a hub name, a folder, or the embedded digits. Raises: UsageError where it cannot be loaded."""
    source = config.pretrained_model_name_or_path
    try:
        if source == "rftcore.digits":
            source = digits.path()
        return StableDiffusionPipeline.from_pretrained(
            source,
            revision=config.revision,
            variant=config.variant,
            torch_dtype=dtype,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError) as error:
        raise UsageError(
            f"model.pretrained_model_name_or_path={source!r} does not load as a StableDiffusionPipeline: {error}"
        ) from error


def check(pipeline: StableDiffusionPipeline) -> None:
    """Raises UsageError for a pipeline of another kind than this trainer serves."""
    if not isinstance(pipeline, StableDiffusionPipeline) or not isinstance(pipeline.unet, UNet2DConditionModel):
        raise UsageError(
            f"the model is a {type(pipeline).__name__}; a StableDiffusionPipeline with a UNet2DConditionModel is served"
        )
    out, latent = pipeline.unet.config.in_channels, pipeline.vae.config.latent_channels
    if out != latent:
        raise UsageError(
            f"the UNet takes {out} channels and the VAE gives {latent}: an inpainting or depth model is not served"
        )


def scheduler(pipeline: StableDiffusionPipeline, config: SamplingConfig) -> SchedulerMixin:
    """The chosen sampler with the model's own noise schedule and prediction type."""
    return SCHEDULERS[config.scheduler].from_config(pipeline.scheduler.config)


def sample_size(pipeline: StableDiffusionPipeline, config: SamplingConfig) -> int | tuple[int, int]:
    """Side of the latents. Raises: UsageError for a resolution that the VAE cannot give."""
    if config.resolution is None:
        return pipeline.unet.config.sample_size
    factor = pipeline.vae_scale_factor
    if config.resolution % factor:
        raise UsageError(
            f"sampling.resolution={config.resolution} must be a multiple of {factor}, the VAE's scale; "
            f"the nearest is {max(1, round(config.resolution / factor)) * factor}"
        )
    return config.resolution // factor


@dataclass(frozen=True)
class PromptEmbeddings:
    """Text embeddings (tokens, width) of every prompt of the run, and of the negative prompt."""

    positive: dict[str, Tensor]
    negative: Tensor

    def batch(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings of the prompts and of as many negative ones, (B, tokens, width) each."""
        positive = torch.stack([self.positive[prompt] for prompt in prompts])
        return positive, self.negative.expand_as(positive)


@torch.no_grad()
def encode_prompts(
    pipeline: StableDiffusionPipeline, prompts: Sequence[str], negative_prompt: str, device: torch.device
) -> PromptEmbeddings:
    """Encodes each distinct prompt once, then drops the pipeline's text encoder: training needs its memory."""
    pipeline.text_encoder.to(device).eval()
    distinct = [*dict.fromkeys([negative_prompt, *prompts])]
    encoded: dict[str, Tensor] = {}
    for start in range(0, len(distinct), 32):
        chunk = distinct[start : start + 32]
        embeddings, _ = pipeline.encode_prompt(chunk, device, 1, do_classifier_free_guidance=False)
        encoded |= zip(chunk, embeddings, strict=True)
    pipeline.text_encoder = None
    return PromptEmbeddings(encoded, encoded[negative_prompt])
