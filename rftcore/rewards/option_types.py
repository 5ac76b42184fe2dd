"""Whether an option's value is of the type that a reward says it takes."""

from __future__ import annotations

import collections.abc
import inspect
import types as builtin_types
import typing
from collections.abc import Callable
from typing import Any

_LISTS = (collections.abc.Sequence, list, tuple)
# What a config's writer calls them.
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def types(made: Callable) -> dict[str, Any]:
    """The types of the arguments that a class is made with, or a function is called with; none where it tells none."""
    try:
        return typing.get_type_hints(made.__init__ if inspect.isclass(made) else made)
    # Of a user's own, names that exist for a type checker alone, and what has no annotations.
    except (NameError, TypeError, AttributeError):
        return {}


def fits(value: Any, type_: Any) -> bool:
    """Whether a value as YAML gives it is of the type; true of a type that is none of YAML's."""
    origin = typing.get_origin(type_)
    if origin in (typing.Union, builtin_types.UnionType):
        return any(fits(value, each) for each in typing.get_args(type_))
    if origin is typing.Literal:
        return value in typing.get_args(type_)
    if type_ in _LISTS or origin in _LISTS:
        return isinstance(value, (list, tuple)) and all(
            fits(item, each) for item in value for each in typing.get_args(type_)[:1]
        )
    if type_ is dict or origin is dict:
        keys, values = typing.get_args(type_) or (Any, Any)
        return isinstance(value, dict) and all(fits(key, keys) and fits(item, values) for key, item in value.items())
    if type_ in (int, float):
        # True is an int to Python, and 1 is a float to everyone.
        return not isinstance(value, bool) and isinstance(value, int if type_ is int else (int, float))
    return not (isinstance(type_, type) and type_ in _WORDS) or isinstance(value, type_)


def expected(type_: Any) -> str:
    """The type in words: "a whole number or null"."""
    if typing.get_origin(type_) in (typing.Union, builtin_types.UnionType):
        return " or ".join(expected(each) for each in typing.get_args(type_))
    if typing.get_origin(type_) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(type_)))
    if type_ in _LISTS or typing.get_origin(type_) in _LISTS:
        return " of ".join(["a list", *map(expected, typing.get_args(type_)[:1])])
    if type_ is dict or typing.get_origin(type_) is dict:
        return "a mapping"
    return _WORDS.get(type_, getattr(type_, "__name__", str(type_)))
