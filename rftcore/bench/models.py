"""The models of a comparison, by name: weights, what they are told, the noise they start from and the reward."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

import rftcore
from rftcore import published

# Stable Diffusion 1's shape in the small, untrained: 37 M parameters.
UNET_37M = {
    "sample_size": 64,
    "block_out_channels": (128, 256, 256),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
# A quarter of the published one's widths: beside that UNet it weighs what the published one weighs beside SD1.5's.
AUTOENCODER_37M = {**published.AUTOENCODER, "block_out_channels": (32, 64, 128, 128)}

_TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_TINY_AUTOENCODER = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
# So that the adapters do something: B = 0 would hide A's gradient.
_LORA_B = 0.02


class Shapes(NamedTuple):
    """Configs of a pipeline's parts, and the number of its text tokens."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    tokens: int = published.TOKENS

    @property
    def scale(self) -> int:
        """Pixels of an image's side for one of its latents'."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)


def shapes(name: str) -> Shapes:
    """Of a name among `bench_options.MODELS`."""
    if name == "digits":
        folder = Path(rftcore.digits.path())
        parts = ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json")
        unet, vae, scheduler, text = (json.loads((folder / part).read_text()) for part in parts)
        return Shapes(unet, vae, scheduler, text["max_position_embeddings"])
    if name == "tiny":
        return Shapes(_TINY_UNET, _TINY_AUTOENCODER, _SCHEDULER, 5)
    if name == "37m":
        return Shapes(UNET_37M, AUTOENCODER_37M, _SCHEDULER)
    return Shapes(published.UNETS[name], published.AUTOENCODER, _SCHEDULER)


@dataclass
class Problem:
    """Models with a LoRA, and what a chain of them starts from.

    Attributes:
        noise: (B, 4, h, w), fp32, or fp64 from fp64 models.
        positive, negative: what the UNet is told in the two branches, by the names of `rftcore.sampling`.
        reward: (images (B, 3, H, W), prompts, metadata) -> (B,).
        dtype: that the weights were drawn in, and that autocast has.
    """

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDIMScheduler
    noise: Tensor
    positive: dict[str, Tensor]
    negative: dict[str, Tensor]
    prompts: list[str]
    reward: Callable[..., Tensor]
    guidance_scale: float
    dtype: torch.dtype

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.unet.parameters() if p.requires_grad]

    @property
    def weight_bytes(self) -> int:
        return sum(p.nbytes for model in (self.unet, self.vae) for p in model.parameters())


def make(
    name: str,
    *,
    dtype: torch.dtype,
    base: torch.dtype,
    lora: torch.dtype,
    rank: int,
    batch: int,
    resolution: int | None,
    guidance_scale: float,
    device: str = "cpu",
) -> Problem:
    """The same problem at every call: weights are drawn in `dtype`, then held in `base`, and the LoRA's in `lora`.

    Under a FakeTensorMode weights take no memory, and the digits' are not loaded.
    """
    parts, fake = shapes(name), _faked()
    adapter = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(published.ATTENTION))
    size = (resolution or parts.scale * parts.unet["sample_size"]) // parts.scale
    prompts: list[str] = [""] * batch
    reward: Callable[..., Tensor] = brightness
    told: list[dict[str, Tensor]] | None = None
    torch.manual_seed(0)
    if fake:
        unet, vae = _without_data(parts, adapter, base, lora)
    else:
        unet, vae = _untrained(parts, dtype)
    if name == "digits":
        prompts, reward = (rftcore.digits.train_prompts() * batch)[:batch], rftcore.digits.reward
        with _disable_current_modes():
            # Its judge is kept for the next call, with its data.
            reward(torch.zeros(1, 3, 32, 32), prompts[:1])
        if not fake:
            pipe = StableDiffusionPipeline.from_pretrained(rftcore.digits.path())
            unet.load_state_dict(pipe.unet.state_dict())
            vae.load_state_dict(pipe.vae.state_dict())
            with torch.no_grad():
                told = [{"prompt_embeds": text} for text in pipe.encode_prompt(prompts, "cpu", 1, True)]
    if not fake:
        for model in (unet, vae):
            model.requires_grad_(False).eval().to(device=device, dtype=base)
        unet.add_adapter(adapter)
        _draw_lora(unet, rank, dtype, lora)
    noise = torch.randn(batch, unet.config.in_channels, size, size)
    if told is None:
        like = published.conditioning(unet, batch, parts.tokens)
        told = [{key: torch.randn(meta.shape) for key, meta in like.items()} for _ in range(2)]
    state = torch.promote_types(base, torch.float32)
    positive, negative = ({key: t.to(device, dtype).to(base) for key, t in group.items()} for group in told)
    with _disable_current_modes():
        scheduler = DDIMScheduler.from_config(dict(parts.scheduler))
    if base is torch.float64:
        # A step forms its coefficients in the table's dtype.
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    noise = noise.to(device, state)
    return Problem(unet, vae, scheduler, noise, positive, negative, prompts, reward, guidance_scale, dtype)


def brightness(images: Tensor, prompts: Sequence[str] = (), metadata: object = None) -> Tensor:
    """(b,) the mean of images (b, 3, H, W)."""
    return (images if images.dtype is torch.float64 else images.float()).mean((1, 2, 3))


def _faked() -> bool:
    """Whether tensors that are made now have no data."""
    return isinstance(torch.empty(()), torch._subclasses.FakeTensor)


def _untrained(parts: Shapes, dtype: torch.dtype) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    with _default(dtype):
        return UNet2DConditionModel.from_config(dict(parts.unet)), AutoencoderKL.from_config(dict(parts.vae))


def _without_data(
    parts: Shapes, adapter: LoraConfig, base: torch.dtype, lora: torch.dtype
) -> tuple[UNet2DConditionModel, AutoencoderKL]:
    """Models of the mode's tensors, which no module can be moved to."""
    with _disable_current_modes(), torch.device("meta"):
        unet, vae = _untrained(parts, base)
        for model in (unet, vae):
            model.requires_grad_(False).eval()
        unet.add_adapter(adapter)
    for module in (*unet.modules(), *vae.modules()):
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=lora if weight.requires_grad else base)
                module._parameters[name] = nn.Parameter(empty, requires_grad=weight.requires_grad)
    return unet, vae


def _draw_lora(unet: nn.Module, rank: int, dtype: torch.dtype, lora: torch.dtype) -> None:
    """The same numbers in every dtype that is at least as wide as `dtype`."""
    torch.manual_seed(1)
    for name, parameter in unet.named_parameters():
        if parameter.requires_grad:
            drawn = (_LORA_B if "lora_B" in name else 1 / rank) * torch.randn(parameter.shape)
            parameter.data = drawn.to(dtype).to(parameter.device, lora)


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
