"""The kinds of steps that blocks are made of: each an op, forward and backward without autograd.

What does not bear on which values are kept, such as an adapter's scale or a backend, is left out of comparisons: a plan
made for one scale serves all.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from rftcore.blocks.program import Kind
from rftcore.ops.attention import check, kernel_of, run_backward, run_forward
from rftcore.ops.autocast import lowered
from rftcore.ops.frozen_conv2d import Geometry, memory_format_of
from rftcore.ops.gated_linear import OP as GATED_LINEAR_OP
from rftcore.ops.gated_linear import gated_linear_backward, gated_linear_forward
from rftcore.ops.geglu import OP as GEGLU_OP
from rftcore.ops.geglu import geglu_backward, geglu_forward
from rftcore.ops.group_norm_silu import OP as GROUP_NORM_OP
from rftcore.ops.group_norm_silu import group_norm_silu_backward, group_norm_silu_forward
from rftcore.ops.lora_conv2d import convolve, convolve_backward
from rftcore.ops.lora_linear import OP as LINEAR_OP
from rftcore.ops.lora_linear import lora_linears_backward, lora_linears_forward, normalise, normalise_backward
from rftcore.ops.projections import Norm, flatten, restore


@dataclass(frozen=True)
class GroupNorm(Kind):
    """x (N, C, ...), or also an embedding: (N, C) added before, or (N, 2C), scale and shift after. Weight, bias."""

    cheap: ClassVar[bool] = True
    num_groups: int
    eps: float
    silu: bool
    embedding: str | None = None  # None, "add" or "scale_shift"
    backend: str = field(default="auto", compare=False)

    def reads(self, needs):
        return range(1 if self.embedding is None else 2), (), True

    def unread(self):
        return () if self.silu else (1,)

    def _arguments(self, inputs, parameters) -> tuple[Any, Any, Any, Any, Any, Any, int]:
        (x, *embedding), (weight, bias) = inputs, parameters
        add = scale = shift = None
        if self.embedding == "add":
            (add,) = embedding
        elif self.embedding == "scale_shift":
            scale, shift = embedding[0].chunk(2, dim=1)
        return x, weight, bias, add, scale, shift, self.num_groups

    def forward(self, inputs, parameters, lower, state=None):
        arguments = self._arguments(inputs, parameters)
        backend = state or GROUP_NORM_OP.choose(self.backend, inputs[0])
        y, *statistics = group_norm_silu_forward(*arguments, self.eps, self.silu, backend)
        return (y,), statistics, backend

    def backward(self, grads, inputs, outputs, statistics, parameters, state, needs, lower):
        arguments = self._arguments(inputs, parameters)
        needs_x, *needs_embedding, needs_weight, needs_bias = needs
        of_add = self.embedding == "add" and needs_embedding[0]
        of_scale = self.embedding == "scale_shift" and needs_embedding[0]
        mean, deviation = statistics
        x, weight, bias, add, scale, shift = group_norm_silu_backward(
            grads[0], *arguments, self.eps, self.silu, mean, deviation, state,
            (needs_x, needs_weight, needs_bias, of_add, of_scale, of_scale),
        )  # fmt: skip
        embedding = [torch.cat([scale, shift], dim=1) if of_scale else add] if self.embedding else []
        return [x, *embedding, weight, bias]


@dataclass(frozen=True)
class LayerNorm(Kind):
    """h (..., C). Weight, bias."""

    cheap: ClassVar[bool] = True
    eps: float

    def reads(self, needs):
        return (0,), (), True

    def unread(self):
        return (1,)

    def forward(self, inputs, parameters, lower, state=None):
        n, *statistics = normalise(inputs[0], self._norm(parameters), lower)
        return (n,), statistics, None

    def backward(self, grads, inputs, outputs, statistics, parameters, state, needs, lower):
        (mean, deviation), norm = statistics, self._norm(parameters)
        return list(normalise_backward(grads[0], inputs[0], norm, mean, deviation, list(needs), lower))

    def _norm(self, parameters) -> Norm:
        weight, bias = parameters
        return Norm(weight, bias, self.eps)


@dataclass(frozen=True)
class Linear(Kind):
    """x (..., in) and, of a single projection, optionally a residual (..., out). Parameters of the projections.

    Attributes:
        adapters: of each projection.
        eps: of a LayerNorm in front, whose weight and bias are then the first parameters; None: there is none.
    """

    cheap: ClassVar[bool] = False
    adapters: tuple[int, ...]
    scales: tuple[tuple[float, ...], ...] = field(compare=False)
    residual: bool = False
    eps: float | None = None
    backend: str = field(default="auto", compare=False)

    def reads(self, needs):
        if self.eps is not None:
            return (0,), (), False
        projections = restore(needs[2 if self.residual else 1 :], self.scales)
        trained = any(p.weight or any(a.a or a.b for a in p.adapters) for p in projections)
        return (0,) if trained else (), (), False

    def unread(self):
        first = 0 if self.eps is None else 2
        lengths = [2 + 2 * count for count in self.adapters]
        return [start + 1 for start in itertools.accumulate(lengths[:-1], initial=first)]

    def forward(self, inputs, parameters, lower, state=None):
        x, *residual = inputs
        norm, projections = _normed(parameters, self.scales, self.eps)
        backend = state[2] if state else LINEAR_OP.prefer(self.backend, x, projections, lower, norm)
        outputs = lora_linears_forward(x, projections, norm, lower, backend, residual[0] if residual else None)
        # The product's dtype, which a residual may have widened.
        return outputs, (), (x.shape, lowered(x, lower), backend)

    def backward(self, grads, inputs, outputs, statistics, parameters, state, needs, lower):
        shape, dtype, backend = state
        norm, projections = _normed(parameters, self.scales, self.eps)
        count = len(inputs)
        of_norm = (False, False) if norm is None else ()
        grad_x, *found = lora_linears_backward(
            [g.to(dtype) for g in grads], inputs[0], projections, norm, lower, backend,
            (needs[0], *of_norm, *needs[count:]),
        )  # fmt: skip
        grad_x = None if grad_x is None else grad_x.view(shape)
        return [grad_x, *(grads[0] if need else None for need in needs[1:count]), *found[len(of_norm) :]]


@dataclass(frozen=True)
class GatedLinear(Kind):
    """x (..., in) to y (..., D) and, where `keeps`, u (..., 2D). Parameters of the norm, if any, and the projection."""

    cheap: ClassVar[bool] = False
    adapters: int
    scales: tuple[float, ...] = field(compare=False)
    eps: float | None
    keeps: bool
    backend: str = field(default="auto", compare=False)

    def reads(self, needs):
        # u is made again of x, and a norm's backward reads it.
        _, (p,) = _normed(needs[1:], [self.scales], self.eps)
        trained = p.weight or any(a.a or a.b for a in p.adapters)
        return (0,) if trained or self.eps is not None or not self.keeps else (), (1,) if self.keeps else (), False

    def unread(self):
        # Behind the norm's two and the weight.
        return (1 if self.eps is None else 3,) if self.keeps else ()

    def forward(self, inputs, parameters, lower, state=None):
        (x,) = inputs
        norm, (projection,) = _normed(parameters, [self.scales], self.eps)
        backend = state[2] if state else GATED_LINEAR_OP.prefer(self.backend, x, projection, lower, norm)
        y, u = gated_linear_forward(x, projection, norm, lower, backend, self.keeps)
        return (y, u) if self.keeps else (y,), (), (x.shape, lowered(x, lower), backend)

    def backward(self, grads, inputs, outputs, statistics, parameters, state, needs, lower):
        shape, dtype, backend = state
        norm, (projection,) = _normed(parameters, [self.scales], self.eps)
        of_norm = (False, False) if norm is None else ()
        u = outputs[1] if self.keeps else None
        grad_x, *found = gated_linear_backward(
            grads[0].to(dtype), inputs[0], u, projection, norm, lower, backend, (needs[0], *of_norm, *needs[1:])
        )
        return [None if grad_x is None else grad_x.view(shape), *found[len(of_norm) :]]


def _normed(values, scales, eps):
    """The norm, if there is one, and the projections of a step's parameters, or of values in their places."""
    if eps is None:
        return None, restore(values, scales)
    weight, bias, *others = values
    return Norm(weight, bias, eps), restore(others, scales)


