"""What the layers of a model keep for a backward, and the price of making it again, in FLOPs a byte.

All numbers come from shapes. A value that is made again costs the matrix products that make it, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rftcore.blocks import layers
from rftcore.blocks.layers import Layer
from rftcore.blocks.levels import is_boundary
from rftcore.blocks.program import plan
from rftcore.counting import FLOPs


class Item(NamedTuple):
    """Values of a layer that one step makes and that can be made again.

    Attributes:
        price: FLOPs a byte.
        names: of the values.
        bytes: that are not kept then.
    """

    price: float
    names: tuple[str, ...]
    bytes: int


class Costs(NamedTuple):
    """What a layer keeps where it makes nothing again (bytes), and what it could make again."""

    kept: int
    items: list[Item]


def of_layer(layer: Layer, lower: torch.dtype | None) -> Costs:
    """Sizes and prices of a layer's values, found by running it without data. All inputs want gradients."""
    program = layer.program
    needs = (*(name not in ("temb", "encoder_hidden_states") for name in program.inputs), *wants(layer))
    sizes: dict[str, int] = {}
    flops: list[int] = []
    values = dict(zip(program.inputs, layer.inputs, strict=True))
    for name, tensor in values.items():
        sizes[name] = tensor.nbytes
    with torch.no_grad():
        for step in program.steps:
            own = [layer.parameters[i] for i in step.parameters]
            with FLOPs() as counted:
                outputs, statistics, _ = step.kind.forward([values[name] for name in step.inputs], own, lower)
            flops.append(counted.total)
            for name, tensor in zip((*step.outputs, *step.statistics), (*outputs, *statistics), strict=True):
                values[name], sizes[name] = tensor, tensor.nbytes

    kept = plan(program, needs, frozenset()).kept
    maker = {name: i for i, step in enumerate(program.steps) for name in step.outputs}

    def flops_of(i: int, seen: set[int]) -> int:
        """FLOPs of step i and of what it reads that is not kept."""
        if i in seen:
            return 0
        seen.add(i)
        unkept = (name for name in program.steps[i].inputs if name in maker and name not in kept)
        return flops[i] + sum(flops_of(maker[name], seen) for name in unkept)

    items = []
    for i, step in enumerate(program.steps):
        names = tuple(name for name in step.outputs if name in kept and not is_boundary(program, name))
        if names:
            freed = sum(sizes[name] for name in (*names, *(s for s in step.statistics if s in kept)))
            items.append(Item(flops_of(i, set()) / freed, names, freed))
    return Costs(sum(sizes[name] for name in kept if name not in layer.shared), items)


def priced(
    model: nn.Module,
    batch: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    lower: torch.dtype | None,
    tokens: int = layers.TEXT_TOKENS,
    given: bool | None = None,
) -> Iterator[tuple[Layer, Costs]]:
    """The layers of an accelerated model and their costs, for an input (batch, ..., height, width).

    Args:
        dtype: of the layers' inputs.
        lower: autocast's dtype, or None.
        tokens: of the text.
        given: whether what `once.compute` makes is given to them; None: as it would be now.
    """
    # Each kind of layer is counted once.
    known: dict[Any, Costs] = {}
    for layer in layers.layers(model, batch, height, width, dtype, given):
        layer = _with_text(layer, tokens)
        shapes = tuple((t.shape, t.dtype) for t in layer.inputs)
        weights = tuple(None if p is None else (p.shape, p.dtype, p.requires_grad) for p in layer.parameters)
        key = (layer.program, shapes, weights, layer.shared)
        if key not in known:
            with sdpa_kernel(SDPBackend.MATH):
                known[key] = of_layer(layer, lower)
        yield layer, known[key]


def _with_text(layer: Layer, tokens: int) -> Layer:
    """The layer where the text, or the keys and values that were made of it, has so many tokens."""

    def resized(name: str, tensor: Tensor) -> Tensor:
        is_text = name in layer.shared and tensor.dim() == 3
        return tensor.new_empty(tensor.shape[0], tokens, tensor.shape[2]) if is_text else tensor

    return layer._replace(inputs=tuple(map(resized, layer.program.inputs, layer.inputs)))


def wants(layer: Layer) -> tuple[bool, ...]:
    """Which of the layer's parameters want a gradient."""
    return tuple(p is not None and p.requires_grad for p in layer.parameters)
