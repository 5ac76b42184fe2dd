"""GroupNorm of a ResNet: the time embedding before it, scale and shift and SiLU after it, and the backward."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rftcore.ops import autocast, backends, compiled
from rftcore.ops.measured import bucket


def group_norm_silu(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_groups: int,
    eps: float,
    *,
    channel_bias: Tensor | None = None,
    scale_shift: tuple[Tensor, Tensor] | None = None,
    activation: str | None = "silu",
    backend: str = "auto",
) -> Tensor:
    """silu(group_norm(x + channel_bias) * (1 + scale) + shift), computed in fp32 (fp64 with an fp64 input).

    Saves its inputs and the groups' statistics, neither the normalised value nor the output. Gradients flow, exactly
    and once, to every tensor that requires one; a frozen weight and bias cost nothing.

    Args:
        x: (N, C, ...), fp64, fp32, bf16 or fp16. The output, and its gradient, have its dtype and memory format.
        weight, bias: (C,), of any of these dtypes. None: 1 and 0.
        num_groups: divides C.
        channel_bias: (N, C), added before the norm. None: 0.
        scale_shift: scale and shift, (N, C) each. None: 0 and 0.
        activation: "silu" or None.
        backend: "auto", "cpu", "cuda", "torch" (PyTorch's own operations, which round and keep values in between) or
            "reference".

    Shapes: (N, C, ...), like x.
    Raises: ValueError for inputs that do not fit; RuntimeError where `backend` cannot serve them.
    """
    scale, shift = (None, None) if scale_shift is None else scale_shift
    _check(x, weight, bias, num_groups, channel_bias, scale, shift, activation)
    inputs = (x, weight, bias, channel_bias, scale, shift, num_groups, eps, activation == "silu")
    if (chain := _CHAINS.get(OP.choose(backend, x))) is not None:
        return chain(*inputs)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:6]):
        return _GroupNormSiLU.apply(*inputs)
    return _forward(*inputs)[0]


def group_norm_silu_reference(x, weight, bias, channel_bias, scale, shift, num_groups, eps, silu) -> Tensor:
    """The specification, in plain PyTorch. Arguments as in `group_norm_silu`, unchecked."""
    dtype = compiled.maths_dtype(x)

    def per_channel(values):  # (C,) or (N, C) -> (1 or N, C, 1, ...)
        return values.to(dtype).reshape(-1, x.shape[1], *[1] * (x.dim() - 2))

    y = x.to(dtype)
    if channel_bias is not None:
        y = y + per_channel(channel_bias)
    grouped = y.reshape(x.shape[0], num_groups, math.prod(x.shape[1:]) // num_groups)
    mean = grouped.sum(2, keepdim=True) / max(grouped.shape[2], 1)
    variance = (grouped - mean).square().sum(2, keepdim=True) / max(grouped.shape[2], 1)
    y = ((grouped - mean) * torch.rsqrt(variance + eps)).reshape(x.shape)
    if weight is not None:
        y = y * per_channel(weight)
    if bias is not None:
        y = y + per_channel(bias)
    if scale is not None:
        y = y * (1 + per_channel(scale)) + per_channel(shift)
    if silu:
        y = F.silu(y)
    return _dense(y.to(x.dtype), _is_channels_last(x))


@torch.no_grad()
def group_norm_silu_forward(x, weight, bias, channel_bias, scale, shift, num_groups, eps, silu, backend):
    """The output of `group_norm_silu`, and the groups' mean and reciprocal deviation for `group_norm_silu_backward`.

    Args:
        backend: one that serves x, by name.

    Shapes: like x, (N, num_groups), (N, num_groups); without elements where `backend` does without statistics.
    """
    _check(x, weight, bias, num_groups, channel_bias, scale, shift, "silu" if silu else None)
    inputs = (x, weight, bias, channel_bias, scale, shift, num_groups, eps, silu)
    if backend in _CHAINS:
        return _CHAINS[backend](*inputs), x.new_empty(0), x.new_empty(0)
    return _forward(*inputs)


@torch.no_grad()
def group_norm_silu_backward(
    grad_y, x, weight, bias, channel_bias, scale, shift, num_groups, eps, silu, mean, inverse_deviation, backend, needs
):
    """Gradients of the six tensors x to shift, None where not needed; arguments as the forward had and gave them."""
    tensors = (x, weight, bias, channel_bias, scale, shift)
    compiled.check_gradient("group_norm_silu", grad_y, x)
    if backend in _CHAINS:
        chain: Callable[..., Tensor] = _CHAINS[backend]
        grad_x, *others = compiled.differentiate(lambda *t: chain(*t, num_groups, eps, silu), tensors, needs, grad_y)
        return [None if grad_x is None else _dense(grad_x, _is_channels_last(x)), *others]
    grads = _backward(grad_y, *tensors, mean, inverse_deviation, num_groups, silu, list(needs[1:]))
    return [grad if needed else None for grad, needed in zip(grads, needs, strict=True)]


def _by_torch(x, weight, bias, channel_bias, scale, shift, num_groups, eps, silu) -> Tensor:
    """PyTorch's own operations, one after the other, each rounding to the widest of these dtypes."""
    tensors = [t for t in (x, weight, bias, channel_bias, scale, shift) if t is not None]
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))

    def per_channel(values):  # (N, C) -> (N, C, 1, ...)
        return values.to(dtype).reshape(*values.shape, *[1] * (x.dim() - 2))

    with autocast.disabled(x.device):
        y = x.to(dtype)
        if channel_bias is not None:
            y = y + per_channel(channel_bias)
        weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
        y = torch.group_norm(y, num_groups, weight, bias, eps)
        if scale is not None:
            y = y * (1 + per_channel(scale)) + per_channel(shift)
        if silu:
            y = F.silu(y)
    return _dense(y.to(x.dtype), _is_channels_last(x))


