"""LayerNorm over the last dimension, and its backward from the input and the statistics of its rows."""

import math

import torch
from torch import Tensor

from rftcore.ops import backends, compiled


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, backend: str = "auto") -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, in fp32 (fp64 with an fp64 input).

    Saves its inputs and the rows' statistics, neither the normalised value nor the output. Gradients flow, exactly and
    once, to every tensor that requires one; a frozen weight and bias cost nothing.

    Args:
        x: (..., D), fp64, fp32, bf16 or fp16. The output has its dtype, also under autocast.
        weight, bias: (D,), of any of these dtypes. None: 1 and 0.
        backend: "auto", "cpu" or "reference".

    Shapes: (..., D), contiguous.
    Raises: ValueError for inputs that do not fit; RuntimeError where `backend` cannot serve them.
    """
    _check(x, weight, bias)
    if OP.choose(backend, x) == "reference":
        return layer_norm_reference(x, weight, bias, eps)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _LayerNorm.apply(x, weight, bias, eps)
    return _forward(x, weight, bias, eps)[0]


def layer_norm_reference(x, weight, bias, eps) -> Tensor:
    """The specification, in plain PyTorch. Arguments as in `layer_norm`, unchecked."""
    y = x.to(compiled.maths_dtype(x))
    width = max(y.shape[-1], 1)
    y = y - y.sum(-1, keepdim=True) / width
    y = y * torch.rsqrt(y.square().sum(-1, keepdim=True) / width + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype).contiguous()


class _LayerNorm(torch.autograd.Function):
    """Saves inputs and statistics; the backward recomputes the rest."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        y, mean, inverse_deviation = _forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse_deviation)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        needs = ctx.needs_input_grad[:3]
        grads = compiled.backward(_LayerNormBackward, grad_y, *ctx.saved_tensors, list(needs[1:]))
        return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None


class _LayerNormBackward(torch.autograd.Function):
    """The backward as a node of its own, so that differentiating it again is an error."""

    @staticmethod
    def forward(ctx, *inputs):
        return _backward(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        raise compiled.differentiated_twice("layer_norm")


def _forward_outputs(x, weight, bias, eps):
    dtype = compiled.maths_dtype(x)
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=dtype), x.new_empty(x.shape[:-1], dtype=dtype)


def _backward_outputs(grad_y, x, weight, bias, mean, inverse_deviation, needs):
    """Uninitialised gradients of x, weight and bias; of the last two, empty where not needed."""
    affine = zip((weight, bias), needs, strict=True)
    return x.new_empty(x.shape), *(t.new_empty(t.shape) if needed else x.new_empty(0) for t, needed in affine)


def _problem(x, weight):
    """The arguments that both compiled functions start with; x and weight are contiguous."""
    return (
        compiled.DTYPES[x.dtype], math.prod(x.shape[:-1]), x.shape[-1], x.data_ptr(), compiled.vector(weight),
    )  # fmt: skip


def _contiguous(*tensors):
    return [None if t is None else t.contiguous() for t in tensors]


def _launch_forward(x, weight, bias, eps):
    outputs = _forward_outputs(x, weight, bias, eps)
    x, weight, bias = _contiguous(x, weight, bias)
    compiled.launch(
        "layer_norm_forward", x.device, *_problem(x, weight), compiled.vector(bias), eps,
        *map(compiled.address, outputs),
    )  # fmt: skip
    return outputs


def _launch_backward(grad_y, x, weight, bias, mean, inverse_deviation, needs):
    outputs = _backward_outputs(grad_y, x, weight, bias, mean, inverse_deviation, needs)
    grad_y, x, weight = _contiguous(grad_y, x, weight)
    grad_x, *affine = outputs
    affine = (grad if needed else None for grad, needed in zip(affine, needs, strict=True))
    compiled.launch(
        "layer_norm_backward", x.device, *_problem(x, weight), mean.data_ptr(), inverse_deviation.data_ptr(),
        grad_y.data_ptr(), grad_x.data_ptr(), *map(compiled.vector, affine),
    )  # fmt: skip
    return outputs


_forward = compiled.define(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    _launch_forward, _forward_outputs, ["CPU"],
)  # fmt: skip
_backward = compiled.define(
    "layer_norm_backward(Tensor grad_y, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, "
    "Tensor inverse_deviation, bool[] needs) -> (Tensor, Tensor, Tensor)",
    _launch_backward, _backward_outputs, ["CPU"],
)  # fmt: skip

OP = backends.register(
    backends.Op(
        "layer_norm",
        {"cpu": compiled.reasons("_cpu", "cpu", "x"), "reference": lambda x: []},
        lambda device, dtype: (torch.empty(2, 4096, 320, device=device, dtype=dtype),),
    )
)


def _check(x, weight, bias):
    compiled.check_tensor("layer_norm", "x", x)
    if x.dim() == 0:
        raise ValueError("layer_norm: x is (); it must be (..., D).")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            compiled.check_like("layer_norm", name, tensor, x.shape[-1:], x.device, "x")
