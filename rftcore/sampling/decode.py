"""From latents to images to rewards, with the gradient of the latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rftcore.sampling.ambient import Ambient
from rftcore.sampling.gradient_path import is_whole

CLAMPS = ("hard", "straight_through", "none")
ON_NAN = ("stop", "drop")

# A decoder's gradients lie near 1e-6 for an image of 512 px, below fp16's normal range. Powers of two are exact; the
# second is for rewards whose own gradient is large.
_FP16_GRADIENT_SCALES = (2.0**12, 1.0)
# Prompts that an error names.
_NAMED = 8


class RewardError(ValueError):
    """A reward returned something that cannot be trained on."""


@overload
def decode(vae: nn.Module | None, latents: Tensor, *, images_per_call: int = 1, clamp: str = "hard") -> Tensor: ...


@overload
def decode(
    vae: nn.Module | None,
    latents: Tensor,
    *,
    images_per_call: int = 1,
    clamp: str = "hard",
    return_stats: Literal[True],
) -> tuple[Tensor, dict[str, Tensor]]: ...


def decode(
    vae: nn.Module | None,
    latents: Tensor,
    *,
    images_per_call: int = 1,
    clamp: str = "hard",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Decodes latents to images, with gradient, on the memory of one image.

    For rewards that look at the whole batch together; others are cheaper by `score`. What the decoder computes is not
    kept: the backward pass decodes each image again, one more forward of the decoder. A decoder that is itself trained
    keeps its graph.

    Args:
        vae: a diffusers autoencoder; its config's scaling, shift, latent mean/std and `force_upcast` are applied.
            None for a pixel-space model.
        latents: (B, C, h, w) as a sampler gives them.
        images_per_call: b, how many images are decoded, and differentiated, together; b >= B decodes but once.
        clamp: "hard", as diffusers does, has no gradient where an image is saturated; "straight_through" clamps and
            passes the gradient as if it did not; "none" leaves values outside [0, 1].
        return_stats: also give {"saturated": (B,)}, the share of an image's values outside [0, 1].

    Returns:
        (B, 3, H, W) in [0, 1], in the latents' dtype.

    Raises:
        ValueError: for an unknown clamp, latents of a wrong shape, or images_per_call that is no positive number.
    """
    if clamp not in CLAMPS:
        raise ValueError(f"clamp={clamp!r} is not known; allowed are {', '.join(map(repr, CLAMPS))}.")
    if latents.ndim != 4:
        raise ValueError(f"latents has shape {tuple(latents.shape)}; it must be (B, C, h, w).")
    parts = _parts(latents.shape[0], images_per_call)
    again = len(parts) > 1 and torch.is_grad_enabled() and latents.requires_grad
    if again and vae is not None and not any(parameter.requires_grad for parameter in vae.parameters()):
        images, saturated = _Decode.apply(vae, clamp, parts, _runs_in_fp16(vae, latents), latents)
    else:
        pairs = [_images(vae, latents[part], clamp) for part in parts] or [_images(None, latents, clamp)]
        images, saturated = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
    return (images, {"saturated": saturated}) if return_stats else images


def _parts(count: int, images_per_call: int) -> list[slice]:
    if not is_whole(images_per_call) or images_per_call < 1:
        raise ValueError(f"images_per_call={images_per_call!r} must be a whole number >= 1.")
    return [slice(i, i + images_per_call) for i in range(0, count, images_per_call)]


def _images(vae: nn.Module | None, latents: Tensor, clamp: str) -> tuple[Tensor, Tensor]:
    """Images (b, 3, H, W), and the share of each one's values outside [0, 1], in plain autograd."""
    images = (latents if vae is None else _decode(vae, _unscaled(vae, latents)).to(latents.dtype)) / 2 + 0.5
    saturated = ((images < 0) | (images > 1)).flatten(1).to(images.dtype).mean(1).detach()
    if clamp == "hard":
        images = images.clamp(0, 1)
    elif clamp == "straight_through":
        images = images + (images.clamp(0, 1) - images).detach()
    return images, saturated