@dataclass(frozen=True)
class Convolution(Kind):
    """x (N, C, H, W) and optionally a residual of the output's shape. Weight, bias, and each adapter's a and b."""

    cheap: ClassVar[bool] = False
    geometry: Geometry
    adapters: int
    scales: tuple[float, ...] = field(compare=False)
    residual: bool = False

    def reads(self, needs):
        (p,) = restore(needs[2 if self.residual else 1 :], [self.scales])
        return (0,) if p.weight or any(a.a or a.b for a in p.adapters) else (), (), False

    def unread(self):
        return (1,)

    def forward(self, inputs, parameters, lower, state=None):
        x = inputs[0]
        (p,) = restore(parameters, [self.scales])
        y = convolve(x, *p, self.geometry, lower)
        state = y.dtype, x.shape[2:], memory_format_of(x, p.weight)
        return (_added(y, inputs[1]) if self.residual else y,), (), state

    def backward(self, grads, inputs, outputs, statistics, parameters, state, needs, lower):
        dtype, size, memory_format = state
        (p,), (needed,) = restore(parameters, [self.scales]), restore(needs[len(inputs) :], [self.scales])
        below, found = convolve_backward(
            grads[0].to(dtype), inputs[0], p, needs[0], needed, size, memory_format, self.geometry, lower
        )
        return [below, *(grads[0] if need else None for need in needs[1 : len(inputs)]), *flatten([found])]


