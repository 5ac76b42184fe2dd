"""The pipeline that is fine-tuned: which kinds are served, how one is loaded, sampled and decoded."""

from __future__ import annotations

from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin

from rftcore.errors import UsageError
from rftcore.training import schedulers
from rftcore.training.config import ModelConfig, SamplingConfig
from rftcore.training.models import found, loading, served
from rftcore.training.models.loading import load
from rftcore.training.models.served import check
from rftcore.training.prompt_inputs import PromptInputs, encode_prompts

__all__ = [
    "PromptInputs",
    "check",
    "check_given",
    "check_sampling",
    "encode_prompts",
    "load",
    "sample_size",
    "scheduler",
    "unconditional",
    "vae",
]


def check_given(pipe: DiffusionPipeline, config: ModelConfig | None = None) -> None:
    """Raises UsageError for a pipeline that a user made, where it or what is set on it cannot be trained.

    Args:
        config: what would be loaded instead. Its name is passed over; what else it asks for would be lost.
    """
    for name in ("revision", "variant", "original_config", "vae", "fuse_lora"):
        if config is not None and getattr(config, name):
            raise UsageError(
                f"model.{name}={getattr(config, name)!r} is of a model that the run loads, and the trainer was given a "
                "pipeline; set it on the pipeline, and leave it out of the config"
            )
    found.check(pipe)
    check(pipe)
    loading.check_finite(pipe, f"the {type(pipe).__name__}")


def unconditional(pipe: DiffusionPipeline) -> bool:
    """Whether the model takes no prompt: its UNet makes pixels, and there is no VAE."""
    return isinstance(pipe, served.UNCONDITIONAL)


def vae(pipe: DiffusionPipeline) -> AutoencoderKL | None:
    """The decoder; None for a pixel-space model, as `rftcore.decode` and `rftcore.score` take it."""
    return None if unconditional(pipe) else pipe.vae


def scheduler(pipe: DiffusionPipeline, config: SamplingConfig) -> SchedulerMixin:
    """The chosen sampler with the model's own noise schedule, prediction type and clipping."""
    return schedulers.make(config.scheduler, pipe.scheduler.config)


def check_sampling(pipe: DiffusionPipeline, config: SamplingConfig) -> None:
    """Raises UsageError for a size that the model cannot make, and for a prompt where it takes none."""
    sample_size(pipe, config)
    kind = type(pipe).__name__
    if not unconditional(pipe):
        if config.guidance_scale < 1.0:
            raise UsageError(
                f"sampling.guidance_scale={config.guidance_scale} would weigh the negative prompt against the prompt; "
                "diffusers' pipelines take it for no guidance at all, such as SDXL-Turbo's 0.0: set "
                "sampling.guidance_scale=1.0 for that"
            )
    else:
        if config.guidance_scale != 1.0:
            raise UsageError(
                f"sampling.guidance_scale={config.guidance_scale}, and the {kind} takes no prompt to be guided by; set "
                "sampling.guidance_scale=1.0"
            )
        if config.negative_prompt:
            raise UsageError(
                f"sampling.negative_prompt={config.negative_prompt!r}, and the {kind} takes no prompt; leave it empty"
            )
        if config.clip_skip is not None:
            raise UsageError(
                f"sampling.clip_skip={config.clip_skip}, and the {kind} has no text encoder; set it to null"
            )


def sample_size(pipe: DiffusionPipeline, config: SamplingConfig) -> int | tuple[int, int]:
    """Side, or height and width, of what the UNet makes: latents, or pixels where there is no VAE.

    Raises: UsageError for a resolution that the model cannot make.
    """
    own = pipe.unet.config.sample_size
    if config.resolution is None:
        if own is None:
            raise UsageError(
                "the UNet's config has no sample_size; set sampling.resolution, the image's side in pixels"
            )
        return own if isinstance(own, int) else tuple(own)
    if unconditional(pipe):
        # Its up blocks meet the down blocks' outputs only at sides that every halving divides.
        multiple, whose, scale = 2 ** (len(pipe.unet.config.block_out_channels) - 1), "what the UNet halves it by", 1
    else:
        multiple, whose, scale = pipe.vae_scale_factor, "the VAE's scale", pipe.vae_scale_factor
    if config.resolution % multiple:
        raise UsageError(
            f"sampling.resolution={config.resolution} must be a multiple of {multiple}, {whose}; "
            f"the nearest is {max(1, round(config.resolution / multiple)) * multiple}"
        )
    return config.resolution // scale
