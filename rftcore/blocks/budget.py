"""recompute="auto": which values of which layer are made again, by FLOPs a byte, so that a budget holds.

All numbers come from shapes. A value that is made again costs the matrix products that make it, once; so each has its
price in FLOPs a byte, and the cheapest are made again until what is kept fits.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

from rftcore.blocks import layers
from rftcore.blocks.layers import Layer
from rftcore.blocks.levels import is_boundary
from rftcore.blocks.program import Program, plan
from rftcore.ops.autocast import lowered


class Item(NamedTuple):
    """Values of a layer that one step makes and that can be made again.

    Attributes:
        price: FLOPs a byte.
        names: of the values.
        bytes: that are not kept then.
        flops: that it takes.
    """

    price: float
    names: tuple[str, ...]
    bytes: int
    flops: int


@dataclasses.dataclass
class Costs:
    """What a layer keeps where it makes nothing again (bytes), and what it could make again."""

    kept: int
    items: list[Item]


class _FLOPs(TorchDispatchMode):
    """Counts the FLOPs of matrix products and convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=output)
        return output


def costs(layer: Layer, lower: torch.dtype | None) -> Costs:
    """Sizes and prices of a layer's values, found by running it without data. All inputs want gradients."""
    program, wants = layer.program, [p is not None and p.requires_grad for p in layer.parameters]
    needs = (*(name not in layer.shared or name == "res_hidden_states" for name in program.inputs), *wants)
    sizes: dict[str, int] = {}
    flops: list[int] = []
    values = dict(zip(program.inputs, layer.inputs, strict=True))
    for name, tensor in values.items():
        sizes[name] = tensor.nbytes
    with torch.no_grad():
        for step in program.steps:
            own = [layer.parameters[i] for i in step.parameters]
            with _FLOPs() as counted:
                outputs, statistics, _ = step.kind.forward([values[name] for name in step.inputs], own, lower)
            flops.append(counted.total)
            for name, tensor in zip((*step.outputs, *step.statistics), (*outputs, *statistics), strict=True):
                values[name], sizes[name] = tensor, tensor.nbytes

    kept = plan(program, needs, frozenset()).kept
    maker = {name: i for i, step in enumerate(program.steps) for name in step.outputs}

    def price_of(i: int, seen: set[int]) -> int:
        """FLOPs of step i and of what it reads that is not kept."""
        if i in seen:
            return 0
        seen.add(i)
        unkept = (name for name in program.steps[i].inputs if name in maker and name not in kept)
        return flops[i] + sum(price_of(maker[name], seen) for name in unkept)

    items = []
    for i, step in enumerate(program.steps):
        names = tuple(name for name in step.outputs if name in kept and not is_boundary(program, name))
        if names:
            freed = sum(sizes[name] for name in (*names, *(s for s in step.statistics if s in kept)))
            cost = price_of(i, set())
            items.append(Item(cost / freed, names, freed, cost))
    return Costs(sum(sizes[name] for name in kept if name not in layer.shared), items)


@dataclasses.dataclass
class Budget:
    """Bytes that one forward of a model may keep for its backward, and the choices that follow for each shape of input.

    Args:
        model: the accelerated model.
        bytes: the budget.
    """

    model: nn.Module
    bytes: int
    _choices: dict[Any, dict[str, tuple[Program, frozenset[str]]]] = dataclasses.field(default_factory=dict, repr=False)

    def drop(self, name: str, program: Program, x: Tensor, lower: torch.dtype | None) -> frozenset[str]:
        """The values that the layer of this name makes again.

        Raises:
            ValueError: where the least that the model can keep is more than the budget.
        """
        if x.dim() != 4:
            return frozenset()
        places = layers.scales(self.model)
        if name not in places:
            return frozenset()
        batch, _, height, width = x.shape
        # The size at the model's input, as far as it can be told from here: an odd one was rounded up on the way.
        size = (batch, *(round(pixels * 2.0 ** places[name]) for pixels in (height, width)))
        dtype = x.dtype if lower is None else lowered(x, lower)
        key = (*size, dtype, lower)
        if key not in self._choices or self._choices[key].get(name, (program,))[0] != program:
            self._choices[key] = self._choose(*size, dtype, lower)
        return self._choices[key].get(name, (program, frozenset()))[1]

    def _choose(self, batch, height, width, dtype, lower) -> dict[str, tuple[Program, frozenset[str]]]:
        """For each layer its program and what it makes again."""
        # Not for the eyes of a mode that counts or changes what the model does.
        with _disable_current_modes():
            found = list(self._priced(batch, height, width, dtype, lower))
        excess = sum(cost.kept for _, cost in found) - self.bytes
        least = -excess
        drops: dict[str, set[str]] = {layer.name: set() for layer, _ in found}
        items = [(item, layer.name) for layer, cost in found for item in cost.items]
        for item, name in sorted(items, key=lambda pair: pair[0].price):
            least += item.bytes
            if excess > 0:
                drops[name].update(item.names)
                excess -= item.bytes
        if least < 0:
            raise ValueError(
                f"memory_budget={self.bytes / 2**20:.0f} MiB cannot be kept for an input of {batch} x {height} x "
                f"{width}: the least is {(self.bytes - least) / 2**20:.0f} MiB. Raise it, or make the batch smaller."
            )
        return {layer.name: (layer.program, frozenset(drops[layer.name])) for layer, _ in found}

    def _priced(self, batch, height, width, dtype, lower) -> Iterator[tuple[Layer, Costs]]:
        known: dict[Any, Costs] = {}
        for layer in layers.layers(self.model, batch, height, width, dtype):
            shapes = tuple((t.shape, t.dtype) for t in layer.inputs)
            weights = tuple(None if p is None else (p.shape, p.dtype, p.requires_grad) for p in layer.parameters)
            key = (layer.program, shapes, weights, layer.shared)
            if key not in known:
                known[key] = costs(layer, lower)
            yield layer, known[key]


def bytes_of(memory_budget: int | str) -> int:
    """Bytes of a number or of a text such as "264MiB", "1.5 GiB", "8GB".

    Raises: ValueError.
    """
    if isinstance(memory_budget, int) and not isinstance(memory_budget, bool) and memory_budget > 0:
        return memory_budget
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?\s*", memory_budget) if isinstance(memory_budget, str) else None
    if not match or float(match[1]) == 0:
        raise ValueError(
            f'memory_budget={memory_budget!r}; it must be a positive number of bytes, or a text such as "264MiB" or "8GiB".'
        )
    unit = match[2] or "B"
    base = 1024 if "i" in unit else 1000
    return int(float(match[1]) * base ** " KMGT".index(unit[0] if unit != "B" else " "))
