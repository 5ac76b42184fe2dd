"""Every op as a function of tensors, beside the stock modules' formula: for tests of all backends on any device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rftcore import ops

EPS = 1e-5


class Case(NamedTuple):
    """One op on inputs of one shape.

    Attributes:
        inputs: random fp64 tensors; those that require grad want a gradient.
        ours: op(inputs, backend); stock: what it replaces. Both return tensors.
        question: what the op's backends are asked of these inputs.
    """

    op: str
    inputs: Callable[[], Sequence[Tensor]]
    ours: Callable[[Sequence[Tensor], str], Tensor]
    stock: Callable[[Sequence[Tensor]], Tensor]
    question: Callable[[Sequence[Tensor]], tuple] = lambda inputs: inputs[:1]


def geglu(rows: int, columns: int) -> Case:
    def stock(inputs):
        hidden, gate = inputs[0].chunk(2, dim=-1)
        return hidden * F.gelu(gate)

    return Case(
        "geglu",
        lambda: trained(normal(rows, 2 * columns)),
        lambda inputs, backend: ops.geglu(*inputs, backend=backend),
        stock,
    )


def group_norm_silu(n: int, channels: int, height: int, width: int, groups: int, channels_last=True) -> Case:
    def inputs():
        x = normal(n, channels, height, width) + normal(1, channels, 1, 1)
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        return trained(x, 1 + normal(channels) / 2, normal(channels), normal(n, channels))

    def ours(inputs, backend):
        x, weight, bias, add = inputs
        return ops.group_norm_silu(x, weight, bias, groups, EPS, channel_bias=add, backend=backend)

    def stock(inputs):
        x, weight, bias, add = inputs
        return F.silu(F.group_norm(x + add[:, :, None, None], groups, weight, bias, EPS))

    return Case("group_norm_silu", inputs, ours, stock)


def layer_norm(rows: int, width: int) -> Case:
    def stock(inputs):
        return F.layer_norm(inputs[0], inputs[0].shape[-1:], *inputs[1:], EPS)

    return Case(
        "layer_norm",
        lambda: trained(normal(rows, width) + 1, 1 + normal(width) / 2, normal(width)),
        lambda inputs, backend: ops.layer_norm(*inputs, EPS, backend=backend),
        stock,
    )


def lora_linear(shape: tuple[int, ...], outs: Sequence[int], ranks: Sequence[int], *, norm: bool, biased: bool) -> Case:
    """Projections of one x to `outs` columns with an adapter of each rank, 0: none; side by side in one tensor."""

    def ours(inputs, backend):
        return torch.cat(ops.lora_linears(*_parts(inputs, ranks, norm, biased), backend=backend), dim=-1)

    def stock(inputs):
        return torch.cat(ops.lora_linears_reference(*_parts(inputs, ranks, norm, biased)), dim=-1)

    return Case(
        "lora_linear", lambda: _projections(shape, outs, ranks, norm, biased), ours, stock,
        lambda inputs: (*_parts(inputs, ranks, norm, biased)[:2], None),
    )  # fmt: skip


def gated_linear(shape: tuple[int, ...], out: int, rank: int, *, norm: bool, biased: bool) -> Case:
    """A feed-forward's first projection, to twice `out` columns."""

    def parts(inputs):
        x, (projection,), before = _parts(inputs, [rank], norm, biased)
        return x, projection, before

    def stock(inputs):
        hidden, gate = ops.lora_linears_reference(*_parts(inputs, [rank], norm, biased))[0].chunk(2, dim=-1)
        return hidden * F.gelu(gate)

    return Case(
        "gated_linear", lambda: _projections(shape, [2 * out], [rank], norm, biased),
        lambda inputs, backend: ops.gated_linear(*parts(inputs), backend=backend), stock,
        lambda inputs: (*parts(inputs)[:2], None),
    )  # fmt: skip


def _projections(shape, outs, ranks, norm, biased) -> list[Tensor]:
    """With frozen weights, biases and norm."""
    width = shape[-1]
    found = [*trained(normal(*shape)), *([1 + normal(width) / 2, normal(width)] if norm else [])]
    for out, rank in zip(outs, ranks, strict=True):
        found.append(normal(out, width) / width**0.5)
        found += [normal(out)] if biased else []
        found += trained(normal(rank, width) / width**0.5, normal(out, rank) / rank**0.5) if rank else []
    return found


def _parts(inputs, ranks, norm, biased):
    """x, projections and norm of `_projections`' tensors."""
    left = iter(inputs)
    x = next(left)
    before = ops.Norm(next(left), next(left), EPS) if norm else None
    projections = []
    for rank in ranks:
        weight, bias = next(left), next(left) if biased else None
        adapters = (ops.Adapter(next(left), next(left), 0.7),) if rank else ()
        projections.append(ops.Projection(weight, bias, adapters))
    return x, projections, before


