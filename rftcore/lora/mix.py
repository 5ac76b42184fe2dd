"""Linear mixtures of LoRAs: exact by concatenating ranks, or the nearest of a given rank, with its error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rftcore.errors import UsageError
from rftcore.lora import algebra
from rftcore.lora.layers import Layer, Lora, base

Term = tuple[float, Layer]
# Of fp64 sums, with room.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Mixture:
    """A mixture, and how far it is from the exact one, as a share of the exact one's Frobenius norm.

    Where the LoRAs cancel, the share is of what was summed.

    Attributes:
        error: of all layers together.
        worst_layer, worst_error: of the layer that is farthest.
    """

    lora: Lora
    error: float
    worst_layer: str
    worst_error: float


def mix(
    loras: Sequence[tuple[str, Lora, float]], rank: int | None = None, dtype: torch.dtype = torch.float32
) -> Mixture:
    """The LoRA of dW = sum of weight_i * dW_i.

    A layer that one LoRA has alone keeps its factors and alpha, its up matrix times the weight. Where several have it,
    their factors are stacked, rank beside rank, with weight and scale in the up matrix: exact but for the rounding of
    that product. Layers whose rank would exceed `rank` get the best approximation of that rank, by SVD in fp64.

    Args:
        loras: of each, its name for messages, itself, and its weight; a weight of 0 leaves it out.
        rank: the highest that a layer may have; None for the exact mixture.
        dtype: of the result.

    Raises: UsageError where two are of other base models, or nothing is left.
    """
    wanted = [(name, lora, weight) for name, lora, weight in loras if weight != 0]
    if not wanted:
        raise UsageError("every weight is 0, so nothing is left to be written; give one that is not")
    _check_same_base(wanted)
    terms: dict[str, list[Term]] = {}
    for _, lora, weight in wanted:
        for layer_name, layer in lora.layers.items():
            terms.setdefault(layer_name, []).append((weight, layer))
    layers = {name: _cast(_layer(parts, rank, name), dtype, name) for name, parts in terms.items()}
    metadata = dict(wanted[0][1].metadata) if len(wanted) == 1 else {}
    squares, errors = 0.0, {}
    for name, parts in terms.items():
        exact = _size(parts)
        off = algebra.norm(*parts, (-1.0, layers[name]))
        squares += exact**2
        errors[name] = (off, off / exact if exact else 0.0)
    worst = max(errors, key=lambda name: errors[name][1])
    total = math.sqrt(sum(off**2 for off, _ in errors.values()))
    error = total / math.sqrt(squares) if squares else 0.0
    return Mixture(Lora(layers, metadata=metadata), error, worst, errors[worst][1])


def _size(terms: Sequence[Term]) -> float:
    """The norm of a sum; where its terms cancel, so that rounding is all that is left, a bound of theirs."""
    exact = algebra.norm(*terms)
    pairs = [algebra.factors(layer) for _, layer in terms]
    summed = sum(
        abs(weight) * float(up.norm() * down.norm()) for (weight, _), (up, down) in zip(terms, pairs, strict=True)
    )
    return exact if exact > _ROUNDING * summed else summed


def _check_same_base(loras: Sequence[tuple[str, Lora, float]]) -> None:
    shapes: dict[str, tuple[str, Layer]] = {}
    for name, lora, _ in loras:
        for layer_name, layer in lora.layers.items():
            first, known = shapes.setdefault(layer_name, (name, layer))
            if known.weight_shape != layer.weight_shape:
                raise UsageError(
                    f"{name} is of another base model than {first}: {layer_name} changes a weight of "
                    f"{layer.weight_shape} there, and of {known.weight_shape} here"
                )
    kinds: dict[str | None, tuple[str, Lora]] = {}
    for name, lora, _ in loras:
        kinds.setdefault(base(lora), (name, lora))
    kinds.pop(None, None)
    if len(kinds) > 1:
        (kind, (name, _)), (other, (other_name, other_lora)) = list(kinds.items())[:2]
        key, layer = next(iter(other_lora.layers.items()))
        raise UsageError(
            f"{other_name} is of another base model than {name}: by their layers one is of {other} ({key}, a weight of "
            f"{layer.weight_shape}), the other of {kind}"
        )


def _layer(terms: Sequence[Term], rank: int | None, name: str) -> Layer:
    together = sum(layer.rank for _, layer in terms)
    if rank is not None and together > rank:
        return _truncated(terms, rank, name)
    if len(terms) == 1:
        ((weight, layer),) = terms
        return Layer(layer.down, layer.up.double() * weight, layer.alpha)
    down = torch.cat([layer.down.double() for _, layer in terms])
    up = torch.cat([layer.up.double() * (weight * layer.scale) for weight, layer in terms], dim=1)
    return Layer(down, up, float(together))


def _truncated(terms: Sequence[Term], rank: int, name: str) -> Layer:
    """The nearest change of a rank: the largest singular values, their roots in both factors."""
    left, middle, right = algebra.core(*algebra.stacked(terms))
    if not middle.isfinite().all():
        raise UsageError(f"{name} is too large to be mixed; give smaller weights")
    u, values, v = torch.linalg.svd(middle, full_matrices=False)
    kept = min(rank, len(values))
    roots = values[:kept].sqrt()
    up, down = (left @ u[:, :kept]) * roots, (right @ v[:kept].T * roots).T
    _, layer = terms[0]
    return Layer(
        down.reshape(kept, *layer.down.shape[1:]), up.reshape(up.shape[0], kept, *layer.up.shape[2:]), float(kept)
    )


def _cast(layer: Layer, dtype: torch.dtype, name: str) -> Layer:
    down, up = layer.down.to(dtype), layer.up.to(dtype)
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise UsageError(f"{name} does not fit into {dtype}; give --dtype fp32, or smaller weights")
    return Layer(down, up, layer.alpha)
