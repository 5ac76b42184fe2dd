"""What changed between two LoRAs, block by block, in the weights that they change and not in their factors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rftcore.errors import UsageError
from rftcore.lora import algebra
from rftcore.lora.layers import Layer, Lora, block


@dataclass(frozen=True)
class Difference:
    """Of one block, or of all.

    Attributes:
        layers: how many of its layers either LoRA has.
        first, second: the Frobenius norms of their changes.
        change: the norm of their difference, as a share of the first one's.
        cosine: of the angle between them, 1 for the same direction; NaN where one of them is nothing.
    """

    name: str
    layers: int
    first: float
    second: float
    change: float
    cosine: float


def diff(first: Lora, second: Lora | None) -> list[Difference]:
    """The difference of each block, and of all together last; against nothing where there is no second.

    Raises: UsageError where they are of other base models.
    """
    others = {} if second is None else second.layers
    names = [*first.layers, *(name for name in others if name not in first.layers)]
    sums = {name: _sums(name, first.layers.get(name), others.get(name)) for name in names}
    blocks: dict[str, list[tuple[float, ...]]] = {}
    for name in names:
        blocks.setdefault(block(name), []).append(sums[name])
    return [*(_difference(name, blocks[name]) for name in sorted(blocks)), _difference("all", sums.values())]


def describe(differences: list[Difference], against_nothing: bool) -> str:
    """The table of `rftcore lora diff`."""
    width = max(len(row.name) for row in differences)
    if against_nothing:
        total = differences[-1].first or 1.0
        lines = [f"{'block':<{width}}  layers       norm   share of all"]
        lines += [
            f"{row.name:<{width}}  {row.layers:>6} {row.first:>10.4g}   {(row.first / total) ** 2:>12.1%}"
            for row in differences
        ]
        return "\n".join(lines)
    lines = [f"{'block':<{width}}  layers     norm a     norm b   |b - a| / |a|   cosine"]
    lines += [
        f"{row.name:<{width}}  {row.layers:>6} {row.first:>10.4g} {row.second:>10.4g}   {row.change:>13.4g}   "
        f"{row.cosine:>6.4f}"
        for row in differences
    ]
    return "\n".join(lines)


def _sums(name: str, first: Layer | None, second: Layer | None) -> tuple[float, float, float, float]:
    """The squares of both norms and of the difference's, and the inner product."""
    if first is not None and second is not None:
        if first.weight_shape != second.weight_shape:
            raise UsageError(
                f"the two LoRAs are of other base models: {name} changes a weight of {first.weight_shape} in the "
                f"first, and of {second.weight_shape} in the second"
            )
        norm_1, norm_2 = algebra.norm((1.0, first)), algebra.norm((1.0, second))
        return norm_1**2, norm_2**2, algebra.norm((-1.0, first), (1.0, second)) ** 2, algebra.inner(first, second)
    norm = sum(algebra.norm((1.0, layer)) ** 2 for layer in (first, second) if layer is not None)
    return (norm, 0.0, norm, 0.0) if first is not None else (0.0, norm, norm, 0.0)


def _difference(name: str, sums: Iterable[tuple[float, ...]]) -> Difference:
    rows = list(sums)
    first, second, change, inner = (math.fsum(column) for column in zip(*rows, strict=True))
    return Difference(
        name,
        len(rows),
        math.sqrt(first),
        math.sqrt(second),
        math.sqrt(change / first) if first else math.inf if change else 0.0,
        inner / (math.sqrt(first) * math.sqrt(second)) if first and second else math.nan,
    )
