"""The pipeline that is fine-tuned: which kinds are served, how one is loaded, sampled and decoded."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id

from rftcore import digits
from rftcore.training.config import ModelConfig, SamplingConfig
from rftcore.training.errors import UsageError
from rftcore.training.prompt_inputs import PromptInputs, encode_prompts

__all__ = [
    "PromptInputs",
    "check",
    "check_sampling",
    "encode_prompts",
    "load",
    "sample_size",
    "scheduler",
    "unconditional",
    "vae",
]

SCHEDULERS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_ancestral": EulerAncestralDiscreteScheduler,
}
_TEXT_TO_IMAGE = (StableDiffusionPipeline, StableDiffusionXLPipeline)
_UNCONDITIONAL = (DDPMPipeline, DDIMPipeline)
_SERVED = [kind.__name__ for kind in (*_TEXT_TO_IMAGE, *_UNCONDITIONAL)]
_TEXT_COMPONENTS = ("unet", "vae", "scheduler", "tokenizer", "text_encoder")
_COMPONENTS = {
    StableDiffusionPipeline: _TEXT_COMPONENTS,
    StableDiffusionXLPipeline: (*_TEXT_COMPONENTS, "tokenizer_2", "text_encoder_2"),
    DDPMPipeline: ("unet", "scheduler"),
    DDIMPipeline: ("unet", "scheduler"),
}


def load(config: ModelConfig, dtype: torch.dtype, unet_dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """The pipeline of a hub name, a folder, or the embedded digits, of the class that it was saved as.

    Args:
        dtype: of all its models.
        unet_dtype: of its UNet, where that is another.

    Raises:
        UsageError: where it cannot be loaded, or is of a kind that is not served; that is asked before its weights are
            read or fetched.
    """
    name = config.pretrained_model_name_or_path
    source = digits.path() if name == "rftcore.digits" else name
    try:
        kind = DiffusionPipeline.load_config(source, revision=config.revision).get("_class_name")
        if kind not in _SERVED:
            raise UsageError(_not_served(f"model.pretrained_model_name_or_path={name!r} is a {kind}"))
        # Other classes do not know a safety checker.
        no_checker = {"safety_checker": None, "requires_safety_checker": False}
        pipe = DiffusionPipeline.from_pretrained(
            source,
            revision=config.revision,
            variant=config.variant,
            torch_dtype={"unet": unet_dtype or dtype, "default": dtype},
            **(no_checker if kind == StableDiffusionPipeline.__name__ else {}),
        )
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(
            f"model.pretrained_model_name_or_path={name!r} does not load: {_why(name, config, error)}"
        ) from error
    check(pipe)
    return pipe


def check(pipe: DiffusionPipeline) -> None:
    """Raises UsageError for a pipeline of another kind than this trainer serves, or one that lacks a part."""
    kind = next((kind for kind in _COMPONENTS if isinstance(pipe, kind)), None)
    if kind is None:
        raise UsageError(_not_served(f"the model is a {type(pipe).__name__}"))
    missing = [name for name in _COMPONENTS[kind] if getattr(pipe, name, None) is None]
    if missing:
        raise UsageError(
            f"the {type(pipe).__name__} has no {', '.join(missing)}; load it whole, by {kind.__name__}.from_pretrained"
        )
    unet, wanted = pipe.unet, UNet2DModel if kind in _UNCONDITIONAL else UNet2DConditionModel
    if not isinstance(unet, wanted):
        raise UsageError(
            f"the {type(pipe).__name__}'s UNet is a {type(unet).__name__}; a {wanted.__name__} is served there"
        )
    if unet.config.in_channels != unet.config.out_channels:
        raise UsageError(
            f"the UNet takes {unet.config.in_channels} channels and gives {unet.config.out_channels}: inpainting, "
            "depth and learned-variance models are not served; give a model whose UNet predicts the noise alone"
        )
    given = [key for key in ("class_embed_type", "num_class_embeds") if unet.config.get(key) is not None]
    if given:
        raise UsageError(
            f"the UNet is conditioned on classes ({given[0]}={unet.config[given[0]]}), which is not served; give a "
            "model of text or without conditioning"
        )
    if kind in _UNCONDITIONAL:
        _check_pixel_space(unet)
    else:
        _check_latent(pipe)


def _check_pixel_space(unet: UNet2DModel) -> None:
    if unet.config.in_channels != 3:
        raise UsageError(
            f"the UNet makes images of {unet.config.in_channels} channels; rewards see RGB, so a model of 3 is served"
        )


def _check_latent(pipe: StableDiffusionPipeline | StableDiffusionXLPipeline) -> None:
    unet = pipe.unet.config
    if unet.in_channels != pipe.vae.config.latent_channels:
        raise UsageError(
            f"the UNet takes {unet.in_channels} channels and the VAE gives {pipe.vae.config.latent_channels}: an "
            "inpainting or depth model is not served; give the text-to-image model that it was made from"
        )
    is_xl = isinstance(pipe, StableDiffusionXLPipeline)
    if unet.addition_embed_type != ("text_time" if is_xl else None) or unet.encoder_hid_dim_type is not None:
        raise UsageError(
            f"the UNet's addition_embed_type={unet.addition_embed_type!r} and encoder_hid_dim_type="
            f"{unet.encoder_hid_dim_type!r} are not those of a {type(pipe).__name__}; load it by its own pipeline class"
        )
    if is_xl:
        known = 6 * unet.addition_time_embed_dim + pipe.text_encoder_2.config.projection_dim
        if unet.projection_class_embeddings_input_dim != known:
            raise UsageError(
                f"the UNet takes {unet.projection_class_embeddings_input_dim} added values and SDXL's base model gives "
                f"{known} (6 sizes and the pooled text): the refiner is not served; fine-tune the base model, and "
                "refine its images afterwards"
            )


def unconditional(pipe: DiffusionPipeline) -> bool:
    """Whether the model takes no prompt: its UNet makes pixels, and there is no VAE."""
    return isinstance(pipe, _UNCONDITIONAL)


def vae(pipe: DiffusionPipeline) -> AutoencoderKL | None:
    """The decoder; None for a pixel-space model, as `rftcore.decode` and `rftcore.score` take it."""
    return None if unconditional(pipe) else pipe.vae


def scheduler(pipe: DiffusionPipeline, config: SamplingConfig) -> SchedulerMixin:
    """The chosen sampler with the model's own noise schedule, prediction type and clipping."""
    return SCHEDULERS[config.scheduler].from_config(pipe.scheduler.config)


