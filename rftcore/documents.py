"""JSON and YAML that somebody else wrote: values of a depth and size that all later code can walk, or a ValueError."""

from __future__ import annotations

import json
import math
from typing import Any

import yaml

# Far beyond every file that is read, and far below what Python's own recursion bears.
_DEPTH = 100
# That YAML's aliases can stand for.
_VALUES = 100_000
# What neither torch nor a float takes.
_LARGEST = 2**64


def from_json(text: str | bytes) -> Any:
    """What a JSON text holds.

    Raises: ValueError (json.JSONDecodeError where it is none), also for nesting too deep and numbers beyond 64 bits.
    """
    try:
        return _checked(json.loads(text), math.inf)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error


def from_yaml(text: str) -> Any:
    """What a YAML text holds, of plain kinds alone.

    Raises: ValueError for what is none, for nesting too deep, numbers beyond 64 bits, and aliases that stand for
        themselves or for more than 100,000 values.
    """
    try:
        _check_depth(text)
        return _checked(yaml.safe_load(text), _VALUES)
    except ValueError:
        raise
    # Tagged with a kind that they are none of, values raise what making that kind of them raises.
    except (yaml.YAMLError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


_TOO_DEEP = f"it is nested more than {_DEPTH} deep"


def _check_depth(text: str) -> None:
    """Before PyYAML comes to the end of it: its time grows with the square of the depth."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEPTH:
            raise ValueError(_TOO_DEEP)


def _checked(document: Any, most: float) -> Any:
    waiting, count = [(document, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > _DEPTH:
            raise ValueError(_TOO_DEEP)
        if count > most:
            raise ValueError(f"it holds more than {most} values")
        if isinstance(value, int) and abs(value) >= _LARGEST:
            raise ValueError("one of its numbers is beyond 64 bits")
        if isinstance(value, dict):
            waiting += [(inner, depth + 1) for pair in value.items() for inner in pair]
        elif isinstance(value, (list, tuple, set)):
            waiting += [(inner, depth + 1) for inner in value]
    return document