# Backends that keep no statistics: their backward runs them again and is PyTorch's.
_CHAINS = {"torch": _by_torch, "reference": group_norm_silu_reference}


class _GroupNormSiLU(torch.autograd.Function):
    """Saves inputs and statistics; the backward recomputes the rest."""

    @staticmethod
    def forward(ctx, x, weight, bias, channel_bias, scale, shift, num_groups, eps, silu):
        y, mean, inverse_deviation = _forward(x, weight, bias, channel_bias, scale, shift, num_groups, eps, silu)
        ctx.options = num_groups, silu
        ctx.save_for_backward(x, weight, bias, channel_bias, scale, shift, mean, inverse_deviation)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        needs = ctx.needs_input_grad[:6]
        grads = compiled.backward(_GroupNormSiLUBackward, grad_y, *ctx.saved_tensors, *ctx.options, list(needs[1:]))
        return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None, None, None


class _GroupNormSiLUBackward(torch.autograd.Function):
    """The backward as a node of its own, so that differentiating it again is an error."""

    @staticmethod
    def forward(ctx, *inputs):
        return _backward(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        raise compiled.differentiated_twice("group_norm_silu")


def _is_channels_last(x: Tensor) -> bool:
    if x.is_contiguous():
        return False
    if x.dim() == 4:  # the same, in a third of the time
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def _dense(x: Tensor, channels_last: bool) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x.contiguous()


def _empty(x: Tensor) -> Tensor:
    """Uninitialised, with the dtype, shape and memory format of x."""
    return x.new_empty(x.movedim(1, -1).shape).movedim(-1, 1) if _is_channels_last(x) else x.new_empty(x.shape)


def _forward_outputs(x, weight, bias, channel_bias, scale, shift, num_groups, eps, silu):
    statistics = (x.shape[0], num_groups)
    dtype = compiled.maths_dtype(x)
    return _empty(x), x.new_empty(statistics, dtype=dtype), x.new_empty(statistics, dtype=dtype)


def _backward_outputs(
    grad_y, x, weight, bias, channel_bias, scale, shift, mean, inverse_deviation, num_groups, silu, needs
):
    """Uninitialised gradients of x and of the five others; of these, empty where not needed."""
    others = zip((weight, bias, channel_bias, scale, shift), needs, strict=True)
    return _empty(x), *(t.new_empty(t.shape) if needed else x.new_empty(0) for t, needed in others)


def _problem(x, num_groups, silu, *vectors):
    """The arguments that both compiled functions start with, and the tensors they point into."""
    channels_last = _is_channels_last(x)
    x = _dense(x, channels_last)
    held = [None if v is None else v.contiguous() for v in vectors]
    arguments = (
        compiled.DTYPES[x.dtype], *x.shape[:2], num_groups, math.prod(x.shape[2:]), channels_last, silu,
        x.data_ptr(), *map(compiled.vector, held),
    )  # fmt: skip
    return arguments, (x, held)


# Codes shared with csrc/common.
_PASSES = {"forward": 0, "backward": 1, "backward_per_channel": 2}


@functools.lru_cache(maxsize=4096)
def _workspace_elements(module, *sizes) -> int:
    return module.group_norm_silu_workspace(*sizes)


def _workspace(x, problem, purpose):
    """What the compiled function asks for, uninitialised, None where that is nothing; `problem` as `_problem` gives it."""
    elements = _workspace_elements(compiled.module(x.device), *problem[:6], _PASSES[purpose])
    return x.new_empty(elements, dtype=compiled.maths_dtype(x)) if elements else None


def _launch_forward(x, weight, bias, channel_bias, scale, shift, num_groups, eps, silu):
    outputs = _forward_outputs(x, weight, bias, channel_bias, scale, shift, num_groups, eps, silu)
    problem, _held = _problem(x, num_groups, silu, weight, bias, channel_bias, scale, shift)
    workspace = _workspace(x, problem, "forward")
    compiled.launch("group_norm_silu_forward", x.device, *problem, eps, *map(compiled.address, (*outputs, workspace)))
    return outputs


def _launch_backward(
    grad_y, x, weight, bias, channel_bias, scale, shift, mean, inverse_deviation, num_groups, silu, needs
):
    outputs = _backward_outputs(
        grad_y, x, weight, bias, channel_bias, scale, shift, mean, inverse_deviation, num_groups, silu, needs
    )
    problem, _held = _problem(x, num_groups, silu, weight, bias, channel_bias, scale, shift)
    grad_y = _dense(grad_y, _is_channels_last(x))
    workspace = _workspace(x, problem, "backward_per_channel" if any(needs) else "backward")
    grad_x, *others = outputs
    others = (grad if needed else None for grad, needed in zip(others, needs, strict=True))
    compiled.launch(
        "group_norm_silu_backward", x.device, *problem, mean.data_ptr(), inverse_deviation.data_ptr(),
        grad_y.data_ptr(), grad_x.data_ptr(), *map(compiled.vector, others), compiled.address(workspace),
    )  # fmt: skip
    return outputs


_forward = compiled.define(
    "group_norm_silu(Tensor x, Tensor? weight, Tensor? bias, Tensor? channel_bias, Tensor? scale, Tensor? shift, "
    "int num_groups, float eps, bool silu) -> (Tensor, Tensor, Tensor)",
    _launch_forward, _forward_outputs, ["CPU", "CUDA"],
)  # fmt: skip
_backward = compiled.define(
    "group_norm_silu_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? channel_bias, "
    "Tensor? scale, Tensor? shift, Tensor mean, Tensor inverse_deviation, int num_groups, bool silu, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch_backward, _backward_outputs, ["CPU", "CUDA"],
)  # fmt: skip


def _torch_reasons(x: Tensor) -> list[str]:
    found = backends.transform_reasons()
    return [*found, f"there is nothing to normalise: x is {tuple(x.shape)}"] if x.numel() == 0 else found


OP = backends.register(
    backends.Op(
        "group_norm_silu",
        {
            "cpu": compiled.reasons("_cpu", "cpu", "x"),
            "cuda": compiled.reasons("_cuda", "cuda", "x"),
            "torch": _torch_reasons,
            "reference": lambda x: [],
        },
        lambda device, dtype: (torch.empty(2, 320, 64, 64, device=device, dtype=dtype),),
        lambda x: f"{x.dtype} {bucket(x.shape[0])} x {' x '.join(map(str, x.shape[1:]))}",
    )
)


def _check(x, weight, bias, num_groups, channel_bias, scale, shift, activation):
    compiled.check_tensor("group_norm_silu", "x", x)
    if x.dim() < 2:
        raise ValueError(f"group_norm_silu: x is {tuple(x.shape)}; it must be (N, C, ...).")
    if num_groups < 1 or x.shape[1] == 0 or x.shape[1] % num_groups:
        raise ValueError(
            f"group_norm_silu: num_groups={num_groups} does not divide the {x.shape[1]} channels of x into groups."
        )
    for name, tensor, shape in (
        ("weight", weight, x.shape[1:2]), ("bias", bias, x.shape[1:2]),
        ("channel_bias", channel_bias, x.shape[:2]), ("scale", scale, x.shape[:2]), ("shift", shift, x.shape[:2]),
    ):  # fmt: skip
        if tensor is not None:
            compiled.check_like("group_norm_silu", name, tensor, shape, x.device, "x")
    if activation not in ("silu", None):
        raise ValueError(f'group_norm_silu: activation={activation!r} is unknown; choose "silu" or None.')
