"""Which of YAML's values an option takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

from rftcore.rewards.option_types import expected, fits, types

if TYPE_CHECKING:
    from nowhere import Thing


@pytest.mark.parametrize(
    ("type_", "good", "bad", "words"),
    [
        (bool, [True], ["no", 1, None], "true or false"),
        (int, [3], ["3", 3.0, True], "a whole number"),
        (float, [3, 0.5], ["0.5", False], "a number"),
        (str | None, ["a", None], [1, ["a"]], "text or null"),
        (str | Sequence[str], ["a", ["a", "b"], ()], [5, {"a": 1}, ["a", 1]], "text or a list of text"),
        (list, [[1, "a"]], ["a"], "a list"),
        (Literal["a", 2], ["a", 2], ["b"], "'a' or 2"),
        (Any, [1, None], [], None),
        (str | Path, ["a", 1], [], None),
    ],
)
def test_values(type_, good, bad, words):
    assert all(fits(value, type_) for value in good) and not any(fits(value, type_) for value in bad)
    assert words is None or expected(type_) == words


def test_where_types_are_read():
    class Made:
        def __init__(self, level: float) -> None: ...

    def unknown(images, *, thing: Thing): ...

    assert types(Made)["level"] is float
    assert types(unknown) == {} and types(len) == {}
