"""Linear projections of one input, with LoRA adapters and a LayerNorm in front: saves that input, once."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rftcore.ops import autocast, backends, compiled


class Adapter(NamedTuple):
    """A low-rank addition, scale * b a: a (r, in), b (out, r); kernels of convolutions in `lora_conv2d`."""

    a: Tensor
    b: Tensor
    scale: float


class Projection(NamedTuple):
    """weight (out, in), bias (out,) or None, and the active adapters."""

    weight: Tensor
    bias: Tensor | None = None
    adapters: tuple[Adapter, ...] = ()


class Norm(NamedTuple):
    """A LayerNorm over the last dimension: weight and bias (in,), or None: 1 and 0."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float


def lora_linear(x: Tensor, projection: Projection, norm: Norm | None = None, *, backend: str = "auto") -> Tensor:
    """One projection of x: see `lora_linears`."""
    return lora_linears(x, (projection,), norm, backend=backend)[0]


def lora_linears(
    x: Tensor, projections: Sequence[Projection], norm: Norm | None = None, *, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """Projections of one x, as of queries, keys and values: each W n + bias + sum of scale B A n, with n = norm(x).

    Saves x, once; without a norm, and where neither a weight nor an adapter is trained, nothing. The backward recomputes
    n, and the adapters' gradients go through their rank. Whatever requires grad receives its gradient, exactly and once;
    a frozen weight costs nothing.

    Dtypes are PEFT's. The base runs in x's dtype, an adapter in its own, and the sum has the base's; under autocast all
    products run in autocast's dtype and the norm, but on a CPU, in fp32. A cast weight, or the A of all projections
    that are one matrix here, lives no longer than the pass that uses it.

    Args:
        x: (..., in), fp64, fp32, bf16 or fp16.
        projections: one or more.
        norm: a LayerNorm of x before all of them.
        backend: "auto", "torch" or "reference".

    Shapes: (..., out) for each projection.
    Raises: ValueError for inputs that do not fit; RuntimeError where `backend` cannot serve them.
    """
    _check(x, projections, norm)
    if OP.choose(backend, x) == "reference":
        return lora_linears_reference(x, projections, norm)
    lower = autocast.active(x.device)
    tensors = [*((None, None) if norm is None else norm[:2]), *flatten(projections)]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        scales = tuple(tuple(adapter.scale for adapter in p.adapters) for p in projections)
        return _LoraLinears.apply((scales, norm and norm.eps, lower), x, *tensors)
    n = x if norm is None else normalise(x, norm, lower)[0]
    return tuple(project(n, projections, lower))


def lora_linears_reference(x: Tensor, projections: Sequence[Projection], norm: Norm | None) -> tuple[Tensor, ...]:
    """The specification, in plain PyTorch. Arguments as in `lora_linears`, unchecked."""
    n = x if norm is None else F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    outputs = []
    for weight, bias, adapters in projections:
        base = y = F.linear(n, weight, bias)
        for a, b, scale in adapters:
            y = y + F.linear(F.linear(n.to(a.dtype), a), b) * scale
        outputs.append(y.to(base.dtype))
    return tuple(outputs)


def flatten(projections: Iterable[Projection]) -> list:
    """Weight, bias, and each adapter's a and b, of one projection after the other; `restore` is the inverse."""
    return [t for p in projections for t in (p.weight, p.bias, *(m for adapter in p.adapters for m in adapter[:2]))]


def restore(values: Iterable, scales: Iterable[Iterable[float]]) -> list[Projection]:
    """Projections of these values; `scales` holds a scale for each adapter of each projection."""
    values = iter(values)
    return [
        Projection(next(values), next(values), tuple(Adapter(next(values), next(values), scale) for scale in row))
        for row in scales
    ]


def normalise(x: Tensor, norm: Norm, lower: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """norm(x) (..., in), mean and reciprocal deviation (..., 1); `lower` is autocast's dtype."""
    weight, bias, eps = norm
    dtype = _norm_dtype(x, lower)
    if dtype != x.dtype:
        x, weight, bias = (t if t is None else t.to(dtype) for t in (x, weight, bias))
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)


def normalise_backward(
    grad: Tensor, x: Tensor, norm: Norm, mean: Tensor, inverse_deviation: Tensor, needs: list[bool], lower
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x and the norm's weight and bias, None where not needed."""
    weight, bias, _ = norm
    dtype = _norm_dtype(x, lower)
    arguments = (x, weight, bias)
    if dtype != x.dtype:
        x, weight, bias = (t if t is None else t.to(dtype) for t in arguments)
    grads = torch.ops.aten.native_layer_norm_backward(
        grad.to(x.dtype), x, x.shape[-1:], mean, inverse_deviation, weight, bias, needs
    )
    return tuple(g.to(t.dtype) if needed else None for g, t, needed in zip(grads, arguments, needs, strict=True))


def project(n: Tensor, projections: Sequence[Projection], lower: torch.dtype | None) -> list[Tensor]:
    """The projections of n (..., in), where nothing records a graph; `lower` is autocast's dtype."""
    stacks = _stacks(_adapters(projections), lower)
    inputs = _inputs(n, stacks, lower)
    low_rank = iter(_shrink(inputs, stacks))
    base = inputs[autocast.lowered(n, lower)]
    outputs = []
    for weight, bias, adapters in projections:
        # A result that is a view, as linear's is, could not be changed in place outside.
        y = base.new_empty((*n.shape[:-1], weight.shape[0]))
        rows, weight = _rows(y), weight.to(autocast.lowered(weight, lower)).t()
        if bias is None:
            torch.mm(base, weight, out=rows)
        else:
            torch.addmm(bias.to(autocast.lowered(bias, lower)), base, weight, out=rows)
        for _, b, scale in adapters:
            h = next(low_rank)
            _add_product(rows, h, b.to(h.dtype).t(), scale)
        outputs.append(y)
    return outputs


def project_backward(
    n: Tensor | None,
    projections: Sequence[Projection],
    grads: Sequence[Tensor],
    needs_n: bool,
    needs: Sequence[Projection],
    lower: torch.dtype | None,
) -> tuple[Tensor | None, list[Projection]]:
    """The gradient of n, (M, in) in the dtype of `grads`, and the projections' gradients in place of their tensors.

    Args:
        n: as `project` took it; None where no weight, a or b needs a gradient.
        grads: of the outputs, (..., out) each.
        needs_n, needs: which gradients to compute, the others are None; `needs` is booleans in place of tensors.
    """
    grads = [_rows(grad) for grad in grads]
    adapters, needed = _adapters(projections), _adapters(needs)
    stacks = _stacks(adapters, lower)
    inputs = {} if n is None else _inputs(n, stacks, lower)
    low_rank = _shrink(inputs, stacks) if any(need.b for need in needed) else [None] * len(adapters)
    above = [grad for grad, p in zip(grads, projections, strict=True) for _ in p.adapters]

    below, grads_b = [], []  # below: gradients of a n, (M, r)
    for (a, b, scale), need, grad, h in zip(adapters, needed, above, low_rank, strict=True):
        grad = grad.to(autocast.lowered(a, lower))
        below.append((grad @ b.to(grad.dtype)).mul_(scale))
        grads_b.append((grad.t() @ h).mul_(scale).to(b.dtype) if need.b else None)
    below = [torch.cat([below[i] for i in stack.places], dim=1) for stack in stacks]  # (M, sum of r)

    grads_a = [None] * len(adapters)
    for (places, ranks, a), grad in zip(stacks, below, strict=True):
        if any(needed[i].a for i in places):
            for i, grad_a in zip(places, (grad.t() @ inputs[a.dtype]).split(ranks), strict=True):
                grads_a[i] = grad_a.to(adapters[i].a.dtype) if needed[i].a else None

    grad_n = None
    if needs_n:
        grad_n = grads[0] @ projections[0].weight.to(grads[0].dtype)
        for grad, (weight, _, _) in zip(grads[1:], projections[1:], strict=True):
            _add_product(grad_n, grad, weight.to(grad.dtype))
        for stack, grad in zip(stacks, below, strict=True):
            _add_product(grad_n, grad, stack.a)

    pairs = iter(zip(grads_a, grads_b, strict=True))
    return grad_n, [
        Projection(
            (grad.t() @ inputs[grad.dtype]).to(weight.dtype) if need.weight else None,
            grad.sum(0).to(bias.dtype) if need.bias else None,
            tuple(Adapter(*next(pairs), scale) for _, _, scale in own),
        )
        for grad, need, (weight, bias, own) in zip(grads, needs, projections, strict=True)
    ]


def _rows(tensor: Tensor) -> Tensor:
    """(..., C) as a matrix (M, C)."""
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def _adapters(projections: Sequence[Projection]) -> list[Adapter]:
    return [adapter for p in projections for adapter in p.adapters]


class _Stack(NamedTuple):
    """The a of all adapters of one dtype as one matrix (sum of r, in): their places among the adapters, and ranks."""

    places: list[int]
    ranks: list[int]
    a: Tensor


def _stacks(adapters: Sequence[Adapter], lower: torch.dtype | None) -> list[_Stack]:
    places: dict[torch.dtype, list[int]] = {}
    for i, adapter in enumerate(adapters):
        places.setdefault(autocast.lowered(adapter.a, lower), []).append(i)
    stacks = []
    for dtype, own in places.items():
        parts = [adapters[i].a.to(dtype) for i in own]
        stacks.append(_Stack(own, [len(a) for a in parts], torch.cat(parts)))
    return stacks


def _inputs(n: Tensor, stacks: Sequence[_Stack], lower: torch.dtype | None) -> dict[torch.dtype, Tensor]:
    """n as a matrix (M, in), in the dtype of each product that takes it."""
    rows = _rows(n)
    dtypes = autocast.lowered(n, lower), *(stack.a.dtype for stack in stacks)
    return {dtype: rows.to(dtype) for dtype in dict.fromkeys(dtypes)}


def _shrink(inputs: dict[torch.dtype, Tensor], stacks: Sequence[_Stack]) -> list[Tensor]:
    """a n (M, r) for each adapter."""
    products = {}
    for places, ranks, a in stacks:
        products.update(zip(places, (inputs[a.dtype] @ a.t()).split(ranks, dim=1), strict=True))
    return [products[i] for i in range(len(products))]


def _add_product(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """total += scale left right, in place, rounded to total's dtype once."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, alpha=scale, out=total)
    else:
        total.add_(left @ right, alpha=scale)


def _norm_dtype(x: Tensor, lower: torch.dtype | None) -> torch.dtype:
    """Of a LayerNorm of x: autocast runs it in fp32, except on a CPU and in fp64."""
    return torch.float32 if lower is not None and x.device.type != "cpu" and x.dtype != torch.float64 else x.dtype


class _LoraLinears(torch.autograd.Function):
    """Saves x; the backward recomputes its norm and what the adapters make of it."""

    @staticmethod
    def forward(ctx, options, x, *tensors):
        norm, projections = _parts(options, tensors)
        _, needs = _parts(options, ctx.needs_input_grad[2:])
        needs_x = norm is not None or any(
            need.weight or any(adapter.a or adapter.b for adapter in need.adapters) for need in needs
        )
        ctx.save_for_backward(x if needs_x else None, *tensors)
        ctx.options, ctx.shape, ctx.dtype = options, x.shape, x.dtype
        lower = options[-1]
        return tuple(project(x if norm is None else normalise(x, norm, lower)[0], projections, lower))

    @staticmethod
    def backward(ctx, *grads):
        grad_x, *others = _LoraLinearsBackward.apply(ctx.options, ctx.needs_input_grad[1:], *ctx.saved_tensors, *grads)
        return None, None if grad_x is None else grad_x.view(ctx.shape).to(ctx.dtype), *others


class _LoraLinearsBackward(torch.autograd.Function):
    """The backward as a node of its own, so that differentiating it again is an error."""

    @staticmethod
    def forward(ctx, options, needs, x, *tensors):
        scales, _, lower = options
        tensors, grads = tensors[: -len(scales)], tensors[-len(scales) :]
        norm, projections = _parts(options, tensors)
        _, needs_projections = _parts(options, needs[1:])
        with autocast.disabled(grads[0].device):
            if norm is None:
                grad, found = project_backward(x, projections, grads, needs[0], needs_projections, lower)
                return grad, None, None, *flatten(found)
            needs_norm = list(needs[:3])
            n, mean, inverse_deviation = normalise(x, norm, lower)
            grad_n, found = project_backward(n, projections, grads, any(needs_norm), needs_projections, lower)
            if grad_n is None:
                return None, None, None, *flatten(found)
            grad_n = grad_n.view(n.shape)
            return *normalise_backward(grad_n, x, norm, mean, inverse_deviation, needs_norm, lower), *flatten(found)

    @staticmethod
    def backward(ctx, *grads):
        raise compiled.differentiated_twice("lora_linears")


def _parts(options, values) -> tuple[Norm | None, list[Projection]]:
    """The norm and projections of a call from its tensors, or from values in their places."""
    scales, eps, _ = options
    weight, bias, *others = values
    return None if eps is None else Norm(weight, bias, eps), restore(others, scales)


OP = backends.register(
    backends.Op(
        "lora_linear",
        {"torch": lambda x: backends.transform_reasons(), "reference": lambda x: []},
        lambda device, dtype: (torch.empty(2, 4096, 320, device=device, dtype=dtype),),
    )
)


def _check(x, projections, norm):
    compiled.check_tensor("lora_linear", "x", x)
    if x.dim() == 0:
        raise ValueError("lora_linear: x is (); it must be (..., in).")
    if not projections:
        raise ValueError("lora_linear: projections is empty; give at least one.")

    def check(name, tensor, shape):
        if tensor is not None:
            compiled.check_like("lora_linear", name, tensor, shape, x.device, "x")

    for weight, bias, adapters in projections:
        check("weight", weight, (*weight.shape[:1], x.shape[-1]))
        check("bias", bias, weight.shape[:1])
        for a, b, _ in adapters:
            check("a", a, (*a.shape[:1], x.shape[-1]))
            check("b", b, (*weight.shape[:1], *a.shape[:1]))
    if norm is not None:
        check("norm.weight", norm.weight, x.shape[-1:])
        check("norm.bias", norm.bias, x.shape[-1:])
