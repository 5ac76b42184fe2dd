"""The models of the published checkpoints by their names, of fake tensors, and inputs for them."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode

from rftcore import published
from rftcore.published import ATTENTION, AUTOENCODER, UNETS

__all__ = ["ATTENTION", "AUTOENCODER", "UNETS", "autoencoder", "unet", "unet_inputs"]


def unet(name: str, lora_dtype: torch.dtype | None, rank: int = 4) -> tuple[UNet2DConditionModel, FakeTensorMode]:
    """A frozen bf16 UNet of fake tensors with LoRA on its attention, and the mode to run it in.

    Args:
        name: of `UNETS`.
        lora_dtype: None: no adapter.
    """
    return published.unet(UNETS[name], lora_dtype, rank)


def autoencoder() -> tuple[AutoencoderKL, FakeTensorMode]:
    """The frozen bf16 autoencoder of SD and SDXL, of fake tensors, and the mode to run it in."""
    model, mode = published.autoencoder()
    # As it is trained through, where stock keeps what its dropouts make.
    return model.train(), mode


def unet_inputs(name: str, mode: FakeTensorMode, batch: int = 1) -> tuple[tuple, dict]:
    """Positional and keyword arguments of one evaluation at the model's own resolution; the latents require grad."""
    options = UNETS[name]
    size = options["sample_size"]
    with mode:
        latents = torch.randn(batch, 4, size, size, dtype=torch.bfloat16, requires_grad=True)
        text = torch.randn(batch, 77, options["cross_attention_dim"], dtype=torch.bfloat16)
        added = {"text_embeds": torch.randn(batch, 1280, dtype=torch.bfloat16), "time_ids": torch.randn(batch, 6)}
        return (latents, torch.tensor([3]), text), ({"added_cond_kwargs": added} if name == "sdxl" else {})
