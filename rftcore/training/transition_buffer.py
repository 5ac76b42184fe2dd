"""The latest transitions of many chains, in columns on the CPU: what DPOK trains from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class TransitionBuffer:
    """Rows of named columns; when full, the oldest give way. Row 0 is the oldest.

    It draws nothing itself: the caller gives indices. Tensors are copied in and out, without gradient.

    Args:
        capacity: rows kept (DPOK's released code: 1000).
    Raises: ValueError for a capacity below 1.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"capacity={capacity} must be at least 1; DPOK's released code keeps 1000 transitions")
        self.capacity = capacity
        self.clear()

    def __len__(self) -> int:
        """Rows held."""
        return self._rows

    def clear(self) -> None:
        """Drops all rows, and what the columns are."""
        self._columns: dict[str, Tensor] = {}
        self._rows = self._oldest = 0

    def add(self, columns: Mapping[str, Tensor]) -> None:
        """Appends M rows.

        Shapes: (M, ...) each, of any device; the names, dtypes and shapes of a row stay those of the first `add`.
        Raises: ValueError where they do not, or the columns differ in rows; nothing is added.
        """
        self._check(columns)
        if not self._columns:
            # Memory that is not written yet is not used yet: rows cost when they come.
            self._columns = {
                name: torch.empty(self.capacity, *values.shape[1:], dtype=values.dtype)
                for name, values in columns.items()
            }
        M = min(len(next(iter(columns.values()))), self.capacity)
        places = (self._oldest + self._rows + torch.arange(M)) % self.capacity
        for name, values in columns.items():
            self._columns[name][places] = values.detach()[len(values) - M :].cpu()
        overwritten = max(0, self._rows + M - self.capacity)
        self._oldest = (self._oldest + overwritten) % self.capacity
        self._rows += M - overwritten

    def take(self, indices: Tensor | Sequence[int]) -> dict[str, Tensor]:
        """Rows by age, (K, ...) a column, as often as they are named.

        Shapes: indices (K,) in [0, len). Raises: IndexError for one outside.
        """
        rows = torch.as_tensor(indices, dtype=torch.int64).cpu()
        if rows.ndim != 1 or (len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self._rows):
            raise IndexError(f"indices must have shape (K,) and lie in [0, {self._rows}), the rows held, not {indices}")
        places = (self._oldest + rows) % self.capacity
        return {name: column[places] for name, column in self._columns.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The columns, (len, ...) each, the oldest row first."""
        return self.take(torch.arange(self._rows))

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replaces what is held. Raises: ValueError for more rows than the capacity, or columns that differ in rows."""
        rows = max((len(values) for values in state.values()), default=0)
        if rows > self.capacity:
            raise ValueError(f"the state has {rows} rows, more than capacity={self.capacity}; use the capacity it had")
        self.clear()
        if state:
            self.add(state)

    def _check(self, columns: Mapping[str, Tensor]) -> None:
        shapes = {name: tuple(values.shape) for name, values in columns.items()}
        if not columns or () in shapes.values() or len({shape[0] for shape in shapes.values()}) > 1:
            raise ValueError(f"columns must be tensors (M, ...) of as many rows each, not {shapes}")
        if self._columns:
            held, given = (
                {name: (tuple(values.shape[1:]), values.dtype) for name, values in table.items()}
                for table in (self._columns, columns)
            )
            if held != given:
                raise ValueError(f"a row's columns must stay {held}, not {given}; clear() the buffer to change them")
