"""A 2-d convolution by frozen weights: its backward needs no activation, and saves none."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rftcore.ops import autocast, backends, compiled


class Geometry(NamedTuple):
    """How a convolution walks: pairs (vertical, horizontal), and groups of channels. Padding is of zeros, both sides."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def frozen_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, *, backend: str = "auto"
) -> Tensor:
    """Convolves x by weight, with a gradient for x alone.

    PyTorch saves x although the gradient of x does not depend on it; nothing is saved here but the weight itself. The
    gradient is the transposed convolution of the output's, in x's dtype and memory format.

    Args:
        x: (N, C, H, W), fp64, fp32, bf16 or fp16.
        weight, bias: (K, C / groups, h, w) and (K,), in x's dtype or under autocast; they must not require grad.
        geometry: stride, padding, dilation, groups.
        backend: "auto", "torch" or "reference".

    Shapes: (N, K, H', W'), under autocast in its dtype.
    Raises: ValueError for inputs that do not fit or weights that require grad; RuntimeError where `backend` cannot
        serve them.
    """
    check_conv2d("frozen_conv2d", x, weight, bias, geometry)
    graph = torch.is_grad_enabled()
    for name, tensor in (("weight", weight), ("bias", bias)):
        if graph and tensor is not None and tensor.requires_grad:
            raise ValueError(
                f"frozen_conv2d: {name} requires grad and would receive none. Freeze it, {name}.requires_grad_(False), "
                "or use torch.nn.functional.conv2d."
            )
    if OP.choose(backend, x) == "torch" and graph and x.requires_grad:
        return _FrozenConv2d.apply(x, weight, bias, geometry)
    return frozen_conv2d_reference(x, weight, bias, geometry)


def frozen_conv2d_reference(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The specification, in plain PyTorch. Arguments as in `frozen_conv2d`, unchecked."""
    return F.conv2d(x, weight, bias, *geometry)


def conv2d_grad_x(
    grad: Tensor, weight: Tensor, geometry: Geometry, size: Sequence[int], memory_format: torch.memory_format
) -> Tensor:
    """The gradient, in grad's dtype and in `memory_format`, of a convolution's input of height and width `size`.

    The transposed convolution: bit for bit what `convolution_backward` computes, which wants the input to be there.
    """
    stride, padding, dilation, groups = geometry
    # What the forward's stride left over at the far edge.
    output_padding = [
        pixels - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
        for pixels, out, s, p, d, k in zip(
            size, grad.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True
        )
    ]
    grad, weight = grad.contiguous(memory_format=memory_format), weight.to(grad.dtype)
    return F.conv_transpose2d(grad, weight, None, stride, padding, output_padding, groups, dilation)


def memory_format_of(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format that PyTorch chooses for a convolution: channels_last where one of the two is."""
    channels_last = (t.is_contiguous(memory_format=torch.channels_last) and not t.is_contiguous() for t in (x, weight))
    return torch.channels_last if any(channels_last) else torch.contiguous_format


class _FrozenConv2d(torch.autograd.Function):
    """Saves the weight."""

    @staticmethod
    def forward(ctx, x, weight, bias, geometry):
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        ctx.options = geometry, x.shape[2:], memory_format_of(x, weight)
        return frozen_conv2d_reference(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx, grad_y):
        grad_x = compiled.backward(_FrozenConv2dBackward, grad_y, *ctx.saved_tensors, ctx.options)
        return grad_x.to(ctx.dtype), None, None, None


class _FrozenConv2dBackward(torch.autograd.Function):
    """The backward as a node of its own, so that differentiating it again is an error."""

    @staticmethod
    def forward(ctx, grad_y, weight, options):
        with autocast.disabled(grad_y.device):
            return conv2d_grad_x(grad_y, weight, *options)

    @staticmethod
    def backward(ctx, grad):
        raise compiled.differentiated_twice("frozen_conv2d")


OP = backends.register(
    backends.Op(
        "frozen_conv2d",
        {"torch": lambda x: backends.transform_reasons(), "reference": lambda x: []},
        lambda device, dtype: (torch.empty(2, 320, 64, 64, device=device, dtype=dtype),),
    )
)


def check_conv2d(op: str, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> None:
    """Raises: ValueError where these are not a 2-d convolution's on one device."""
    compiled.check_tensor(op, "x", x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x is {tuple(x.shape)}; it must be (N, C, H, W).")
    if weight.dim() != 4 or x.shape[1] % geometry.groups or weight.shape[0] % geometry.groups:
        raise ValueError(
            f"{op}: weight is {tuple(weight.shape)}; it must be (K, C / groups, h, w), and groups={geometry.groups} "
            f"must divide K and C={x.shape[1]}."
        )
    shape = (weight.shape[0], x.shape[1] // geometry.groups, *weight.shape[2:])
    compiled.check_like(op, "weight", weight, shape, x.device, "x")
    if bias is not None:
        compiled.check_like(op, "bias", bias, weight.shape[:1], x.device, "x")
