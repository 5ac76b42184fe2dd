"""The passes of `lora_linear` and `gated_linear` as Triton launches: which inputs they serve, and what follows what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rftcore.ops import autocast, backends, compiled, held, jit
from rftcore.ops.measured import Winner, bucket
from rftcore.ops.projections import Adapter, Norm, Projection, flatten, restore, scales_of

_MAX_PROJECTIONS, _MAX_RANK = 3, 64  # the kernels'

_of_triton = jit.reasons("x")


def reasons(
    x: Tensor, projections: Sequence[Projection] = (), lower: torch.dtype | None = None, norm: Norm | None = None
) -> list[str]:
    """Why the kernels do not serve these inputs; `lower` is autocast's dtype."""
    found = _of_triton(x)
    if x.numel() == 0:
        found.append(f"there is nothing to compute: x is {tuple(x.shape)}")
    if len(projections) > _MAX_PROJECTIONS:
        found.append(f"it serves {_MAX_PROJECTIONS} projections at once, there are {len(projections)}")
    frozen = [t for p in projections for t in p[:2]] + list(norm[:2] if norm else ())
    if any(t is not None and t.requires_grad for t in frozen):
        found.append("a weight or bias of a projection or the norm is trained; it serves frozen ones")
    base = {autocast.lowered(t, lower) for t in (x, *(p.weight for p in projections))}
    if base != {x.dtype}:
        found.append(f"x is {x.dtype}, and the products are in {', '.join(sorted(map(str, base)))}")
    adapters = [adapter for p in projections for adapter in p.adapters]
    if any(len(p.adapters) > 1 for p in projections):
        found.append("a projection has several active adapters; it serves one")
    if any(adapter.a.shape[0] > _MAX_RANK for adapter in adapters):
        found.append(f"an adapter's rank is over {_MAX_RANK}")
    dtypes = {autocast.lowered(m, lower) for adapter in adapters for m in adapter[:2]}
    if len(dtypes) > 1 or not dtypes <= {x.dtype, torch.float32}:
        found.append(f"adapters are {', '.join(sorted(map(str, dtypes)))}; they must all be {x.dtype} or all fp32")
    return found


def reasons_without_gate(x: Tensor, projections: Sequence[Projection] = (), lower=None, norm=None) -> list[str]:
    """Why the kernels do not serve these projections with nothing behind them."""
    found = reasons(x, projections, lower, norm)
    if norm is None and not any(p.adapters for p in projections):
        found.append("it has no norm and no adapter, and without them it is a product of PyTorch's")
    return found


class _Prologue(NamedTuple):
    """What is made of x before its projections, None where not needed: statistics (M,), and h (M, sum of ranks)."""

    mean: Tensor | None = None
    inverse_deviation: Tensor | None = None
    h: Tensor | None = None


class _Call(NamedTuple):
    """Inputs as the kernels take them: x (M, K), everything contiguous, adapters in the dtype they compute in."""

    x: Any  # a tensor; None in a backward that does not read it
    projections: list[Projection]
    norm: Norm | None
    winner: Winner | None

    @property
    def adapters(self) -> list[Adapter]:
        return [adapter for p in self.projections for adapter in p.adapters]

    def config(self, name: str) -> Any:
        """Measured tile sizes for the Config of this name in `rftcore.kernels`; None: its heuristic's."""
        return jit.config(name, self.winner)


def _prepared(op: str, x, projections, norm, lower) -> _Call:
    winner = None
    if x is not None:
        question = (x, projections if op == "lora_linear" else projections[0], lower, norm)
        winner = backends.OPS[op].winner(*question)
    x = None if x is None else jit.rows(x.contiguous())

    def ready(tensor):
        return None if tensor is None else tensor.to(autocast.lowered(tensor, lower)).contiguous()

    def kept(tensor):
        return held.made_of([tensor], autocast.lowered(tensor, lower), lambda: ready(tensor))

    own = [
        Projection(
            ready(p.weight), ready(p.bias), tuple(Adapter(kept(a), kept(b), scale) for a, b, scale in p.adapters)
        )
        for p in projections
    ]
    if norm is not None:
        weight, bias = (t if t is None else t.contiguous() for t in norm[:2])
        norm = Norm(weight, bias, norm.eps)
    return _Call(x, own, norm, winner)


