"""The models of the published checkpoints, by shape, with weights that take no memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

# Text tokens of CLIP, which all of these are conditioned on.
TOKENS = 77

UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "block_out_channels": (320, 640, 1280, 1280),
    },
    # The 768 px model, of v-prediction.
    "sd21": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "block_out_channels": (320, 640, 1280, 1280),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}

AUTOENCODER = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


def unet(
    options: Mapping[str, Any],
    lora_dtype: torch.dtype | None,
    rank: int = 4,
    target_modules: Sequence[str] | str = ATTENTION,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[UNet2DConditionModel, FakeTensorMode]:
    """A frozen UNet of fake tensors with LoRA, and the mode to run it in.

    Args:
        options: of the UNet2DConditionModel, such as UNETS["sd15"].
        lora_dtype: None: no adapter.
        target_modules: that are adapted, as PEFT takes them.

    Raises:
        ValueError: where no module has one of these names.
    """
    model = _on_meta(UNet2DConditionModel, options, dtype)
    if lora_dtype is not None:
        targets = target_modules if isinstance(target_modules, str) else list(target_modules)
        with torch.device("meta"):
            model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    return _fake(model, lora_dtype)


def autoencoder(
    options: Mapping[str, Any] = AUTOENCODER, dtype: torch.dtype = torch.bfloat16
) -> tuple[AutoencoderKL, FakeTensorMode]:
    """A frozen autoencoder of fake tensors, by default that of SD and SDXL, and the mode to run it in."""
    return _fake(_on_meta(AutoencoderKL, options, dtype), None)


def conditioning(unet: UNet2DConditionModel, rows: int, tokens: int = TOKENS) -> dict[str, Tensor]:
    """What a UNet is told besides latents and time, by the names of `rftcore.sampling`, on the meta device.

    Raises:
        ValueError: for a UNet that is told something else than text, or text and sizes as SDXL's.
    """
    config, dtype = unet.config, unet.dtype

    def empty(*shape: int) -> Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device="meta")

    widths = config.encoder_hid_dim or config.cross_attention_dim
    made = {"prompt_embeds": empty(tokens, widths if isinstance(widths, int) else widths[0])}
    if config.addition_embed_type == "text_time":
        sizes = 6
        pooled = config.projection_class_embeddings_input_dim - sizes * config.addition_time_embed_dim
        made |= {"text_embeds": empty(pooled), "time_ids": empty(sizes)}
    unknown = {"addition_embed_type": ("text_time",), "class_embed_type": (), "encoder_hid_dim_type": ("text_proj",)}
    for name, known in unknown.items():
        if config[name] is not None and config[name] not in known:
            raise ValueError(f"{name}={config[name]!r} of the UNet's config is not served.")
    return made


def _on_meta(kind: Any, options: Mapping[str, Any], dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return kind.from_config(dict(options)).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)


def _fake(model: nn.Module, trained_dtype: torch.dtype | None) -> Any:
    """The same model with weights that believe to be on a CPU."""
    mode = FakeTensorMode()
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                dtype = trained_dtype if weight.requires_grad else weight.dtype
                with mode:
                    fake = torch.empty(weight.shape, dtype=dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=weight.requires_grad)
    return model, mode
