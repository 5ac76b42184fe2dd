"""What the records of sampling have in common: how they are indexed, moved, stored and told apart."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def row_index(index: int | slice | Sequence[int] | Tensor, count: int, what: str) -> slice | Tensor:
    """What indexes the first of a record's dimensions: a slice, or row numbers on the CPU; an int keeps the dimension.

    Raises:
        IndexError: for an int out of range, naming `what` the record is of.
    """
    if isinstance(index, slice):
        return index
    if hasattr(index, "__index__") and (not isinstance(index, Tensor) or index.ndim == 0):
        index = operator.index(index)
        if not -count <= index < count:
            raise IndexError(f"index {index} is out of range for {what}.")
        index = [index]
    index = torch.as_tensor(index if isinstance(index, Tensor) else list(index)).cpu()
    if index.dtype != torch.bool:
        return index.long()
    if index.shape != (count,):
        raise IndexError(f"a mask of shape {tuple(index.shape)} does not index {what}; it must be ({count},).")
    return index.nonzero().squeeze(1)


def whole_numbers(values: Sequence[int] | Tensor, name: str, shapes: str, dimensions: Sequence[int]) -> Tensor:
    """(...) int64 on the CPU. Raises: ValueError for other values, or another number of dimensions."""
    numbers = torch.as_tensor(values).cpu()
    if not numbers.numel():
        raise ValueError(f"{name} is empty; name at least one.")
    if numbers.is_floating_point() or numbers.dtype == torch.bool or numbers.ndim not in dimensions:
        raise ValueError(f"{name} must be whole numbers {shapes}, got {numbers.dtype} {tuple(numbers.shape)}.")
    return numbers.long()


def sent(index: Tensor, device: torch.device) -> Tensor:
    """An index on the CPU, on the device; without waiting for what the device does."""
    return index.to(device, non_blocking=True)


def destination(what: str, *args: Any, **kwargs: Any) -> tuple[torch.device | None, bool]:
    """Device and non_blocking of `Tensor.to(*args, **kwargs)`. Raises: ValueError when asked for another dtype."""
    # The parser is Tensor.to's own, and the only one that knows all of its forms.
    parsed: Sequence[Any] = torch._C._nn._parse_to(*args, **kwargs)
    device, dtype, non_blocking, _ = parsed
    if dtype is not None:
        raise ValueError(
            f"dtype={dtype}: {what} keeps its dtypes, because log-probabilities re-scored from rounded "
            "states are wrong (2.7e-3 in bf16, 27 times DDPO's clip range). Give a device only."
        )
    return device, non_blocking


def stored(tensor: Tensor) -> Tensor:
    """A copy without a graph; a view would be stored with all it is a part of."""
    return tensor.detach().clone()


def check_stored(
    kind: str, tensors: Mapping[str, Any], sizes: Mapping[str, Sequence[int]], branches: Sequence[Any], settings: Any
) -> None:
    """Raises ValueError unless these are the parts of a stored record of a kind.

    Args:
        sizes: the first sizes of each tensor, -1 for any.
        branches: the tensors of both branches of guidance by name, None for one that there is not; they have as many
            rows as `sizes` says of the first tensor.
    """

    def refuse(what: str) -> ValueError:
        return ValueError(f"state is not a {kind}.state_dict(): {what}.")

    for name, wanted in sizes.items():
        if not _has_sizes(tensors[name], wanted):
            raise refuse(f"{name} is {_described(tensors[name])}, not a tensor of {tuple(wanted)} and more")
    (rows, *_), *_ = sizes.values()
    for branch in branches:
        if branch is not None and not isinstance(branch, dict):
            raise refuse(f"the conditioning is a {type(branch).__name__}, not tensors by name")
        for name, value in (branch or {}).items():
            if not _has_sizes(value, (rows,)):
                raise refuse(f"{name!r} of the conditioning is {_described(value)}, not a tensor of {rows} rows")
    if branches[0] is None or (branches[1] is not None and branches[1].keys() != branches[0].keys()):
        raise refuse("its two branches of guidance have other tensors")
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings) or not _is_plain(settings):
        raise refuse("settings are no plain values by name")


def _is_plain(value: Any, depth: int = 8) -> bool:
    """Numbers, texts, and lists of them no deeper than settings are. NaN is none: it would differ from itself."""
    if isinstance(value, (list, tuple, dict)):
        inner = value.values() if isinstance(value, dict) else value
        return depth > 0 and all(_is_plain(one, depth - 1) for one in inner)
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and not math.isnan(value))


def _has_sizes(value: Any, sizes: Sequence[int]) -> bool:
    plain = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
    return (
        plain
        and value.ndim >= len(sizes)
        and all(size in (-1, found) for size, found in zip(sizes, value.shape, strict=False))
    )


def _described(value: Any) -> str:
    return f"{value.layout} {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def difference(mine: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Where two settings differ, in words; empty where they do not."""
    names = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    return ", ".join(f"{name} {mine.get(name)!r} and {theirs.get(name)!r}" for name in names)


def check_same_settings(what: str, settings: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError, naming the differences, unless all are the same."""
    for other in settings[1:]:
        if found := difference(settings[0], other):
            raise ValueError(f"{what} of different settings do not join: {found}.")


def check_made_with(what: str, made_with: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises ValueError, naming the differences, unless a sampler with `settings` made it."""
    if found := difference({name: made_with.get(name) for name in settings}, settings):
        raise ValueError(
            f"{what} made with other settings than this sampler's: {found}; "
            "re-score with the sampler that made them, or one with the same settings."
        )
