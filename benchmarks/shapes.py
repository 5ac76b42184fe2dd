"""The models of the published checkpoints, by shape, with weights that take no memory."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

UNETS = {
    "sd15": {
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "block_out_channels": (320, 640, 1280, 1280),
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


def unet(name: str, lora_dtype: torch.dtype | None, rank: int = 4) -> tuple[UNet2DConditionModel, FakeTensorMode]:
    """A frozen bf16 UNet of fake tensors with LoRA on its attention, and the mode to run it in.

    Args:
        name: "sd15" or "sdxl".
        lora_dtype: None: no adapter.
    """
    model = _on_meta(UNet2DConditionModel, UNETS[name])
    if lora_dtype is not None:
        with torch.device("meta"):
            model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ATTENTION)))
    return _fake(model, lora_dtype)


def autoencoder() -> tuple[AutoencoderKL, FakeTensorMode]:
    """The frozen bf16 autoencoder of SD and SDXL, of fake tensors, and the mode to run it in."""
    return _fake(_on_meta(AutoencoderKL, AUTOENCODER), None)


def unet_inputs(name: str, mode: FakeTensorMode, batch: int = 1) -> tuple[tuple, dict]:
    """Positional and keyword arguments of one evaluation at the model's own resolution; the latents require grad."""
    options = UNETS[name]
    size = options["sample_size"]
    with mode:
        latents = torch.randn(batch, 4, size, size, dtype=torch.bfloat16, requires_grad=True)
        text = torch.randn(batch, 77, options["cross_attention_dim"], dtype=torch.bfloat16)
        added = {"text_embeds": torch.randn(batch, 1280, dtype=torch.bfloat16), "time_ids": torch.randn(batch, 6)}
        return (latents, torch.tensor([3]), text), ({"added_cond_kwargs": added} if name == "sdxl" else {})


def _on_meta(kind, options):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return kind(**options).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def _fake(model, trained_dtype):
    """The same model with weights that believe to be on a CPU."""
    mode = FakeTensorMode()
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                dtype = trained_dtype if weight.requires_grad else weight.dtype
                with mode:
                    fake = torch.empty(weight.shape, dtype=dtype)
                module._parameters[name] = torch.nn.Parameter(fake, requires_grad=weight.requires_grad)
    return model, mode