@dataclass(frozen=True)
class Attention(Kind):
    """q (B, N, heads d), k and v (B, M, heads d)."""

    cheap: ClassVar[bool] = False
    heads: int
    scale: float
    backend: str = field(default="auto", compare=False)

    def reads(self, needs):
        return (0, 1, 2), (0,), True

    def _split(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, d)

    def forward(self, inputs, parameters, lower, state=None):
        dtype = lowered(inputs[0], lower)
        q, k, v = (self._split(t.to(dtype)) for t in inputs)
        check(q, k, v)
        backend = state or kernel_of(self.backend, q, k, v)
        o, lse = run_forward(backend, q, k, v, self.scale)
        return (o.transpose(1, 2).flatten(2),), (lse,), backend

    def backward(self, grads, inputs, outputs, statistics, parameters, state, needs, lower):
        o, (lse,) = outputs[0], statistics
        q, k, v = (self._split(t.to(o.dtype)) for t in inputs)
        grads = run_backward(state, self._split(grads[0].to(o.dtype)), q, k, v, self._split(o), lse, self.scale, needs)
        return [None if g is None else g.transpose(1, 2).flatten(2) for g in grads]


@dataclass(frozen=True)
class GEGLU(Kind):
    """u (..., 2D): hidden states, then gate.

    Attributes:
        joint_backend: of `gated_linear`, where this and the projection before it are one step.
    """

    cheap: ClassVar[bool] = True
    backend: str = field(default="auto", compare=False)
    joint_backend: str = field(default="auto", compare=False)

    def reads(self, needs):
        return (0,), (), False

    def forward(self, inputs, parameters, lower, state=None):
        backend = state or GEGLU_OP.choose(self.backend, inputs[0])
        return (geglu_forward(inputs[0], backend),), (), backend

    def backward(self, grads, inputs, outputs, statistics, parameters, state, needs, lower):
        return [geglu_backward(grads[0], inputs[0], state)]


@dataclass(frozen=True)
class SiLU(Kind):
    """x, of any shape."""

    cheap: ClassVar[bool] = True

    def reads(self, needs):
        return (0,), (), False

    def forward(self, inputs, parameters, lower, state=None):
        return (F.silu(inputs[0]),), (), None

    def backward(self, grads, inputs, outputs, statistics, parameters, state, needs, lower):
        return [torch.ops.aten.silu_backward(grads[0], inputs[0])]


@dataclass(frozen=True)
class Concatenation(Kind):
    """Two tensors (N, C_i, ...), along the channels."""

    cheap: ClassVar[bool] = True

    def reads(self, needs):
        # Its backward does not look at them; but where they are kept, their sum need not be.
        return (0, 1), (), False

    def forward(self, inputs, parameters, lower, state=None):
        return (torch.cat(inputs, dim=1),), (), [t.shape[1] for t in inputs]

    def backward(self, grads, inputs, outputs, statistics, parameters, state, needs, lower):
        parts = grads[0].split(state, dim=1)
        return [part if need else None for part, need in zip(parts, needs, strict=True)]


