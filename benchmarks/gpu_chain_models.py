"""Models of random weights, and their chain and training step: by the sampler, and as other people's code has them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rftcore
from rftcore import published
from rftcore.sampling import Plan

GUIDANCE = 7.5
SCHEDULER = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
    steps_offset=1,
)  # fmt: skip

_TINY = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
_TINY_XL = {
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 34,
}
_TINY_VAE = {
    "block_out_channels": (16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
# UNet and autoencoder. Heads of `small` are as wide as SD1.5's.
CONFIGS: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "sd15": (published.UNETS["sd15"], published.AUTOENCODER),
    "sdxl": (published.UNETS["sdxl"], published.AUTOENCODER),
    "tiny": (_TINY, {**published.AUTOENCODER, **_TINY_VAE}),
    "tiny-xl": ({**_TINY, **_TINY_XL}, {**published.AUTOENCODER, **_TINY_VAE}),
    "small": (
        {**_TINY, "sample_size": 16, "block_out_channels": (80, 160), "cross_attention_dim": 64, "norm_num_groups": 16},
        {**published.AUTOENCODER, **_TINY_VAE},
    ),
}


def save(name: str, folder: Path) -> Path:
    """The configs of a model where `rftcore plan` finds them."""
    for part, options in zip(("unet", "vae"), CONFIGS[name], strict=True):
        (folder / name / part).mkdir(parents=True, exist_ok=True)
        (folder / name / part / "config.json").write_text(json.dumps(options))
    return folder / name


def make_unet(name: str, device: torch.device) -> UNet2DConditionModel:
    """Frozen, bf16, channels_last."""
    return _made(UNet2DConditionModel, CONFIGS[name][0], device)


def make_vae(name: str, device: torch.device) -> AutoencoderKL:
    """Frozen, bf16, channels_last."""
    return _made(AutoencoderKL, CONFIGS[name][1], device)


def _made(kind, options: Mapping[str, Any], device: torch.device):
    with torch.device(device):
        model = kind(**options)
    return model.to(torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_(False).eval()


def add_lora(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """r=4 on the attention, in fp32; B is not 0, which would leave A without a gradient."""
    config = LoraConfig(r=4, lora_alpha=4, target_modules=list(published.ATTENTION), init_lora_weights=False)
    unet.add_adapter(config)
    for parameter in trained(unet):
        parameter.data = parameter.data.float()
    return unet


def trained(unet: nn.Module) -> list[nn.Parameter]:
    return [p for p in unet.parameters() if p.requires_grad]


def brightness(images: Tensor, prompts: object = None, metadata: object = None) -> Tensor:
    """(b,) the mean of images (b, 3, H, W)."""
    return images.float().mean((1, 2, 3))


class Inputs(NamedTuple):
    """What a chain starts from: noise (B, 4, h, w) in fp32, and by name what the UNet is told in both branches."""

    noise: Tensor
    positive: dict[str, Tensor]
    negative: dict[str, Tensor]

    def double(self) -> Inputs:
        positive, negative = ({n: t.double() for n, t in group.items()} for group in self[1:])
        return Inputs(self.noise.double(), positive, negative)

    def of_sampler(self) -> dict[str, Any]:
        given: dict[str, Any] = {"latents": self.noise}
        for prefix, group in (("", self.positive), ("negative_", self.negative)):
            given[f"{prefix}prompt_embeds"] = group["prompt_embeds"]
            given[f"{prefix}added_cond_kwargs"] = _added(group)
        return given

    def of_unet(self) -> dict[str, Any]:
        """For both branches together."""
        both = {name: torch.cat([self.negative[name], tensor]) for name, tensor in self.positive.items()}
        return {"encoder_hidden_states": both["prompt_embeds"], "added_cond_kwargs": _added(both)}


def make_inputs(unet: UNet2DConditionModel, batch: int) -> Inputs:
    """The same ones at every call."""
    generator, size = torch.Generator(unet.device).manual_seed(0), unet.config.sample_size

    def normal(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=unet.device)

    shapes = published.conditioning(unet, batch)
    positive, negative = ({name: normal(t.shape, t.dtype) for name, t in shapes.items()} for _ in range(2))
    return Inputs(normal((batch, 4, size, size)), positive, negative)


def _added(group: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    return {name: tensor for name, tensor in group.items() if name != "prompt_embeds"} or None


class Chain(Protocol):
    def latents(self) -> Tensor:
        """The chain's end (B, 4, h, w), with a gradient where grad mode is on."""


