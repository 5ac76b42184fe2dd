"""The callable that stands in the place of a block's own forward."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn


class Served:
    """Calls `function(block, place, ...)`. A copy of the block calls it with the copy.

    A shallow copy of the block (copy.copy, nn.DataParallel's replicas) shares it, and so runs the original.

    It does not keep the block alive, which keeps it: a model that is let go of is gone at once. torch.compile calls it
    and does not trace it: its graph breaks around the block.

    Args:
        function: of a module's top level, so that it can be pickled.
        place: what `function` is to know of the block besides.
    """

    def __init__(self, function: Callable, block: nn.Module, place: Any) -> None:
        self.function, self.place = function, place
        self._block = weakref.ref(block)

    @torch.compiler.disable(reason="rftcore serves this block; rftcore.restore(module) gives its own forward back")
    def __call__(self, *args, **kwargs):
        block = self._block()
        if block is None:
            raise RuntimeError(
                "a forward that rftcore.accelerate put in place was called after its block was gone, by a shallow copy "
                "of the block or by itself; keep the block, or copy it by copy.deepcopy."
            )
        return self.function(block, self.place, *args, **kwargs)

    def __deepcopy__(self, memo):
        block = cast(nn.Module, self._block())  # it is being copied, and so is there
        return Served(self.function, copy.deepcopy(block, memo), copy.deepcopy(self.place, memo))

    def __reduce__(self):
        return Served, (self.function, self._block(), self.place)

    @property
    def __signature__(self) -> inspect.Signature:
        whole = inspect.signature(self.function)
        return whole.replace(parameters=list(whole.parameters.values())[2:])


def place_of(module: nn.Module) -> Any:
    """What the module's forward knows of the block besides, if it is ours; else None."""
    return getattr(served(module), "place", None)


def served(module: nn.Module) -> Served | None:
    """What stands in the place of the module's own forward, if it is ours."""
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, Served) else None