def check_sampling(pipe: DiffusionPipeline, config: SamplingConfig) -> None:
    """Raises UsageError for a size that the model cannot make, and for a prompt where it takes none."""
    sample_size(pipe, config)
    if unconditional(pipe):
        kind = type(pipe).__name__
        if config.guidance_scale != 1.0:
            raise UsageError(
                f"sampling.guidance_scale={config.guidance_scale}, and the {kind} takes no prompt to be guided by; set "
                "sampling.guidance_scale=1.0"
            )
        if config.negative_prompt:
            raise UsageError(
                f"sampling.negative_prompt={config.negative_prompt!r}, and the {kind} takes no prompt; leave it empty"
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


def _not_served(what: str) -> str:
    return (
        f"{what}; served are {', '.join(_SERVED)}. For inpainting, image-to-image and ControlNet fine-tune the "
        "text-to-image model that they were made from, whose LoRA they load too; SDXL's refiner refines what a "
        "fine-tuned base model makes; transformers (SD3, Flux) are not served"
    )


def _why(name: str, config: ModelConfig, error: Exception) -> str:
    """What is wrong with a place that no pipeline came from, and what to do."""
    path = Path(name)
    if path.is_file():
        return (
            "it is one file; make a pipeline's folder of it, by StableDiffusionPipeline.from_single_file(file) (or the "
            "XL one) and .save_pretrained(folder), and give that folder"
        )
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return str(error)
        return (
            "the folder holds no model_index.json, so it is no pipeline; give one that pipeline.save_pretrained(folder)"
            f" wrote{' (this one is a single model, or a LoRA)' if any(path.glob('*.safetensors')) else ''}"
        )
    if not _is_hub_name(name):
        return "there is no such folder"
    # diffusers says of a hub that it cannot reach that the repository lacks the file.
    unreachable = isinstance(error.__context__, LocalEntryNotFoundError)
    reason = "the hub cannot be reached, and its cache does not hold it" if unreachable else _first_line(error)
    revision = f" --revision {config.revision}" if config.revision else ""
    return (
        f"there is no such folder here, and it did not come from the hub ({reason}). Without network: run "
        f"`hf download {name}{revision} --local-dir FOLDER` on a machine with one, copy FOLDER here and set "
        "model.pretrained_model_name_or_path to it"
    )


def _is_hub_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].strip()