class _Decode(torch.autograd.Function):
    """Keeps the latents, and decodes them once more for their gradient."""

    @staticmethod
    def forward(
        ctx: Any, vae: Any, clamp: str, parts: list[slice], fp16: bool, latents: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.vae, ctx.clamp, ctx.parts, ctx.fp16 = vae, clamp, parts, fp16
        ctx.ambient = Ambient.capture(latents.device)
        # The weights are saved for their version check: a decoder changed before the backward would be another one.
        ctx.save_for_backward(latents, *(p for p in vae.parameters() if not p.is_inference()))
        images, shares = zip(*(_images(vae, latents[part], clamp) for part in parts), strict=True)
        # Autocast has cached casts without a graph.
        torch.clear_autocast_cache()
        saturated = torch.cat(shares)
        ctx.mark_non_differentiable(saturated)
        return torch.cat(images), saturated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_images: Tensor, _: Any) -> tuple[None, None, None, None, Tensor]:
        latents = ctx.saved_tensors[0]
        gradients = []
        for part in ctx.parts:
            piece = latents[part].detach().requires_grad_()
            with torch.enable_grad(), ctx.ambient.restored():
                images, _ = _images(ctx.vae, piece, ctx.clamp)
            for scale in _FP16_GRADIENT_SCALES if ctx.fp16 else (1.0,):
                (gradient,) = torch.autograd.grad(images, piece, grad_images[part] * scale, retain_graph=ctx.fp16)
                gradient = gradient / scale
                # Asked in fp16 alone: the answer is waited for.
                if not ctx.fp16 or bool(gradient.isfinite().all()):
                    break
            gradients.append(gradient)
            del images
        return None, None, None, None, torch.cat(gradients)


def score(
    vae: nn.Module | None,
    latents: Tensor,
    reward: Callable[[Tensor, Sequence[str], Any], Tensor],
    prompts: Sequence[str],
    metadata: Sequence[Any] | None = None,
    *,
    images_per_call: int = 1,
    clamp: str = "hard",
    on_nan: str = "stop",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, dict[str, Any]]:
    """Rewards of latents, differentiable, on the memory of one image.

    Under grad mode each image is decoded, scored and backpropagated to its latent at once, and only that gradient is
    kept for the backward pass. The gradient reaches `latents` alone, not the parameters of `vae` or `reward`; for a
    reward that looks at the whole batch together use `decode`.

    Args:
        vae, latents, clamp: as in `decode`.
        reward: (images (b, 3, H, W) in [0, 1], prompts, metadata) -> (b,), in reward points.
        prompts: B strings.
        metadata: B values handed to the reward, or None.
        images_per_call: b, how many images are decoded and scored together.
        on_nan: what a reward of NaN or inf, a gradient of one, or an image that is not finite means: "stop" raises;
            "drop" gives NaN for that sample, whose gradient is exactly zero.
        return_stats: also give {"saturated": (B,), "dropped": (B,)}: as in `decode`, and which samples were dropped;
            for a reward with a method `with_parts`, which gives its values and {name: (b,)} of what they are made of,
            also "parts", {name: (B,)}.

    Returns:
        (B,) rewards in the latents' dtype, and the stats if asked for.

    Raises:
        RewardError: when the reward returns a wrong shape or, unless they are dropped, NaN or inf, or, under grad mode,
            is declared or found not to be differentiable.
        ValueError: for arguments that do not fit.
    """
    count = latents.shape[0]
    if count == 0:
        raise ValueError("latents holds no images; score needs at least one.")
    if len(prompts) != count or isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of {count} strings, one for each latent, got {_describe(prompts)}.")
    if metadata is not None and len(metadata) != count:
        raise ValueError(f"metadata must hold one value for each of the {count} latents, got {len(metadata)}.")
    if on_nan not in ON_NAN:
        raise ValueError(f"on_nan={on_nan!r} is not known; allowed are {', '.join(map(repr, ON_NAN))}.")
    parts = _parts(count, images_per_call)
    differentiate = torch.is_grad_enabled() and latents.requires_grad
    if differentiate and not getattr(reward, "differentiable", True):
        raise RewardError(
            f"reward {_name(reward)} is declared not differentiable (its `differentiable` is False), and a gradient is "
            "asked for: use a differentiable reward, or a policy gradient, which samples without a gradient."
        )
    if torch.is_grad_enabled() and latents.is_inference():
        raise ValueError(
            "latents were sampled under torch.inference_mode, whose tensors no gradient can pass: sample in grad mode "
            "to train on them, or call score under torch.no_grad() to only measure."
        )

    # Of a sum's rewards, by a part's first image: a part that is scored again replaces its values.
    summands: dict[int, dict[str, Tensor]] = {}
    call: Callable[..., Any] = getattr(reward, "with_parts", None) or (lambda *given: (reward(*given), {}))

    def evaluate(part: slice, piece: Tensor) -> tuple[Tensor, Tensor]:
        images, saturated = _images(vae, piece, clamp)
        rewards, summands[part.start] = call(images, prompts[part], None if metadata is None else metadata[part])
        _check_shape(reward, rewards, len(prompts[part]))
        # A reward that rounds or compares makes a number of anything.
        return rewards.masked_fill(~images.detach().flatten(1).isfinite().all(1), torch.nan), saturated

    if differentiate:
        rewards, saturated, dropped = _Score.apply(
            evaluate, reward, prompts, parts, summands, on_nan, _runs_in_fp16(vae, latents), latents
        )
    else:
        with torch.no_grad():
            pairs = [evaluate(part, latents[part]) for part in parts]
        rewards, saturated = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        dropped = ~rewards.isfinite()
        if on_nan == "stop":
            _check_finite(reward, rewards, prompts, (~dropped).tolist(), _joined(summands, parts))
        rewards, saturated = rewards.masked_fill(dropped, torch.nan).to(latents), saturated.to(latents)
    if not return_stats:
        return rewards
    stats = {"saturated": saturated, "dropped": dropped}
    if hasattr(reward, "with_parts"):
        stats["parts"] = _joined(summands, parts)
    return rewards, stats


