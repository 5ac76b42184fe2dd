"""Exact counts of what PyTorch computes and keeps, on any device, of tensors without data, too."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations inside the block make, and their largest sum at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before:
                self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._counted:
            return
        size = storage.nbytes()
        self._counted.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        self._counted.discard(key)


class FLOPs(TorchDispatchMode):
    """Counts the FLOPs of the matrix products, convolutions and attentions inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        self.total += flops_of(function, args, kwargs or {}, output)
        return output


def flops_of(function: Any, args: Any, kwargs: Any, output: Any) -> int:
    """FLOPs of one call of an ATen operation, 0 for what is no matrix product."""
    name = function._schema.name
    if "flash_attention_for_cpu" in name:  # without a formula in PyTorch's registry
        products, (q, k) = (5, args[1:3]) if "backward" in name else (2, args[:2])
        batch, heads, rows, width = q.shape
        return products * 2 * batch * heads * rows * k.shape[2] * width
    formula = flop_registry.get(function._overloadpacket)
    return formula(*args, **kwargs, out_val=output) if formula else 0


@contextlib.contextmanager
def saved_bytes(excluded: Iterable[Tensor] = ()) -> Iterator[dict[str, int]]:
    """Counts the bytes of the distinct storages that autograd saves inside the block, as `["bytes"]`.

    Args:
        excluded: tensors that exist anyway, such as parameters.
    """
    storages: dict[int, int] = {}
    known = {tensor.untyped_storage()._cdata for tensor in excluded}
    count = {"bytes": 0}
    kept = []  # a freed storage's address could come back as another's

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known and storage._cdata not in storages:
            storages[storage._cdata] = storage.nbytes()
            kept.append(storage)
            count["bytes"] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count