def conv2d(n: int, channels: int, size: int, out: int, rank: int) -> Case:
    """3 x 3, channels_last; with an adapter of this rank, 0: none."""
    geometry = ops.Geometry(padding=(1, 1))

    def inputs():
        x = normal(n, channels, size, size).to(memory_format=torch.channels_last)
        adapter = trained(normal(rank, channels, 3, 3) / 3, normal(out, rank, 1, 1)) if rank else []
        return [*trained(x), normal(out, channels, 3, 3) / (3 * channels**0.5), normal(out), *adapter]

    def adapters(tensors):
        return [ops.Adapter(*tensors[3:], 0.7)] if rank else []

    def ours(tensors, backend):
        if not rank:
            return ops.frozen_conv2d(*tensors, geometry, backend=backend)
        return ops.lora_conv2d(*tensors[:3], adapters(tensors), geometry, backend=backend)

    def stock(tensors):
        return ops.lora_conv2d_reference(*tensors[:3], adapters(tensors), geometry)

    return Case("lora_conv2d" if rank else "frozen_conv2d", inputs, ours, stock)


def attention(b: int, heads: int, n: int, m: int, d: int) -> Case:
    def ours(inputs, backend):
        return ops.attention(*(split(t) for t in inputs), backend=backend)

    def stock(inputs):
        return F.scaled_dot_product_attention(*(split(t) for t in inputs))

    def split(t):
        return t.unflatten(-1, (heads, d)).transpose(1, 2)

    return Case(
        "attention",
        lambda: trained(normal(b, n, heads * d), normal(b, m, heads * d), normal(b, m, heads * d)),
        ours,
        stock,
        lambda inputs: tuple(split(t) for t in inputs),
    )


def sampler_step(*shape: int) -> Case:
    """Guided, with noise: the next sample and the log-probability, one behind the other."""
    # x0 of x and m, its clip, the mean of x0, x and m, sigma, eps of m, guidance.
    columns = [1.2, -0.7, math.inf, 0.5, 0.6, -0.1, 0.3, 1.0, 7.5]

    def step(function, inputs, **options):
        sample, output, noise = inputs
        dtype = torch.promote_types(sample.dtype, torch.float32)
        coefficients = torch.tensor(columns, dtype=dtype, device=sample.device)
        found = function(sample, output, coefficients, noise=noise, **options)
        return torch.cat([found.next_sample.flatten(), found.log_prob])

    return Case(
        "sampler_step",
        lambda: [*trained(normal(*shape), normal(2 * shape[0], *shape[1:])), normal(*shape)],
        lambda inputs, backend: step(ops.sampler_step, inputs, backend=backend),
        lambda inputs: step(ops.sampler_step_reference, inputs),
        lambda inputs: inputs[:2],
    )


def trained(*tensors: Tensor) -> list[Tensor]:
    return [t.requires_grad_() for t in tensors]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


SMALL = [
    geglu(5, 33),
    geglu(37, 256),
    group_norm_silu(2, 40, 5, 7, 8),
    group_norm_silu(1, 64, 16, 16, 32),
    group_norm_silu(2, 40, 5, 7, 8, channels_last=False),
    sampler_step(3, 4, 7, 5),
    layer_norm(9, 70),
    lora_linear((2, 19, 48), (48, 48, 48), (4, 4, 4), norm=True, biased=False),
    lora_linear((37, 40), (24, 56), (0, 3), norm=False, biased=True),
    gated_linear((2, 19, 48), 40, 4, norm=True, biased=True),
    gated_linear((33, 40), 24, 0, norm=False, biased=False),
    conv2d(2, 8, 7, 12, 0),
    conv2d(2, 8, 7, 12, 3),
    attention(2, 2, 37, 37, 40),
    attention(1, 2, 33, 77, 64),
    attention(1, 2, 33, 77, 80),
    attention(1, 1, 20, 130, 160),
]
# As in SD1.5 at 512 px and SDXL at 1024 px; for a GPU.
LARGE = [
    geglu(2 * 4096, 1280),
    group_norm_silu(2, 320, 64, 64, 32),
    group_norm_silu(2, 1280, 8, 8, 32),
    group_norm_silu(1, 128, 512, 512, 32),
    sampler_step(8, 4, 64, 64),
    sampler_step(2, 4, 128, 128),
    layer_norm(2 * 4096, 320),
    lora_linear((2, 4096, 320), (320, 320, 320), (4, 4, 4), norm=True, biased=False),
    lora_linear((2, 4096, 640), (640,), (16,), norm=False, biased=True),
    lora_linear((2, 77, 2048), (1280, 1280), (64, 64), norm=False, biased=False),
    gated_linear((2, 4096, 320), 1280, 0, norm=True, biased=True),
    gated_linear((2, 256, 1280), 5120, 16, norm=True, biased=True),
    conv2d(2, 320, 64, 320, 0),
    conv2d(2, 640, 32, 640, 4),
    attention(2, 8, 4096, 4096, 40),
    attention(2, 8, 1024, 1024, 80),
    attention(2, 8, 256, 256, 160),
    attention(2, 10, 4096, 77, 64),
    attention(2, 8, 4096, 77, 40),
]
