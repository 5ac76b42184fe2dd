"""A 2-d convolution with LoRA adapters: saves its input, and only because the adapters' gradients are made of it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from rftcore.ops import autocast, backends, compiled
from rftcore.ops.frozen_conv2d import Geometry, check_conv2d, conv2d_grad_x, memory_format_of
from rftcore.ops.projections import Adapter, Projection, flatten, restore


def lora_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    geometry: Geometry,
    *,
    backend: str = "auto",
) -> Tensor:
    """Convolves x by weight, and adds each adapter: a convolution by a, one of 1 x 1 by b, and its scale.

    Saves x, and where no weight and no adapter is trained, nothing; what a makes of x is recomputed. Whatever requires
    grad receives its gradient, exactly and once; a frozen weight costs nothing. Dtypes are PEFT's, as in `lora_linears`.

    Args:
        x: (N, C, H, W), fp64, fp32, bf16 or fp16. Its gradient has its memory format.
        weight, bias: (K, C / groups, h, w) and (K,).
        adapters: a (r, C, h, w), with the stride and padding of the base, no dilation and one group; b
            (K, r / groups, 1, 1), with the groups of the base.
        geometry: of the base.
        backend: "auto", "torch" or "reference".

    Shapes: (N, K, H', W'), under autocast in its dtype.
    Raises: ValueError for inputs that do not fit; RuntimeError where `backend` cannot serve them.
    """
    _check(x, weight, bias, adapters, geometry)
    if OP.choose(backend, x) == "reference":
        return lora_conv2d_reference(x, weight, bias, adapters, geometry)
    lower = autocast.active(x.device)
    tensors = flatten([Projection(weight, bias, tuple(adapters))])
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        scales = tuple(adapter.scale for adapter in adapters)
        return _LoraConv2d.apply((scales, geometry, lower), x, *tensors)
    return convolve(x, weight, bias, adapters, geometry, lower)


def lora_conv2d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Sequence[Adapter], geometry: Geometry
) -> Tensor:
    """The specification, in plain PyTorch. Arguments as in `lora_conv2d`, unchecked."""
    base = y = F.conv2d(x, weight, bias, *geometry)
    for a, b, scale in adapters:
        h = F.conv2d(x.to(a.dtype), a, None, geometry.stride, geometry.padding)
        y = y + F.conv2d(h, b, groups=geometry.groups) * scale
    return y.to(base.dtype)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Sequence[Adapter],
    geometry: Geometry,
    lower: torch.dtype | None,
) -> Tensor:
    """The convolution and its adapters, where nothing records a graph; `lower` is autocast's dtype."""
    if lower is None:
        y = F.conv2d(x, weight, bias, *geometry)
    else:
        low_x, low_weight = (t.to(autocast.lowered(t, lower)) for t in (x, weight))
        y = F.conv2d(low_x, low_weight, bias if bias is None else bias.to(autocast.lowered(bias, lower)), *geometry)
    for a, b, scale in adapters:
        h = _shrink(x, a.to(autocast.lowered(a, lower)), geometry)
        y.add_(F.conv2d(h, b.to(h.dtype), groups=geometry.groups), alpha=scale)
    return y


def _shrink(x, a, geometry):
    """What a, in the dtype to compute in, makes of x: (N, r, H', W')."""
    return F.conv2d(x.to(a.dtype), a, None, geometry.stride, geometry.padding)


