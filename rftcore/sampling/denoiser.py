"""One guided evaluation of a UNet, however it is wrapped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from rftcore.sampling.conditioning import GUIDANCE, Conditioning
from rftcore.sampling.lcm import guidance_embedding

# What is an argument of the UNet's own; `prompt_embeds` is what pipelines call it.
_UNET_ARGUMENT = {"prompt_embeds": "encoder_hidden_states", GUIDANCE: GUIDANCE}


class Denoiser:
    """Calls a UNet on a noisy sample, both branches of guidance in one batch.

    Args:
        unet: a diffusers `UNet2DConditionModel` or `UNet2DModel`, plain, PEFT-, compile-, accelerate- or DDP-wrapped.
        cross_attention_kwargs: handed to every call, e.g. {"scale": 0.5}.

    Attributes:
        embeds_guidance: whether the UNet is told its guidance scale, as those distilled from a guided one are, and runs
            one branch.

    Raises:
        TypeError: for a wrapper or model that is not served.
    """

    def __init__(self, unet: nn.Module, cross_attention_kwargs: Mapping[str, Any] | None = None) -> None:
        if not isinstance(unet, nn.Module):
            raise TypeError(f"unet must be a diffusers UNet module, got {type(unet).__name__}.")
        self.ddp = _find_ddp(unet)
        # DDP is entered once a chain (`synchronised`), not once a step: steps run on what it wraps.
        self.module = unet if self.ddp is None else self.ddp.module
        self.model = _unwrap(self.module)
        _check_model(self.model)
        self.conditional = "encoder_hidden_states" in inspect.signature(type(self.model).forward).parameters
        _check_constants(cross_attention_kwargs or {})
        self.embeds_guidance = getattr(self.config, "time_cond_proj_dim", None) is not None
        # Of one scale, by where it is: not to be copied to the device for every chain.
        self._embedded: dict[tuple, Tensor] = {}
        self.extra = {} if cross_attention_kwargs is None else {"cross_attention_kwargs": dict(cross_attention_kwargs)}

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the UNet's inputs: that of its first layer, which fp32 adapters leave alone."""
        return self._first_parameter().dtype

    @property
    def state_dtype(self) -> torch.dtype:
        """fp32, or fp64 with an fp64 UNet."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def device(self) -> torch.device:
        return self._first_parameter().device

    def _first_parameter(self) -> Tensor:
        # The model's own `dtype` walks all of its modules; this is asked at every step.
        return next(parameter for parameter in self.model.parameters() if parameter.is_floating_point())

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that require grad now, by their name in `module`."""
        return {name: parameter for name, parameter in self.module.named_parameters() if parameter.requires_grad}

    def guided(self, guidance_scale: float) -> bool:
        """Whether both branches are run for this scale."""
        return guidance_scale != 1.0 and not self.embeds_guidance

    def told(self, conditioning: Conditioning, guidance_scale: float) -> Conditioning:
        """The conditioning with the guidance scale, where the UNet embeds it."""
        if not self.embeds_guidance:
            return conditioning
        key = guidance_scale, self.device, self.dtype
        if key not in self._embedded:
            # Kept for later calls, which may be under grad mode.
            with torch.inference_mode(False):
                embedding = guidance_embedding(guidance_scale, self.config.time_cond_proj_dim)
                self._embedded = {key: embedding.to(self.device, self.dtype)}
        return conditioning.told(self._embedded[key])

    def check_conditioning(self, conditioning: Conditioning) -> None:
        """Raises ValueError unless the UNet takes what it is given."""
        if self.conditional and "prompt_embeds" not in conditioning.positive:
            raise ValueError(
                f"prompt_embeds=None, but {type(self.model).__name__} is conditioned on text: give (B, tokens, width) "
                "embeddings, e.g. from pipe.encode_prompt."
            )
        if getattr(self.config, "addition_embed_type", None) == "text_time":
            if missing := sorted({"text_embeds", "time_ids"} - conditioning.positive.keys()):
                raise ValueError(
                    f"added_cond_kwargs lacks {missing}, which an SDXL UNet needs: give text_embeds (B, width), the "
                    "pooled prompt embeddings, and time_ids (B, 6)."
                )
        if not self.conditional and conditioning.positive:
            raise ValueError(
                f"{type(self.model).__name__} is unconditional and takes no {sorted(conditioning.positive)}; "
                "call the sampler with batch_size= or latents= only."
            )

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        conditioning: dict[str, Tensor],
        *,
        guided: bool,
        parameters: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The UNet's raw output.

        Args:
            x: (B, C, h, w) state, cast to the UNet's dtype here.
            t: () or (B,) timesteps.
            conditioning: from `Conditioning.joined`.
            guided: run the batch twice, for [negative; positive].
            parameters: stand-ins for the module's parameters, by name.

        Returns:
            (B, C, h, w), or (2B, C, h, w) when guided.

        Raises:
            ValueError: for a UNet that has to be told its guidance scale, and is not.
        """
        if self.embeds_guidance and GUIDANCE not in conditioning:
            raise ValueError(
                f"the UNet has time_cond_proj_dim={self.config.time_cond_proj_dim}, and its conditioning lacks {GUIDANCE}, "
                "the embedded guidance scale; make it by Denoiser.told."
            )
        x = x.to(self.dtype)
        if guided:
            x = torch.cat([x, x])
            t = torch.cat([t, t]) if t.ndim else t
        kwargs: dict[str, Any] = {"return_dict": False, **self.extra}
        added = {}
        for name, tensor in conditioning.items():
            if name in _UNET_ARGUMENT:
                kwargs[_UNET_ARGUMENT[name]] = tensor.to(self.dtype)
            else:
                added[name] = tensor
        if added:
            kwargs["added_cond_kwargs"] = added
        if parameters:
            return torch.func.functional_call(self.module, dict(parameters), (x, t), kwargs)[0]
        return self.module(x, t, **kwargs)[0]

    def synchronised(self, function: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Calls `function` as one forward of the DDP wrapper, so that its gradients are averaged once.

        DDP arms its gradient reduction in its own forward. `function` stands in for the wrapped module there, and may
        evaluate that module as often as it likes; its outputs' backward must reach each parameter once.
        """
        if self.ddp is None or not torch.is_grad_enabled():
            return function()
        if self.ddp.mixed_precision is not None:
            raise TypeError("DistributedDataParallel(mixed_precision=...) is not served; use autocast, or a cast UNet.")
        ddp, module = self.ddp, self.ddp.module

        def within() -> tuple[Tensor, ...]:
            ddp.module = module
            return function()

        ddp.module = _StandIn(within)
        try:
            return ddp(None)
        finally:
            ddp.module = module


