"""A transformer's gated feed-forward up to its gate: LayerNorm, projection with LoRA adapters, and GEGLU, as one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rftcore.ops import autocast, backends, compiled, fused_linears
from rftcore.ops.geglu import OP as GEGLU
from rftcore.ops.geglu import geglu_backward, geglu_forward, geglu_reference
from rftcore.ops.lora_linear import OP as LORA_LINEAR
from rftcore.ops.lora_linear import (
    check_projections,
    lora_linears_backward,
    lora_linears_forward,
    lora_linears_reference,
)
from rftcore.ops.projections import Norm, Projection, flatten, restore


def gated_linear(x: Tensor, projection: Projection, norm: Norm | None = None, *, backend: str = "auto") -> Tensor:
    """u[..., :D] * gelu(u[..., D:]) of u = W n + bias + sum of scale B A n, with n = norm(x): see `lora_linears`, `geglu`.

    Saves x only: the backward computes u again. Whatever requires grad receives its gradient, exactly and once.

    Args:
        x: (..., in), fp64, fp32, bf16 or fp16.
        projection: to (..., 2D); hidden states first, gate second.
        norm: a LayerNorm of x before it.
        backend: "auto", "triton", "separate" (the two ops, each by its own backend) or "reference".

    Shapes: (..., D).
    Raises: ValueError for inputs that do not fit; RuntimeError where `backend` cannot serve them.
    """
    check_projections("gated_linear", x, (projection,), norm)
    if projection.weight.shape[0] % 2:
        raise ValueError(
            f"gated_linear: weight is {tuple(projection.weight.shape)}; it must be (2D, in): hidden states, then gate."
        )
    lower = autocast.active(x.device)
    backend = OP.choose(backend, x, projection, lower, norm)
    if backend == "reference":
        return gated_linear_reference(x, projection, norm)
    tensors = [x, *(norm[:2] if norm else (None, None)), *flatten([projection])]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        scales = tuple(adapter.scale for adapter in projection.adapters)
        return _GatedLinear.apply((scales, norm and norm.eps, lower, backend), *tensors)
    return gated_linear_forward(x, projection, norm, lower, backend)[0]


def gated_linear_reference(x: Tensor, projection: Projection, norm: Norm | None) -> Tensor:
    """The specification, in plain PyTorch. Arguments as in `gated_linear`, unchecked."""
    return geglu_reference(lora_linears_reference(x, (projection,), norm)[0])


@torch.no_grad()
def gated_linear_forward(
    x: Tensor, projection: Projection, norm: Norm | None, lower: torch.dtype | None, backend: str, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The output, and u where it is to be kept, by the backend of this name, which serves these inputs; no autograd.

    Args:
        lower: autocast's dtype.
    """
    if backend == "triton":
        return fused_linears.gated(x, projection, norm, lower, keep)
    u = _project(x, projection, norm, lower, backend)
    return geglu_forward(u, GEGLU.choose(_own(backend), u)), u if keep else None


@torch.no_grad()
def gated_linear_backward(
    grad_y: Tensor,
    x: Tensor | None,
    u: Tensor | None,
    projection: Projection,
    norm: Norm | None,
    lower: torch.dtype | None,
    backend: str,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x (M, in), of the norm's weight and bias, and of `flatten([projection])`; None where not needed.

    Args:
        u: as the forward gave it; None: it is computed again.
        x: as the forward took it; None where u is given and `lora_linears_backward` does without it.
        needs: for each of these gradients, whether it is needed; the norm's two are False where there is none.
    """
    if backend == "triton":
        return fused_linears.gated_backward(grad_y, x, u, projection, norm, lower, needs)
    if u is None:
        u = _project(x, projection, norm, lower, backend)
    grad_u = geglu_backward(grad_y, u, GEGLU.choose(_own(backend), u))
    chosen = LORA_LINEAR.choose(_own(backend), grad_u if x is None else x, (projection,), lower, norm)
    return lora_linears_backward([grad_u], x, (projection,), norm, lower, chosen, needs)


def _project(x, projection, norm, lower, backend):
    chosen = LORA_LINEAR.choose(_own(backend), x, (projection,), lower, norm)
    return lora_linears_forward(x, (projection,), norm, lower, chosen)[0]


def _own(backend: str) -> str:
    """What the two ops are asked for where this op is served by `backend`."""
    return "reference" if backend == "reference" else "auto"


class _GatedLinear(torch.autograd.Function):
    """Saves x; the backward computes u again."""

    @staticmethod
    def forward(ctx, options, x, *tensors):
        norm, projection, lower, backend = _parts(options, tensors)
        ctx.save_for_backward(x, *tensors)
        ctx.options = options
        return gated_linear_forward(x, projection, norm, lower, backend)[0]

    @staticmethod
    def backward(ctx, grad_y):
        grad_x, *others = compiled.backward(
            _GatedLinearBackward, ctx.options, ctx.needs_input_grad[1:], grad_y, *ctx.saved_tensors
        )
        x = ctx.saved_tensors[0]
        return None, None if grad_x is None else grad_x.view(x.shape).to(x.dtype), *others


class _GatedLinearBackward(torch.autograd.Function):
    """The backward as a node of its own, so that differentiating it again is an error."""

    @staticmethod
    def forward(ctx, options, needs, grad_y, x, *tensors):
        norm, projection, lower, backend = _parts(options, tensors)
        with autocast.disabled(grad_y.device):
            return tuple(gated_linear_backward(grad_y, x, None, projection, norm, lower, backend, needs))

    @staticmethod
    def backward(ctx, *grads):
        raise compiled.differentiated_twice("gated_linear")


def _parts(options, tensors):
    """The norm and projection of a call from its tensors; autocast's dtype; the backend."""
    scales, eps, lower, backend = options
    weight, bias, *others = tensors
    return None if eps is None else Norm(weight, bias, eps), restore(others, [scales])[0], lower, backend


def _example(device: torch.device | str, dtype: torch.dtype) -> tuple:
    return torch.empty(2, 4096, 320, device=device, dtype=dtype), Projection(
        torch.empty(2560, 320, device=device, dtype=dtype)
    )


OP = backends.register(
    backends.Op(
        "gated_linear",
        {
            "triton": lambda x, projection=None, *others: fused_linears.reasons(x, (projection,), *others),
            "separate": lambda x, *others: backends.transform_reasons(),
            "reference": lambda x, *others: [],
        },
        _example,
        lambda x, projection, *others: fused_linears.key(x, (projection,), *others),
    )
)