class _Score(torch.autograd.Function):
    """Keeps only d reward / d latent, (B, C, h, w)."""

    @staticmethod
    def forward(
        ctx: Any,
        evaluate: Callable[[slice, Tensor], tuple[Tensor, Tensor]],
        reward: Any,
        prompts: Sequence[str],
        parts: list[slice],
        summands: Mapping[int, dict[str, Tensor]],
        on_nan: str,
        fp16: bool,
        latents: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # By part; Any: none of them is None once all parts were scored.
        rewards, shares, gradients = ([cast(Any, None)] * len(parts) for _ in range(3))
        todo = list(range(len(parts)))
        for scale in _FP16_GRADIENT_SCALES if fp16 else (1.0,):
            for number in todo:
                piece = latents[parts[number]].detach().requires_grad_()
                with torch.enable_grad():
                    values, shares[number] = evaluate(parts[number], piece)
                gradients[number] = _gradient(reward, values, piece, scale)
                rewards[number] = values.detach()
            # Of all images at once: the answer is waited for.
            joined, slopes = torch.cat(rewards), torch.cat(gradients)
            usable = torch.stack([joined.isfinite(), slopes.flatten(1).isfinite().all(1)])  # (2, B)
            finite, sound = usable.tolist()
            if on_nan == "stop":
                _check_finite(reward, joined, prompts, finite, _joined(summands, parts))
            steep = [known and not slope for known, slope in zip(finite, sound, strict=True)]
            todo = [number for number, part in enumerate(parts) if any(steep[part])]
            if not todo:
                break
        if todo and on_nan == "stop":
            raise RewardError(
                f"the gradient of reward {_name(reward)} with respect to the latents is NaN or inf, though the "
                "reward is not: look for a square root, norm or logarithm at zero, or an overflow in fp16 (use a "
                "bf16 or fp32 VAE)."
            )
        saturated, dropped = torch.cat(shares), ~usable.all(0)
        ctx.save_for_backward(slopes, *([] if all(finite) and all(sound) else [dropped]))
        ctx.mark_non_differentiable(saturated, dropped)
        return joined.masked_fill(dropped, torch.nan).to(latents), saturated, dropped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rewards: Tensor, *_: Any) -> tuple[None, None, None, None, None, None, None, Tensor]:
        slopes, *dropped = ctx.saved_tensors
        per_image = (-1, *[1] * (slopes.ndim - 1))
        gradient = grad_rewards.reshape(per_image) * slopes
        if dropped:
            # NaN times zero would be NaN.
            gradient = gradient.masked_fill(dropped[0].reshape(per_image), 0)
        return None, None, None, None, None, None, None, gradient


