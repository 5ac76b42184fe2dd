"""What a projection is: a weight, a bias and its adapters; and a LayerNorm in front of some."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor


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


def adapters_of(projections: Iterable[Projection]) -> list[Adapter]:
    """All adapters, of one projection after the other."""
    return [adapter for p in projections for adapter in p.adapters]


def scales_of(projections: Iterable[Projection]) -> tuple[tuple[float, ...], ...]:
    """A scale for each adapter of each projection."""
    return tuple(tuple(adapter.scale for adapter in p.adapters) for p in projections)