def _prologue(call: _Call, with_h: bool) -> tuple[_Prologue, list]:
    """Its tensors and the launches that fill them."""
    x, kernels = call.x, jit.kernels("lora_linear")
    with_h = with_h and bool(call.adapters)
    if call.norm is None and not with_h:
        return _Prologue(), []
    mean = inverse_deviation = None
    if call.norm is not None:
        mean, inverse_deviation = (x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
    h = (
        x.new_empty(kernels.low_rank_shape(len(x), call.projections), dtype=call.adapters[0].a.dtype)
        if with_h
        else None
    )
    launch = kernels.shrink(
        x, call.projections if with_h else (), call.norm, mean, inverse_deviation, h,
        config=call.config("lora_linear.ShrinkConfig"),
    )  # fmt: skip
    return _Prologue(mean, inverse_deviation, h), [launch]


def _run_linears(x, residual, tensors, adapters, scales, eps, lower) -> list[Tensor]:
    norm, projections = _unpacked(tensors, adapters, scales, eps)
    call, kernels = _prepared("lora_linear", x, projections, norm, lower), jit.kernels("lora_linear")
    outputs = [call.x.new_empty(len(call.x), len(p.weight)) for p in projections]
    tuned = call.config("lora_linear.StripConfig") or call.config("lora_linear.ProjectConfig")
    chip = jit.capability(x.device)
    config = tuned or kernels.default_config(call.x, call.projections, call.norm, chip)
    before, launches = (_Prologue(), []) if config.fused else _prologue(call, True)
    residual = None if residual is None else jit.rows(residual.contiguous())
    launches.append(kernels.project(call.x, call.projections, outputs, call.norm, *before, residual, config=config))
    jit.run(x.device, *launches)
    return [y.view(*x.shape[:-1], y.shape[1]) for y in outputs]


def _run_linears_backward(grads, x, tensors, adapters, scales, eps, lower, needs) -> list[Tensor]:
    norm, projections = _unpacked(tensors, adapters, scales, eps)
    call = _prepared("lora_linear", x, projections, norm, lower)
    needs_b = any(need.b for p in restore(needs[3:], scales_of(projections)) for need in p.adapters)
    before, launches = _prologue(call, needs_b) if norm is not None or needs_b else (_Prologue(), [])
    grads = [jit.rows(grad.contiguous()) for grad in grads]
    return _linears_backward(call, before, launches, grads, needs, projections)


def _linears_backward(call: _Call, before: _Prologue, launches: list, grads, needs, masters) -> list[Tensor]:
    """Those gradients that are needed; `masters`: the projections in the dtypes that the gradients get."""
    kernels = jit.kernels("lora_linear_backward")
    needs_x = needs[0]
    needed = [need.adapters for need in restore(needs[3:], scales_of(call.projections))]
    wants_a, wants_b = (any(pair[i] for own in needed for pair in own) for i in (0, 1))
    projections, like = call.projections, grads[0]
    g = None
    if call.adapters and (needs_x or wants_a):
        ranks = sum(len(adapter.a) for adapter in call.adapters)
        g = like.new_empty(len(like), ranks, dtype=call.adapters[0].a.dtype)
        config = call.config("lora_linear_backward.LowRankConfig")
        launches.append(kernels.low_rank_gradient(grads, projections, g, config))
    grad_x = None
    if needs_x:
        grad_x = like.new_empty(len(like), projections[0].weight.shape[1])
        config = call.config("lora_linear_backward.InputConfig")
        launches.append(kernels.input_gradient(grads, projections, g, grad_x, config))
        if call.norm is not None:
            launches.append(
                jit.kernels("layer_norm").backward(
                    grad_x, call.x, before.mean, before.inverse_deviation, call.norm.weight, grad_x,
                    config=call.config("layer_norm.Config"),
                )
            )  # fmt: skip
    found = [
        tuple(m.new_empty(m.shape) if want else None for m, want in zip(p.adapters[0][:2], need[0][:2], strict=True))
        if need
        else (None, None)
        for p, need in zip(masters, needed, strict=True)
    ]
    if wants_a or wants_b:
        config = call.config("lora_linear_backward.AdaptersConfig")
        shape = kernels.partials_shape(like, projections, found, config)
        partials = like.new_empty(shape, dtype=torch.float32)
        launches += kernels.adapter_gradients(
            call.x, grads, projections, call.norm, before.mean, before.inverse_deviation, g, before.h, found, partials,
            config,
        )  # fmt: skip
    jit.run(like.device, *launches)
    return [t for t in (grad_x, *(grad for pair in found for grad in pair)) if t is not None]


def _run_gated(x, tensors, adapters, scales, eps, lower, keep) -> list[Tensor]:
    norm, projections = _unpacked(tensors, adapters, scales, eps)
    call, kernels = _prepared("gated_linear", x, projections, norm, lower), jit.kernels("gated_linear")
    own = call.projections[0]
    columns = len(own.weight) // 2
    y = call.x.new_empty(len(call.x), columns)
    u = call.x.new_empty(len(call.x), 2 * columns) if keep else None
    before, launches = _prologue(call, True)
    config = call.config("gated_linear.Config")
    launches.append(kernels.forward(call.x, *own[:2], y, **_joint(call, before), u=u, config=config))
    jit.run(x.device, *launches)
    return [t.view(*x.shape[:-1], t.shape[1]) for t in (y, u) if t is not None]


def _run_gated_backward(grad_y, x, u, tensors, adapters, scales, eps, lower, needs) -> list[Tensor]:
    norm, projections = _unpacked(tensors, adapters, scales, eps)
    call = _prepared("gated_linear", x, projections, norm, lower)
    grad_y = jit.rows(grad_y.contiguous())
    grad_u = grad_y.new_empty(len(grad_y), len(projections[0].weight))
    # h is of use to u, and to the gradient of b.
    with_h = u is None or any(need.b for need in restore(needs[3:], scales_of(projections))[0].adapters)
    before, launches = _prologue(call, with_h) if call.x is not None else (_Prologue(), [])
    if u is None:
        config = call.config("gated_linear.Config")
        own = call.projections[0]
        joint = _joint(call, before)
        launches.append(jit.kernels("gated_linear").backward(grad_y, call.x, *own[:2], grad_u, **joint, config=config))
    else:
        launches.append(jit.kernels("geglu").backward(grad_y, jit.rows(u.contiguous()), grad_u))
    return _linears_backward(call, before, launches, [grad_u], needs, projections)


def _joint(call: _Call, before: _Prologue) -> dict:
    """The norm and the adapter as `kernels/gated_linear.py` takes them."""
    kernels, own = jit.kernels("gated_linear"), call.adapters
    return {
        "norm": None if call.norm is None else kernels.Norm(before.mean, before.inverse_deviation, *call.norm[:2]),
        "low_rank": kernels.LowRank(before.h, own[0].b, own[0].scale) if own else None,
    }


def _unpacked(tensors, adapters, scales, eps) -> tuple[Norm | None, list[Projection]]:
    """The norm and the projections of a call, from flat lists."""
    weight, bias, *others = tensors
    left = iter(scales)
    rows = [[next(left) for _ in range(count)] for count in adapters]
    return None if eps is None else Norm(weight, bias, eps), restore(others, rows)


def _packed(projections: Sequence[Projection], norm: Norm | None) -> tuple:
    """The inverse: tensors, numbers of adapters, scales, eps."""
    scales = scales_of(projections)
    tensors = [*(norm[:2] if norm else (None, None)), *flatten(projections)]
    return tensors, [len(row) for row in scales], [scale for row in scales for scale in row], norm and norm.eps


def _fake_linears(x, residual, tensors, adapters, scales, eps, lower):
    _, projections = _unpacked(tensors, adapters, scales, eps)
    return [x.new_empty(*x.shape[:-1], len(p.weight)) for p in projections]


def _fake_gated(x, tensors, adapters, scales, eps, lower, keep):
    columns = len(tensors[2]) // 2
    return [x.new_empty(*x.shape[:-1], columns), *([x.new_empty(*x.shape[:-1], 2 * columns)] if keep else [])]


def _fake_linears_backward(grads, x, tensors, adapters, scales, eps, lower, needs):
    rows = math.prod(grads[0].shape[:-1])
    found = [grads[0].new_empty(rows, tensors[2].shape[1])] if needs[0] else []
    return found + [t.new_empty(t.shape) for t, need in zip(tensors, needs[1:], strict=True) if need]


def _fake_gated_backward(grad_y, x, u, *others):
    return _fake_linears_backward([grad_y], x, *others)


def _linears_flops(x, residual, tensors, adapters, scales, eps, lower, **others) -> int:
    """Of the products with every weight, a and b."""
    return sum(2 * math.prod(x[:-1]) * math.prod(t) for t in tensors[2:] if t is not None and len(t) == 2)


_run = compiled.define(
    "lora_linears(Tensor x, Tensor? residual, Tensor?[] tensors, int[] adapters, float[] scales, float? eps, "
    "ScalarType? lower) -> Tensor[]",
    _run_linears, _fake_linears, ["CPU", "CUDA"],
)  # fmt: skip
_run_backward = compiled.define(
    "lora_linears_backward(Tensor[] grads, Tensor? x, Tensor?[] tensors, int[] adapters, float[] scales, float? eps, "
    "ScalarType? lower, bool[] needs) -> Tensor[]",
    _run_linears_backward, _fake_linears_backward, ["CPU", "CUDA"],
)  # fmt: skip
_gate = compiled.define(
    "gated_linear(Tensor x, Tensor?[] tensors, int[] adapters, float[] scales, float? eps, ScalarType? lower, "
    "bool keep) -> Tensor[]",
    _run_gated, _fake_gated, ["CPU", "CUDA"],
)  # fmt: skip
_gate_backward = compiled.define(
    "gated_linear_backward(Tensor grad_y, Tensor? x, Tensor? u, Tensor?[] tensors, int[] adapters, float[] scales, "
    "float? eps, ScalarType? lower, bool[] needs) -> Tensor[]",
    _run_gated_backward, _fake_gated_backward, ["CPU", "CUDA"],
)  # fmt: skip


def linears(x: Tensor, residual: Tensor | None, projections, norm: Norm | None, lower) -> list[Tensor]:
    """`lora_linears_forward`, with a residual of x's dtype."""
    return _run(x, residual, *_packed(projections, norm), lower)


def linears_backward(grads, x: Tensor | None, projections, norm: Norm | None, lower, needs) -> list[Tensor | None]:
    """`lora_linears_backward`."""
    return _all(_run_backward(list(grads), x, *_packed(projections, norm), lower, list(needs)), needs)


def gated(x: Tensor, projection: Projection, norm: Norm | None, lower, keep: bool) -> tuple[Tensor, Tensor | None]:
    """`gated_linear_forward`."""
    y, *u = _gate(x, *_packed((projection,), norm), lower, keep)
    return y, u[0] if u else None


def gated_backward(grad_y: Tensor, x, u, projection: Projection, norm: Norm | None, lower, needs) -> list:
    """`gated_linear_backward`."""
    return _all(_gate_backward(grad_y, x, u, *_packed((projection,), norm), lower, list(needs)), needs)


def _all(found: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """With None where a gradient is not needed."""
    given = iter(found)
    return [next(given) if need else None for need in needs]


def key(x: Tensor, projections: Sequence[Projection], lower=None, norm: Norm | None = None) -> str:
    """What measurements tell inputs apart by."""
    widths = "+".join(str(len(p.weight)) for p in projections)
    ranks = "+".join(str(sum(len(adapter.a) for adapter in p.adapters)) for p in projections)
    dtypes = {str(autocast.lowered(adapter.a, lower)) for p in projections for adapter in p.adapters} - {str(x.dtype)}
    parts = [str(x.dtype), *sorted(dtypes), "norm" if norm is not None else "no norm"]
    return f"{', '.join(parts)}, {bucket(math.prod(x.shape[:-1]))} x {x.shape[-1]} -> {widths}, r={ranks}"