def _runs_in_fp16(vae: nn.Module | None, latents: Tensor) -> bool:
    kind = latents.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind) is torch.float16
    return vae is not None and next(vae.parameters()).dtype is torch.float16


def _gradient(reward: Any, values: Tensor, piece: Tensor, scale: float) -> Tensor:
    """d values / d piece, per image, computed at `scale` times its size."""
    gradient = None
    if values.requires_grad:
        seed = torch.full_like(values, scale)
        # As it was computed: a reward that left the caller's autocast would find itself in it again.
        with torch.autocast(piece.device.type, enabled=False):
            (gradient,) = torch.autograd.grad(values, piece, seed, allow_unused=True)
    if gradient is None:
        raise RewardError(
            f"reward {_name(reward)} cut the graph: what it returned does not depend differentiably on the images. "
            "Look for no_grad, detach, round, argmax, thresholds, PIL or NumPy in it; or use a policy gradient."
        )
    return gradient / scale


def _check_shape(reward: Any, values: Any, count: int) -> None:
    if not isinstance(values, Tensor) or tuple(values.shape) != (count,) or not values.is_floating_point():
        raise RewardError(
            f"reward {_name(reward)} returned {_describe(values)}; it must return a floating-point tensor of shape "
            f"{(count,)}, one value for each image."
        )


def _joined(summands: Mapping[int, dict[str, Tensor]], parts: Sequence[slice]) -> dict[str, Tensor]:
    """Of a sum's rewards, all images' values (B,), by name."""
    found = [summands[part.start] for part in parts]
    return {name: torch.cat([values[name].detach() for values in found]) for name in found[0]}


def _check_finite(
    reward: Any, values: Tensor, prompts: Sequence[str], finite: Sequence[bool], summands: Mapping[str, Tensor]
) -> None:
    if not all(finite):
        first = list(finite).index(False)
        guilty = [name for name, column in summands.items() if not bool(column[first].isfinite())]
        which = f" (of which {', '.join(map(repr, guilty))})" if guilty else ""
        broken = [(prompt, value) for prompt, value, ok in zip(prompts, values.tolist(), finite, strict=True) if not ok]
        others = ", ".join(repr(prompt) for prompt, _ in broken[1:_NAMED])
        more = f" and {len(broken) - 1} more ({others}{', ...' if len(broken) > _NAMED else ''})" if others else ""
        raise RewardError(
            f"reward {_name(reward)}{which} returned {broken[0][1]} for the prompt {broken[0][0]!r}{more}; rewards must be "
            'finite. Mend the reward, or drop such samples (on_nan="drop", in a run reward.on_nan=drop).'
        )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} of length {len(value)}" if hasattr(value, "__len__") else type(value).__name__


def _name(reward: Any) -> str:
    return repr(getattr(reward, "__name__", type(reward).__name__))


def _unscaled(vae: nn.Module, latents: Tensor) -> Tensor:
    """Undoes what the training set's latents were scaled by."""
    config = vae.config
    latents = latents / config.scaling_factor
    if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
        mean, std = (
            latents.new_tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std)
        )
        return latents * std + mean
    if getattr(config, "shift_factor", None) is not None:
        return latents + config.shift_factor
    return latents


def _decode(vae: nn.Module, latents: Tensor) -> Tensor:
    dtype = next(vae.parameters()).dtype
    if dtype is torch.float16 and getattr(vae.config, "force_upcast", False):
        if torch.is_grad_enabled() and any(getattr(m, "gradient_checkpointing", False) for m in vae.modules()):
            raise ValueError(
                "vae is fp16 with force_upcast, which decodes by an fp32 copy of its weights, and its gradient "
                "checkpointing would replay the fp16 ones: call vae.disable_gradient_checkpointing() (score holds one "
                "image's graph at a time anyway), or vae.to(torch.float32)."
            )
        # SDXL's decoder overflows in fp16. The user's module stays as it is; the fp32 copy lives as long as the graph.
        wide = {f"vae.{name}": tensor.float() for name, tensor in vae.state_dict(keep_vars=True).items()}
        return torch.func.functional_call(_Decoder(vae), wide, (latents.float(),))
    return vae.decode(latents.to(dtype), return_dict=False)[0]


class _Decoder(nn.Module):
    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents, return_dict=False)[0]
