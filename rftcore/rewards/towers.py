"""Models that are only looked through: nothing of them is trained, and little of what they compute is kept."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Module = TypeVar("Module", bound=nn.Module)

# What the largest gradient of an image's features becomes: fp16 ends at 65504, and is exact above 6e-5.
_LARGEST = 2.0**4


def freeze(module: Module) -> Module:
    """The module itself, in evaluation mode, none of whose parameters has a gradient."""
    return module.requires_grad_(False).eval()


def checkpoint_layers(layers: Iterable[nn.Module]) -> None:
    """Lets each layer keep its input alone, and compute the rest again in the backward.

    Names, parameters and values stay as they are; without grad mode nothing changes. Layers that draw random numbers
    are not served.
    """
    for layer in layers:
        layer.forward = functools.partial(_recomputed, layer)


def looked_at(function: Callable[[Tensor], Tensor], pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """function(pixels), of a tower of that dtype, in fp32 at least and under no autocast of a caller's.

    Args:
        function: of pixels (B, 3, H, W) in fp32, gives (B, ...) in any dtype; images do not mix.
    """

    def widened(pixels: Tensor) -> Tensor:
        outputs = function(pixels)
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))

    with torch.autocast(pixels.device.type, enabled=False):
        return through_fp16(widened, pixels) if dtype is torch.float16 else widened(pixels)


def through_fp16(function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """function(inputs), whose backward computes at a size that fp16 holds, however small or large its gradients are.

    Each row's gradient is multiplied by a power of two before the function's own backward, and divided by it after.

    Args:
        function: of fp32 (B, ...), computes in fp16 and gives fp32 (B, ...); rows do not mix.
    """
    scales: list[Tensor] = []
    return _Raised.apply(function(_Lowered.apply(inputs, scales)), scales)


class _Raised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, scales: list[Tensor]) -> Tensor:
        ctx.scales = scales
        return outputs.view_as(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        largest = gradient.flatten(1).abs().amax(1)
        scale = torch.exp2(torch.floor(torch.log2(_LARGEST / largest)))
        # A row of zeros, or of NaN, stays what it is.
        scale = torch.where(scale.isfinite() & (scale > 0), scale, torch.ones_like(scale))
        ctx.scales[:] = [scale]
        return gradient * _over_rows(scale, gradient), None


class _Lowered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, scales: list[Tensor]) -> Tensor:
        ctx.scales = scales
        return inputs.view_as(inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / _over_rows(ctx.scales[0], gradient), None


def _over_rows(scale: Tensor, like: Tensor) -> Tensor:
    return scale.view(-1, *[1] * (like.ndim - 1))


def _recomputed(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(layer).forward, layer)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