def convolve_backward(
    grad_y: Tensor,
    x: Any,
    projection: Projection,
    needs_x: bool,
    needs: Projection,
    size: Sequence[int],
    memory_format: torch.memory_format,
    geometry: Geometry,
    lower: torch.dtype | None,
) -> tuple[Tensor | None, Projection]:
    """Gradients of x, in grad_y's dtype, and of the projection's tensors in their places; None where not needed.

    Args:
        x: None where no weight, a or b needs a gradient.
        needs_x, needs: which gradients to compute; `needs` is booleans in place of tensors.
        size, memory_format: of x.
    """
    weight, bias, adapters = projection
    grad_x = conv2d_grad_x(grad_y, weight, geometry, size, memory_format) if needs_x else None
    found = []
    for (a, b, scale), need in zip(adapters, needs.adapters, strict=True):
        narrow, pointwise = Geometry(geometry.stride, geometry.padding), Geometry(groups=geometry.groups)
        dtype = autocast.lowered(a, lower)
        grad = grad_y.to(dtype)
        below = conv2d_grad_x(grad, b, pointwise, grad.shape[2:], memory_format).mul_(scale)  # (N, r, H', W')
        if grad_x is not None:
            grad_x.add_(conv2d_grad_x(below, a, narrow, size, memory_format))
        grad_a: Any = None
        grad_b: Any = None
        if need.a:
            grad_a = conv2d_weight(x.to(dtype), a.shape, below, *narrow).to(a.dtype)
        if need.b:
            h = _shrink(x, a.to(dtype), geometry)
            grad_b = conv2d_weight(h, b.shape, grad, *pointwise).mul_(scale).to(b.dtype)
        found.append(Adapter(grad_a, grad_b, scale))
    of_weight: Any = None
    if needs.weight:
        of_weight = conv2d_weight(x.to(grad_y.dtype), weight.shape, grad_y, *geometry).to(weight.dtype)
    of_bias = grad_y.sum((0, 2, 3)).to(bias.dtype) if bias is not None and needs.bias else None
    return grad_x, Projection(of_weight, of_bias, tuple(found))


class _LoraConv2d(torch.autograd.Function):
    """Saves x; the backward recomputes what the adapters make of it."""

    @staticmethod
    def forward(ctx, options, x, *tensors):
        scales, geometry, lower = options
        (projection,) = restore(tensors, [scales])
        (needs,) = restore(ctx.needs_input_grad[2:], [scales])
        needs_x = needs.weight or any(adapter.a or adapter.b for adapter in needs.adapters)
        ctx.save_for_backward(x if needs_x else None, *tensors)
        ctx.dtype = x.dtype
        ctx.options = scales, x.shape[2:], memory_format_of(x, projection.weight), geometry, lower
        return convolve(x, *projection, geometry, lower)

    @staticmethod
    def backward(ctx, grad_y):
        needs = ctx.needs_input_grad[1:]
        grad_x, *others = compiled.backward(_LoraConv2dBackward, ctx.options, needs, grad_y, *ctx.saved_tensors)
        return None, None if grad_x is None else grad_x.to(ctx.dtype), *others


class _LoraConv2dBackward(torch.autograd.Function):
    """The backward as a node of its own, so that differentiating it again is an error."""

    @staticmethod
    def forward(ctx, options, needs, grad_y, x, *tensors):
        scales, *others = options
        (projection,) = restore(tensors, [scales])
        needs_x, *needs = needs
        (needs,) = restore(needs, [scales])
        with autocast.disabled(grad_y.device):
            grad_x, found = convolve_backward(grad_y, x, projection, needs_x, needs, *others)
        return grad_x, *flatten([found])

    @staticmethod
    def backward(ctx, *grads):
        raise compiled.differentiated_twice("lora_conv2d")


OP = backends.register(
    backends.Op(
        "lora_conv2d",
        {"torch": lambda x: backends.transform_reasons(), "reference": lambda x: []},
        lambda device, dtype: (torch.empty(2, 320, 64, 64, device=device, dtype=dtype),),
    )
)


def _check(x, weight, bias, adapters, geometry):
    check_conv2d("lora_conv2d", x, weight, bias, geometry)
    if adapters and geometry.dilation != (1, 1):
        raise ValueError(
            f"lora_conv2d: dilation={geometry.dilation} with adapters, whose a has none: their outputs differ in size. "
            "Only (1, 1) can be adapted."
        )
    for a, b, _ in adapters:
        compiled.check_like("lora_conv2d", "a", a, (*a.shape[:1], x.shape[1], *weight.shape[2:]), x.device, "x")
        shape = (weight.shape[0], a.shape[0] // geometry.groups, 1, 1)
        compiled.check_like("lora_conv2d", "b", b, shape, x.device, "x")