class _StandIn(nn.Module):
    def __init__(self, function: Callable[[], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, _: None) -> tuple[Tensor, ...]:
        return self.function()


def _find_ddp(module: nn.Module) -> DistributedDataParallel | None:
    module = getattr(module, "_orig_mod", module)
    if isinstance(module, DistributedDataParallel):
        return module
    wrapper = type(module).__name__
    # `fully_shard` wraps nothing and renames the class; the parameters tell. By name: DTensor is slow to import.
    sharded = any(type(parameter).__name__ == "DTensor" for parameter in module.parameters())
    if sharded or isinstance(module, DataParallel) or wrapper in ("FullyShardedDataParallel", "DeepSpeedEngine"):
        raise TypeError(
            f"unet is sharded or wrapped in {wrapper}, which is not served; "
            "use DistributedDataParallel (accelerate's default for several processes)."
        )
    return None


def _unwrap(module: nn.Module) -> nn.Module:
    module = getattr(module, "_orig_mod", module)
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def _check_model(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "in_channels") or not hasattr(config, "out_channels"):
        raise TypeError(
            f"unet={type(model).__name__} is not a diffusers UNet; allowed are UNet2DConditionModel and UNet2DModel."
        )
    if config.in_channels != config.out_channels:
        raise TypeError(
            f"unet has in_channels={config.in_channels} and out_channels={config.out_channels}: inpainting models and "
            "learned variances are not served; use a text-to-image or unconditional UNet with equal channels."
        )


def _check_constants(cross_attention_kwargs: Mapping[str, Any]) -> None:
    for name, value in cross_attention_kwargs.items():
        if isinstance(value, Tensor) and value.requires_grad:
            raise ValueError(
                f"cross_attention_kwargs[{name!r}] requires grad, and a replayed chain has no gradient for it; "
                "detach it, or make it a parameter of the UNet."
            )
