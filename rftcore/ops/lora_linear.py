"""Linear projections of one input, with LoRA adapters and a LayerNorm in front: saves that input, once."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rftcore.ops import autocast, backends, compiled, cpu_adapters, fused_linears, held
from rftcore.ops.projections import Adapter, Norm, Projection, adapters_of, flatten, restore, scales_of


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
        backend: "auto", "cpu" (the adapters in one compiled pass over n and the outputs), "triton" (the norm in front of
            the product and the adapters behind it, in one launch or two), "torch" or "reference".

    Shapes: (..., out) for each projection.
    Raises: ValueError for inputs that do not fit; RuntimeError where `backend` cannot serve them.
    """
    check_projections("lora_linear", x, projections, norm)
    lower = autocast.active(x.device)
    backend = OP.choose(backend, x, projections, lower, norm)
    if backend == "reference":
        return lora_linears_reference(x, projections, norm)
    tensors = [*((None, None) if norm is None else norm[:2]), *flatten(projections)]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        return _LoraLinears.apply((scales_of(projections), norm and norm.eps, lower, backend), x, *tensors)
    return tuple(lora_linears_forward(x, projections, norm, lower, backend))


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


@torch.no_grad()
def lora_linears_forward(
    x: Tensor,
    projections: Sequence[Projection],
    norm: Norm | None,
    lower: torch.dtype | None,
    backend: str,
    residual: Tensor | None = None,
) -> list[Tensor]:
    """The outputs of `lora_linears` by the backend of this name, which serves these inputs; no autograd.

    Args:
        lower: autocast's dtype.
        residual: (..., out), added to the output of a single projection, whose dtype is then that of their sum.
    """
    if backend == "triton":
        shape = *x.shape[:-1], projections[0].weight.shape[0]
        fits = residual is not None and residual.dtype == x.dtype and residual.shape == shape
        outputs = fused_linears.linears(x, residual if fits else None, projections, norm, lower)
        return outputs if residual is None or fits else [outputs[0] + residual]
    n = x if norm is None else normalise(x, norm, lower)[0]
    return project(n, projections, lower, residual=residual, backend=backend)


@torch.no_grad()
def lora_linears_backward(
    grads: Sequence[Tensor],
    x: Any,
    projections: Sequence[Projection],
    norm: Norm | None,
    lower: torch.dtype | None,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x (M, in), of the norm's weight and bias, and of `flatten(projections)`; None where not needed.

    Args:
        grads: of the outputs, (..., out) each, of the dtype in which the base ran.
        x: as the forward took it; None where it has no norm and where no weight, a or b needs a gradient.
        needs: for each of these gradients, whether it is needed; the norm's two are False where there is none.
    """
    if backend == "triton":
        return fused_linears.linears_backward(grads, x, projections, norm, lower, needs)
    needs_x, needs_norm, needs_projections = needs[0], needs[1:3], restore(needs[3:], scales_of(projections))
    if norm is None:
        grad, found = project_backward(x, projections, grads, needs_x, needs_projections, lower, backend=backend)
        return [grad, None, None, *flatten(found)]
    n, mean, inverse_deviation = normalise(x, norm, lower)
    needs_n = needs_x or any(needs_norm)
    grad_n, found = project_backward(n, projections, grads, needs_n, needs_projections, lower, backend=backend)
    below: tuple[Tensor | None, ...] = (None,) * 3
    if grad_n is not None:
        below = normalise_backward(grad_n.view(n.shape), x, norm, mean, inverse_deviation, list(needs[:3]), lower)
    return [*below, *flatten(found)]


def normalise(x: Tensor, norm: Norm, lower: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:
    """norm(x) (..., in), mean and reciprocal deviation (..., 1); `lower` is autocast's dtype."""
    weight, bias, eps = norm
    dtype = _norm_dtype(x, lower)
    if dtype != x.dtype:
        x, (weight, bias) = x.to(dtype), (t if t is None else t.to(dtype) for t in (weight, bias))
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)