@dataclass(frozen=True)
class Rows(Kind):
    """A row (1, C), or already one for each image, and images x (N, any, ...) -> (N, C)."""

    cheap: ClassVar[bool] = True

    def reads(self, needs):
        return (), (), False

    def forward(self, inputs, parameters, lower, state=None):
        row, x = inputs
        return (row.expand(x.shape[0], -1).contiguous(),), (), row.shape[0]

    def backward(self, grads, inputs, outputs, statistics, parameters, state, needs, lower):
        (grad,) = grads
        return [grad.sum(0, keepdim=True) if state == 1 else grad, None] if needs[0] else [None, None]


@dataclass(frozen=True)
class ToTokens(Kind):
    """x (N, C, H, W) -> (N, H W, C)."""

    cheap: ClassVar[bool] = True

    def reads(self, needs):
        return (), (), False

    def forward(self, inputs, parameters, lower, state=None):
        x = inputs[0]
        return (x.permute(0, 2, 3, 1).flatten(1, 2),), (), x.shape[2:]

    def backward(self, grads, inputs, outputs, statistics, parameters, state, needs, lower):
        return [grads[0].unflatten(1, state).permute(0, 3, 1, 2)]


@dataclass(frozen=True)
class ToImage(Kind):
    """Tokens (N, H W, C) and an image (N, any, H, W) -> (N, C, H, W).

    Attributes:
        contiguous: whether it is laid out anew, as Transformer2DModel does, but for a channels_last image; a view of
            the tokens is channels_last.
        residual: whether the image is added.
    """

    cheap: ClassVar[bool] = True
    contiguous: bool
    residual: bool

    def reads(self, needs):
        return (), (), False

    def forward(self, inputs, parameters, lower, state=None):
        tokens, image = inputs
        y = tokens.unflatten(1, image.shape[2:]).permute(0, 3, 1, 2)
        keep = self.contiguous and not image.is_contiguous(memory_format=torch.channels_last)
        if self.residual:
            # In the memory format of the first.
            return (image + y if keep else y + image,), (), None
        return (y.contiguous() if keep else y,), (), None

    def backward(self, grads, inputs, outputs, statistics, parameters, state, needs, lower):
        needs_tokens, needs_image = needs
        return [
            grads[0].permute(0, 2, 3, 1).flatten(1, 2) if needs_tokens else None,
            grads[0] if needs_image and self.residual else None,
        ]


@dataclass(frozen=True)
class Upsampling(Kind):
    """x (N, C, H, W), to `size`, each pixel from its nearest; twice as large where no size is given."""

    cheap: ClassVar[bool] = True
    size: tuple[int, int] | None = field(compare=False)

    def reads(self, needs):
        return (), (), False

    def forward(self, inputs, parameters, lower, state=None):
        x = inputs[0]
        scales = (2.0, 2.0) if self.size is None else (None, None)
        size = self.size or (2 * x.shape[2], 2 * x.shape[3])
        return (torch.ops.aten.upsample_nearest2d(x, size, *scales),), (), (x.shape, size, scales)

    def backward(self, grads, inputs, outputs, statistics, parameters, state, needs, lower):
        shape, size, scales = state
        return [torch.ops.aten.upsample_nearest2d_backward(grads[0], size, shape, *scales)]


@dataclass(frozen=True)
class Padding(Kind):
    """x (N, C, H, W), with zeros at the right and the bottom: (N, C, H + 1, W + 1)."""

    cheap: ClassVar[bool] = True

    def reads(self, needs):
        return (), (), False

    def forward(self, inputs, parameters, lower, state=None):
        return (F.pad(inputs[0], (0, 1, 0, 1)),), (), None

    def backward(self, grads, inputs, outputs, statistics, parameters, state, needs, lower):
        return [grads[0][:, :, :-1, :-1]]


@dataclass(frozen=True)
class Quotient(Kind):
    """x / divisor."""

    cheap: ClassVar[bool] = True
    divisor: float

    def reads(self, needs):
        return (), (), False

    def forward(self, inputs, parameters, lower, state=None):
        return (inputs[0] / self.divisor,), (), None

    def backward(self, grads, inputs, outputs, statistics, parameters, state, needs, lower):
        return [grads[0] / self.divisor]


def _added(fresh: Tensor, residual: Tensor) -> Tensor:
    """Their sum; in place where the dtype allows that."""
    wide = torch.promote_types(fresh.dtype, residual.dtype)
    return fresh.add_(residual) if wide == fresh.dtype else fresh + residual