class Ours:
    """A chain by the sampler, of an accelerated UNet."""

    def __init__(
        self,
        unet: nn.Module,
        inputs: Inputs,
        steps: int,
        backprop_steps: int,
        *,
        plan: Plan | None = None,
        capture: bool,
    ) -> None:
        self.sampler = rftcore.CheckpointedSampler(
            unet, SCHEDULER, num_inference_steps=steps, guidance_scale=GUIDANCE, backprop_steps=backprop_steps,
            plan=plan, capture=capture,
        )  # fmt: skip
        self._given = inputs.of_sampler()

    def latents(self) -> Tensor:
        return self.sampler(**self._given).latents


class Stock:
    """A chain by diffusers' scheduler; `checkpointed`: with `torch.utils.checkpoint` around each differentiated step."""

    def __init__(
        self, unet: nn.Module, inputs: Inputs, steps: int, backprop_steps: int, *, checkpointed: bool = False
    ) -> None:
        self._unet, self._noise, self._given = unet, inputs.noise, inputs.of_unet()
        self._steps, self._backprop_steps, self._checkpointed = steps, backprop_steps, checkpointed

    def latents(self) -> Tensor:
        scheduler, x = copy.deepcopy(SCHEDULER), self._noise
        scheduler.set_timesteps(self._steps, device=x.device)

        def step(x: Tensor, t: Tensor) -> Tensor:
            given = torch.cat([x, x]).to(self._unet.conv_in.weight.dtype)
            negative, positive = self._unet(given, t, **self._given, return_dict=False)[0].to(x.dtype).chunk(2)
            return scheduler.step(negative + GUIDANCE * (positive - negative), t, x, return_dict=False)[0]

        for index, t in enumerate(scheduler.timesteps):
            differentiated = torch.is_grad_enabled() and index >= self._steps - self._backprop_steps
            with torch.set_grad_enabled(differentiated):
                again = differentiated and self._checkpointed
                x = checkpoint(step, x, t, use_reentrant=False) if again else step(x, t)
        return x


class Training:
    """A training step: the chain, decoding and the reward, the backward, AdamW.

    Args:
        rewards: of latents, with gradient.
    """

    def __init__(self, chain: Chain, unet: nn.Module, rewards: Callable[[Tensor], Tensor]) -> None:
        self.chain, self._rewards, self._trained = chain, rewards, trained(unet)
        self._optimizer = torch.optim.AdamW(self._trained, lr=1e-5)

    def gradients(self) -> list[Tensor]:
        """Of the LoRA, without changing it."""
        (-self._rewards(self.chain.latents()).mean()).backward()
        found = [p.grad for p in self._trained]
        self._optimizer.zero_grad()
        return found

    def step(self) -> None:
        (-self._rewards(self.chain.latents()).mean()).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def chain_alone(self) -> None:
        """The chain and its backward from a given gradient: all that is there to wait for is in them."""
        latents = self.chain.latents()
        latents.backward(torch.ones_like(latents))
        self._optimizer.zero_grad()


def our_rewards(vae: nn.Module) -> Callable[[Tensor], Tensor]:
    """An image at a time."""
    return lambda latents: rftcore.score(vae, latents, brightness, [""] * len(latents))


def stock_rewards(vae: nn.Module) -> Callable[[Tensor], Tensor]:
    """The whole batch together."""

    def rewards(latents: Tensor) -> Tensor:
        images = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]
        return brightness((images.float() / 2 + 0.5).clamp(0, 1))

    return rewards
