"""recompute="auto": which values of which layer are made again, by FLOPs a byte, so that a budget holds.

All numbers come from shapes. A value that is made again costs the matrix products that make it, once; so each has its
price in FLOPs a byte, and the cheapest are made again until what is kept fits.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
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
    """

    price: float
    names: tuple[str, ...]
    bytes: int


class Costs(NamedTuple):
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
    program = layer.program
    needs = (*(name not in ("temb", "encoder_hidden_states") for name in program.inputs), *_wants(layer))
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


class Choice(NamedTuple):
    """What a layer makes again, as long as it has this program and wants these parameters' gradients."""

    program: Program
    wants: tuple[bool, ...]
    drop: frozenset[str] | None


class Budget:
    """Bytes that one forward of a model may keep for its backward, and the choices that follow for each shape of input.

    Args:
        model: the accelerated model.
        memory_budget: the bytes.
    """

    def __init__(self, model: nn.Module, memory_budget: int) -> None:
        self._model = weakref.ref(model)
        self._bytes = memory_budget
        self._choices: dict[Any, dict[str, Choice]] = {}
        self._scales: dict[str, int] = {}

    def __deepcopy__(self, memo):
        """Of the copied model; where only a block of it is copied, of none: that block makes everything again."""
        copied = memo.get(id(self._model()))
        return None if copied is None else Budget(copied, self._bytes)

    def __reduce__(self):
        """With the model; a block that outlived its model has none to share a budget with."""
        return (type(None), ()) if self._model() is None else (Budget, (self._model(), self._bytes))

    def drop(self, name: str, program: Program, parameters, x: Tensor, lower: torch.dtype | None):
        """The values that the layer of this name makes again; None for a layer that is not known.

        Raises:
            ValueError: where the least that the model can keep is more than the budget.
        """
        if self._model() is None:
            return None
        if not self._scales:
            self._scales = layers.scales(self._model())
        if name not in self._scales or x.dim() != 4:
            return None
        wants = tuple(p is not None and p.requires_grad for p in parameters)
        batch, _, height, width = x.shape
        # The size at the model's input, as far as it can be told from here: an odd one was rounded up on the way.
        size = (batch, *(round(pixels * 2.0 ** self._scales[name]) for pixels in (height, width)))
        key = (*size, x.dtype if lower is None else lowered(x, lower), lower)
        choice = self._choices.get(key, {}).get(name)
        if choice is None or choice[:2] != (program, wants):
            # Adapters have come or gone, or what is trained has changed.
            self._scales = layers.scales(self._model())
            planned = self._choose(*key)
            choice = planned.get(name)
            if choice is None or choice[:2] != (program, wants):
                # It runs otherwise than its build says: remembered, not to be planned for on every call.
                choice = Choice(program, wants, None)
            before = self._choices.get(key, {})
            odd = {other: old for other, old in before.items() if old.drop is None}
            self._choices[key] = {**planned, **odd, name: choice}
        return choice.drop

    def _choose(self, batch, height, width, dtype, lower) -> dict[str, Choice]:
        # Not for the eyes of a mode that counts or changes what the model does.
        with _disable_current_modes(), sdpa_kernel(SDPBackend.MATH):
            found = list(self._priced(batch, height, width, dtype, lower))
        excess = sum(cost.kept for _, cost in found) - self._bytes
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
                f"memory_budget={self._bytes / 2**20:.0f} MiB cannot be kept for an input of {batch} x {height} x "
                f"{width}: the least is {(self._bytes - least) / 2**20:.0f} MiB. Raise it, or make the batch smaller."
            )
        return {layer.name: Choice(layer.program, _wants(layer), frozenset(drops[layer.name])) for layer, _ in found}

    def _priced(self, batch, height, width, dtype, lower) -> Iterator[tuple[Layer, Costs]]:
        """The model's layers and their costs, each kind of layer counted once."""
        known: dict[Any, Costs] = {}
        for layer in layers.layers(self._model(), batch, height, width, dtype):
            shapes = tuple((t.shape, t.dtype) for t in layer.inputs)
            weights = tuple(None if p is None else (p.shape, p.dtype, p.requires_grad) for p in layer.parameters)
            key = (layer.program, shapes, weights, layer.shared)
            if key not in known:
                known[key] = costs(layer, lower)
            yield layer, known[key]


def _wants(layer: Layer) -> tuple[bool, ...]:
    return tuple(p is not None and p.requires_grad for p in layer.parameters)


def bytes_of(memory_budget: int | str) -> int:
    """Bytes of a number or of a text such as "264MiB", "1.5 GiB", "8GB".

    Raises: ValueError.
    """
    if isinstance(memory_budget, int) and not isinstance(memory_budget, bool) and memory_budget > 0:
        return memory_budget
    text = memory_budget if isinstance(memory_budget, str) else ""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?\s*", text)
    if not match or float(match[1]) == 0:
        raise ValueError(
            f"memory_budget={memory_budget!r}; it must be a positive number of bytes, or a text such as "
            '"264MiB" or "8GiB".'
        )
    unit = match[2] or "B"
    base = 1024 if "i" in unit else 1000
    return int(float(match[1]) * base ** " KMGT".index(unit[0] if unit != "B" else " "))
