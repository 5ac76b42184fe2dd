"""What was measured to be fastest, per GPU architecture, op, shape and dtype.

The tables lie in `tables/`, a file per architecture, and are written by `python -m benchmarks.tune`. Nothing is timed in
a user's process.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rftcore import documents

_TABLES = Path(__file__).parent / "tables"

# Tile sizes by the name of the kernel, in place of a table's, while they are tried.
_TRIED: dict[str, dict[str, Any]] = {}
# The names of kernels that were asked for, while somebody listens.
_ASKED: list[set[str]] = []


class Winner(NamedTuple):
    """The fastest candidate for one input.

    Attributes:
        backend: its name.
        config: the tile sizes it won with, by the name of the kernel; without an entry, the kernel's heuristic.
    """

    backend: str
    config: dict[str, dict[str, Any]] = {}  # noqa: RUF012  # of a NamedTuple, and never written to


def bucket(count: int) -> int:
    """The next power of two: a table's rows stand for all inputs with up to so many rows, images or tokens."""
    return 1 << max(count - 1, 0).bit_length()


def winner(op: str, key: str, device: torch.device) -> Winner | None:
    """What was fastest for inputs of this key on this device; None where nothing was measured."""
    return None if device.type != "cuda" else table(architecture(device)).get(op, {}).get(key)


@functools.cache
def architecture(device: torch.device) -> str:
    """Such as "sm_90"; "unknown" where there is no such GPU (fake tensors on a machine without one)."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return "unknown"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@functools.cache
def table(architecture: str) -> dict[str, dict[str, Winner]]:
    """op -> key -> winner, as committed for this architecture; empty where nothing was."""
    path = _TABLES / f"{architecture}.json"
    return read(path) if path.exists() else {}


def read(path: Path) -> dict[str, dict[str, Winner]]:
    """The winners of a table's file. Raises: ValueError where it is no such file."""
    try:
        winners = documents.from_json(path.read_text(encoding="utf-8"))["winners"]
        return {op: {key: _entry(entry) for key, entry in rows.items()} for op, rows in winners.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no table of winners ({error!r}); install rftcore again, or tune anew") from error


def _entry(entry: dict[str, Any]) -> Winner:
    backend, config = entry["backend"], entry.get("config", {})
    if (
        not isinstance(backend, str)
        or not isinstance(config, dict)
        or not all(isinstance(sizes, dict) for sizes in config.values())
    ):
        raise TypeError(f"{entry!r:.200} names no backend and tile sizes")
    return Winner(backend, config)


def tile_sizes(kernel: str, won: Winner | None) -> dict[str, Any] | None:
    """The fields of the kernel's Config: those being tried, or those it won with; None: its heuristic's."""
    for names in _ASKED:
        names.add(kernel)
    return _TRIED.get(kernel) or (None if won is None else won.config.get(kernel))


@contextlib.contextmanager
def trying(kernel: str, sizes: dict[str, Any]) -> Iterator[None]:
    """Within it the kernel runs with these tile sizes."""
    _TRIED[kernel] = sizes
    try:
        yield
    finally:
        del _TRIED[kernel]


@contextlib.contextmanager
def asked() -> Iterator[set[str]]:
    """The names of the kernels whose tile sizes are asked for within it."""
    names: set[str] = set()
    _ASKED.append(names)
    try:
        yield names
    finally:
        _ASKED.remove(names)
