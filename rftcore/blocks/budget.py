"""recompute="auto": which values of which layer are made again, the cheapest first, until a budget holds."""

from __future__ import annotations

import math
import re
import reprlib
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from rftcore.blocks import costs, layers
from rftcore.blocks.program import Program
from rftcore.ops.autocast import lowered


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

    def drop(self, name: str, program: Program, parameters, x: Tensor, lower: torch.dtype | None, given: bool = False):
        """The values that the layer of this name makes again; None for a layer that is not known.

        Args:
            given: whether the model is given what `once` makes.

        Raises:
            ValueError: where the least that the model can keep is more than the budget.
        """
        if (model := self._model()) is None:
            return None
        if not self._scales:
            self._scales = layers.scales(model)
        if name not in self._scales or x.dim() != 4:
            return None
        wants = tuple(p is not None and p.requires_grad for p in parameters)
        batch, _, height, width = x.shape
        # The size at the model's input, as far as it can be told from here: an odd one was rounded up on the way.
        size = (batch, *(round(pixels * 2.0 ** self._scales[name]) for pixels in (height, width)))
        key = (*size, x.dtype if lower is None else lowered(x, lower), lower, given)
        choice = self._choices.get(key, {}).get(name)
        if choice is None or choice[:2] != (program, wants):
            # Adapters have come or gone, or what is trained has changed.
            self._scales = layers.scales(model)
            planned = self._choose(model, *key)
            choice = planned.get(name)
            if choice is None or choice[:2] != (program, wants):
                # It runs otherwise than its build says: remembered, not to be planned for on every call.
                choice = Choice(program, wants, None)
            before = self._choices.get(key, {})
            odd = {other: old for other, old in before.items() if old.drop is None}
            self._choices[key] = {**planned, **odd, name: choice}
        return choice.drop

    def _choose(self, model: nn.Module, batch, height, width, dtype, lower, given) -> dict[str, Choice]:
        # Not for the eyes of a mode that counts or changes what the model does.
        with _disable_current_modes():
            found = list(costs.priced(model, batch, height, width, dtype, lower, given=given))
        excess = sum(cost.kept for _, cost in found) - self._bytes
        least = -excess
        drops: dict[str, set[str]] = {layer.name: set() for layer, _ in found}
        items, taken = [(item, layer.name) for layer, cost in found for item in cost.items], []
        for item, name in sorted(items, key=lambda pair: pair[0].price):
            least += item.bytes
            if excess > 0:
                drops[name].update(item.names)
                taken.append((item, name))
                excess -= item.bytes
        # The last one frees more than is needed: of what went before it, the dearest that fits in is kept after all.
        for item, name in sorted(taken, key=lambda pair: -pair[0].price * pair[0].bytes):
            if item.bytes <= -excess:
                drops[name].difference_update(item.names)
                excess += item.bytes
        if least < 0:
            raise ValueError(
                f"memory_budget={self._bytes / 2**20:.0f} MiB cannot be kept for an input of {batch} x {height} x "
                f"{width}: the least is {(self._bytes - least) / 2**20:.0f} MiB. Raise it, or make the batch smaller."
            )
        return {
            layer.name: Choice(layer.program, costs.wants(layer), frozenset(drops[layer.name])) for layer, _ in found
        }


def bytes_of(memory_budget: int | str) -> int:
    """Bytes of a number or of a text such as "264MiB", "1.5 GiB", "8GB".

    Raises: ValueError.
    """
    if isinstance(memory_budget, int) and not isinstance(memory_budget, bool) and 0 < memory_budget < 2**63:
        return memory_budget
    text = memory_budget if isinstance(memory_budget, str) else ""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?\s*", text, re.ASCII)
    unit = (match and match[2]) or "B"
    base = 1024 if "i" in unit else 1000
    size = float(match[1]) * base ** " KMGT".index(unit[0] if unit != "B" else " ") if match else 0.0
    if not 1 <= size < 2**63:
        raise ValueError(
            f"memory_budget={reprlib.repr(memory_budget)}; it must be a positive number of bytes, or a text such as "
            '"264MiB" or "8GiB".'
        )
    return int(size)


def text_of(count: int) -> str:
    """A number of bytes for people, such as "264 MiB" or "8.25 GiB", rounded up."""
    unit, name = next((size, name) for size, name in _UNITS if count >= size or size == 1)
    digits = 2 if name == "GiB" else int(unit > 1 and count < 10 * unit)
    return f"{math.ceil(count / unit * 10**digits) / 10**digits:.{digits}f} {name}"


_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
