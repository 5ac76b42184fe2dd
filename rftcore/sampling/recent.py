"""A dictionary that keeps what was used last."""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """Values by key, of which at most `size` are kept: the one that was used longest ago goes first."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: collections.OrderedDict[Hashable, T] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def __setitem__(self, key: Hashable, value: T) -> None:
        self._values[key] = value
        self._values.move_to_end(key)
        if len(self._values) > self._size:
            self._values.popitem(last=False)

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The key's value, made and kept where there is none."""
        if key not in self._values:
            self[key] = make()
        self._values.move_to_end(key)
        return self._values[key]

    def emptied(self) -> Recent[T]:
        """One of the same size with nothing in it."""
        return Recent(self._size)