def normalise_backward(
    grad: Tensor, x: Tensor, norm: Norm, mean: Tensor, inverse_deviation: Tensor, needs: list[bool], lower
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x and the norm's weight and bias, None where not needed."""
    weight, bias, _ = norm
    dtype = _norm_dtype(x, lower)
    arguments: tuple[Any, ...] = (x, weight, bias)
    if dtype != x.dtype:
        x, (weight, bias) = x.to(dtype), (t if t is None else t.to(dtype) for t in (weight, bias))
    grads = torch.ops.aten.native_layer_norm_backward(
        grad.to(x.dtype), x, x.shape[-1:], mean, inverse_deviation, weight, bias, needs
    )
    of_x, of_weight, of_bias = (
        g.to(t.dtype) if needed else None for g, t, needed in zip(grads, arguments, needs, strict=True)
    )
    return of_x, of_weight, of_bias


def project(
    n: Tensor,
    projections: Sequence[Projection],
    lower: torch.dtype | None,
    *,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """The projections of n (..., in), where nothing records a graph.

    Args:
        lower: autocast's dtype.
        residual: (..., out), added to the output of a single projection, whose dtype is then that of their sum.
        backend: of the adapters, as in `lora_linears`; without an adapter there is nothing to choose.
    """
    if residual is not None and len(projections) != 1:
        raise ValueError(f"project: residual is given with {len(projections)} projections; it is added to one.")
    base = _rows(n).to(autocast.lowered(n, lower))
    rows = []  # the outputs, (M, out)
    for weight, bias, _ in projections:
        weight = weight.to(autocast.lowered(weight, lower)).t()
        rows.append(
            torch.mm(base, weight)
            if bias is None
            else torch.addmm(bias.to(autocast.lowered(bias, lower)), base, weight)
        )
    # Added in the adapters' pass where it is of the outputs' shape and dtype, else after it.
    shape = *n.shape[:-1], rows[0].shape[1]
    fits = residual is not None and residual.dtype == rows[0].dtype and residual.shape == shape
    serves = _compiled(backend, n, projections, lower)
    if serves:
        cpu_adapters.add(rows, n, *cpu_adapters.arguments(projections, lower), residual if fits else None)
    else:
        _add_adapters(rows, n, projections, lower)
    # A view, as linear's result is, could not be changed in place outside; nothing else holds the rows.
    outputs = rows if n.dim() == 2 else [torch.ops.aten._unsafe_view(y, (*n.shape[:-1], y.shape[1])) for y in rows]
    if residual is None or (serves and fits):
        return outputs
    return [outputs[0].add_(residual) if fits else outputs[0] + residual]


def _add_adapters(rows, n, projections, lower) -> None:
    """Adds to the outputs, (M, out), what the adapters are to each."""
    stacks = _stacks(adapters_of(projections), lower)
    low_rank = iter(_shrink(_inputs(n, stacks), stacks))
    for y, (_, _, adapters) in zip(rows, projections, strict=True):
        for _, b, scale in adapters:
            h = next(low_rank)
            _add_product(y, h, b.to(h.dtype).t(), scale)


def project_backward(
    n: Any,
    projections: Sequence[Projection],
    grads: Sequence[Tensor],
    needs_n: bool,
    needs: Sequence[Projection],
    lower: torch.dtype | None,
    *,
    backend: str = "auto",
) -> tuple[Tensor | None, list[Projection]]:
    """The gradient of n, (M, in) in the dtype of `grads`, and the projections' gradients in place of their tensors.

    Args:
        n: as `project` took it; None where no weight, a or b needs a gradient.
        grads: of the outputs, (..., out) each.
        needs_n, needs: which gradients to compute, the others are None; `needs` is booleans in place of tensors.
        backend: as in `project`.
    """
    serves = _compiled(backend, grads[0], projections, lower)
    grads = [_rows(grad) for grad in grads]
    grad_n = None
    if needs_n:
        grad_n = grads[0] @ projections[0].weight.to(grads[0].dtype)
        for grad, (weight, _, _) in zip(grads[1:], projections[1:], strict=True):
            _add_product(grad_n, grad, weight.to(grad.dtype))
    through_adapters = _compiled_gradients if serves else _gradients
    grad_n, pairs = through_adapters(n, projections, grads, needs, lower, grad_n)
    pairs = iter(pairs)
    base: Any = _rows(n).to(grads[0].dtype) if any(need.weight for need in needs) else None
    found = []
    for grad, need, (weight, bias, own) in zip(grads, needs, projections, strict=True):
        of_weight: Any = (grad.t() @ base).to(weight.dtype) if need.weight else None
        of_bias = grad.sum(0).to(bias.dtype) if bias is not None and need.bias else None
        # Its own first: of the pairs zip then takes no more than those.
        of_adapters = (Adapter(a, b, scale) for (_, _, scale), (a, b) in zip(own, pairs, strict=False))
        found.append(Projection(of_weight, of_bias, tuple(of_adapters)))
    return grad_n, found


def _gradients(n, projections, grads, needs, lower, grad_n):
    """The gradient of n, where there is one, with what passes the adapters, and gradients of each adapter's a and b."""
    adapters, needed = adapters_of(projections), adapters_of(needs)
    stacks = _stacks(adapters, lower)
    inputs = {} if n is None else _inputs(n, stacks)
    # None where it is not read.
    low_rank: list[Any] = _shrink(inputs, stacks) if any(need.b for need in needed) else [None] * len(adapters)
    above = [grad for grad, p in zip(grads, projections, strict=True) for _ in p.adapters]

    below, grads_b = [], []  # below: gradients of a n, (M, r)
    for (a, b, scale), need, grad, h in zip(adapters, needed, above, low_rank, strict=True):
        grad = grad.to(autocast.lowered(a, lower))
        b_cast = b.to(grad.dtype)
        below.append(_scaled_product(grad, b_cast, scale, h))
        grads_b.append(_scaled_product(grad.t(), h, scale, b_cast).to(b.dtype) if need.b else None)
    below = [
        below[stack.places[0]] if len(stack.places) == 1 else torch.cat([below[i] for i in stack.places], dim=1)
        for stack in stacks
    ]  # (M, sum of r)

    grads_a: list[Tensor | None] = [None] * len(adapters)
    for (places, ranks, a), grad in zip(stacks, below, strict=True):
        if any(needed[i].a for i in places):
            for i, grad_a in zip(places, _split(grad.t() @ inputs[a.dtype], ranks, 0), strict=True):
                grads_a[i] = grad_a.to(adapters[i].a.dtype) if needed[i].a else None
    if grad_n is not None:
        for stack, grad in zip(stacks, below, strict=True):
            _add_product(grad_n, grad, stack.a)
    return grad_n, zip(grads_a, grads_b, strict=True)


def _compiled_gradients(n, projections, grads, needs, lower, grad_n):
    """`_gradients` in one call."""
    wanted = [bool(want) for need in adapters_of(needs) for want in need[:2]]
    found = []
    if any(wanted) or grad_n is not None:
        found = cpu_adapters.gradients(n, grads, *cpu_adapters.arguments(projections, lower), wanted, grad_n)
        if grad_n is not None:
            grad_n, *found = found
    given = iter(found)
    found = [next(given) if want else None for want in wanted]
    return grad_n, zip(found[::2], found[1::2], strict=True)


def _rows(tensor: Tensor) -> Tensor:
    """(..., C) as a matrix (M, C)."""
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])


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
        parts = [adapters[i].a for i in own]
        stacks.append(_Stack(own, [len(a) for a in parts], held.made_of(parts, dtype, partial(_joined, parts, dtype))))
    return stacks


