"""Which pipelines are served, and what their models must be."""

from __future__ import annotations

from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDPMPipeline,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)

from rftcore.errors import UsageError

TEXT_TO_IMAGE = (StableDiffusionPipeline, StableDiffusionXLPipeline)
UNCONDITIONAL = (DDPMPipeline, DDIMPipeline)
SERVED = tuple(kind.__name__ for kind in (*TEXT_TO_IMAGE, *UNCONDITIONAL))
_TEXT_COMPONENTS = ("unet", "vae", "scheduler", "tokenizer", "text_encoder")
_COMPONENTS = {
    StableDiffusionPipeline: _TEXT_COMPONENTS,
    StableDiffusionXLPipeline: (*_TEXT_COMPONENTS, "tokenizer_2", "text_encoder_2"),
    DDPMPipeline: ("unet", "scheduler"),
    DDIMPipeline: ("unet", "scheduler"),
}


def check(pipe: DiffusionPipeline) -> None:
    """Raises UsageError for a pipeline of another kind than this trainer serves, or one that lacks a part."""
    kind = next((kind for kind in _COMPONENTS if isinstance(pipe, kind)), None)
    if kind is None:
        raise UsageError(not_served(f"the model is a {type(pipe).__name__}"))
    missing = [name for name in _COMPONENTS[kind] if getattr(pipe, name, None) is None]
    if missing:
        raise UsageError(
            f"the {type(pipe).__name__} has no {', '.join(missing)}; load it whole, by {kind.__name__}.from_pretrained"
        )
    unet, wanted = pipe.unet, UNet2DModel if kind in UNCONDITIONAL else UNet2DConditionModel
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
    if "beta_schedule" not in pipe.scheduler.config:
        raise UsageError(
            f"the model's scheduler is a {type(pipe.scheduler).__name__}, whose noise is no schedule of betas: models of "
            "EDM and of flow matching are not served; give a model of DDPM's noise, such as SD, SDXL or LCM"
        )
    if kind in UNCONDITIONAL:
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
    if not isinstance(pipe.vae, AutoencoderKL):
        raise UsageError(
            f"the {type(pipe).__name__}'s VAE is a {type(pipe.vae).__name__}; an AutoencoderKL is served there"
        )
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


def not_served(what: str) -> str:
    """`what`, and what is served instead."""
    return (
        f"{what}; served are {', '.join(SERVED)}. For inpainting, image-to-image and ControlNet fine-tune the "
        "text-to-image model that they were made from, whose LoRA they load too; SDXL's refiner refines what a "
        "fine-tuned base model makes; transformers (SD3, Flux) are not served"
    )