def _joined(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return parts[0].to(dtype) if len(parts) == 1 else torch.cat([part.to(dtype) for part in parts])


def _inputs(n: Tensor, stacks: Sequence[_Stack]) -> dict[torch.dtype, Tensor]:
    """n as a matrix (M, in), in the dtype of each stack."""
    if not stacks:
        return {}
    rows = _rows(n)
    return {stack.a.dtype: rows.to(stack.a.dtype) for stack in stacks}


def _shrink(inputs: dict[torch.dtype, Tensor], stacks: Sequence[_Stack]) -> list[Tensor]:
    """a n (M, r) for each adapter."""
    products: dict[int, Tensor] = {}
    for places, ranks, a in stacks:
        products.update(zip(places, _split(inputs[a.dtype] @ a.t(), ranks, 1), strict=True))
    return [products[i] for i in range(len(products))]


def _split(tensor: Tensor, sizes: list[int], dim: int) -> Sequence[Tensor]:
    return [tensor] if len(sizes) == 1 else tensor.split(sizes, dim)


def _scaled_product(left: Tensor, right: Tensor, scale: float, like: Tensor | None) -> Tensor:
    """scale left right, rounded once; `like` has the product's shape and dtype, its values play no part."""
    if like is None:
        return (left @ right).mul_(scale)
    return torch.addmm(like, left, right, beta=0, alpha=scale)


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
        *_, lower, backend = options
        return tuple(lora_linears_forward(x, projections, norm, lower, backend))

    @staticmethod
    def backward(ctx, *grads):
        grad_x, *others = compiled.backward(
            _LoraLinearsBackward, ctx.options, ctx.needs_input_grad[1:], *ctx.saved_tensors, *grads
        )
        return None, None if grad_x is None else grad_x.view(ctx.shape).to(ctx.dtype), *others


class _LoraLinearsBackward(torch.autograd.Function):
    """The backward as a node of its own, so that differentiating it again is an error."""

    @staticmethod
    def forward(ctx, options, needs, x, *tensors):
        scales, _, lower, backend = options
        tensors, grads = tensors[: -len(scales)], tensors[-len(scales) :]
        norm, projections = _parts(options, tensors)
        with autocast.disabled(grads[0].device):
            return tuple(lora_linears_backward(grads, x, projections, norm, lower, backend, needs))

    @staticmethod
    def backward(ctx, *grads):
        raise compiled.differentiated_twice("lora_linears")


def _parts(options, values) -> tuple[Norm | None, list[Projection]]:
    """The norm and projections of a call from its tensors, or from values in their places."""
    scales, eps, *_ = options
    weight, bias, *others = values
    return None if eps is None else Norm(weight, bias, eps), restore(others, scales)


def _compiled(backend: str, x: Tensor, projections: Sequence[Projection], lower: torch.dtype | None) -> bool:
    return OP.choose(backend, x, projections, lower) == "cpu"


def _example(device: torch.device | str, dtype: torch.dtype) -> tuple:
    a, b = (torch.empty(shape, device=device, dtype=dtype) for shape in ((4, 320), (320, 4)))
    adapter = Adapter(a, b, 1.0)
    projection = Projection(torch.empty(320, 320, device=device, dtype=dtype), None, (adapter,))
    return torch.empty(2, 4096, 320, device=device, dtype=dtype), (projection,)


OP = backends.register(
    backends.Op(
        "lora_linear",
        {
            "cpu": cpu_adapters.reasons,
            "triton": fused_linears.reasons_without_gate,
            "torch": lambda x, *others: backends.transform_reasons(),
            "reference": lambda x, *others: [],
        },
        _example,
        fused_linears.key,
    )
)


def check_projections(op: str, x: Tensor, projections: Sequence[Projection], norm: Norm | None) -> None:
    """Raises: ValueError where these do not fit x."""
    compiled.check_tensor(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x is (); it must be (..., in).")
    if not projections:
        raise ValueError(f"{op}: projections is empty; give at least one.")

    def check(name, tensor, shape):
        if tensor is not None:
            compiled.check_like(op, name, tensor, shape, x.device, "x")

    for weight, bias, adapters in projections:
        check("weight", weight, (*weight.shape[:1], x.shape[-1]))
        check("bias", bias, weight.shape[:1])
        for a, b, _ in adapters:
            check("a", a, (*a.shape[:1], x.shape[-1]))
            check("b", b, (*weight.shape[:1], *a.shape[:1]))
    if norm is not None:
        check("norm.weight", norm.weight, x.shape[-1:])
        check("norm.bias", norm.bias, x.shape[-1:])
