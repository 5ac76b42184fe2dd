"""What mutants are made of: which places of a source are changed, and which are left alone."""

import pytest

pytest.importorskip("cosmic_ray", reason="cosmic-ray is not installed; `make mutants` installs it")

from benchmarks.mutations import sites

SOURCE = '''
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    N = 1 + 1


def f(x: int | None = 3) -> list | None:
    """A text of 1 + 1."""
    if x > 2:
        raise ValueError(f"{x + 1} is over 2")
    warnings.warn(f"{x + 1}")
    y: float | None = x.detach().to(7)
    g(
        y,
    )
    return -y * 1.5


class C:
    def __repr__(self):
        return "C" * 2
'''


def changes():
    """Line -> every change of it that compiles."""
    found = {}
    for variants in sites("f.py", SOURCE):
        for mutation in variants:
            if mutation.compiles(SOURCE):
                found.setdefault(mutation.line, []).append((mutation, *mutation.change(SOURCE)))
    return found


def test_annotations_messages_and_texts_are_left_alone():
    assert sorted(changes()) == [4, 8, 10, 11, 12, 13, 14, 17]
    after = {line: [new for *_, new in found] for line, found in changes().items()}
    assert after[8] == ["def f(x: int | None = 4) -> list | None:", "def f(x: int | None = 2) -> list | None:"]
    assert after[11] == after[12] == ["pass"]


def test_every_change_is_one_of_its_line():
    after = [new for found in changes().values() for *_, new in found]
    for expected in (
        "if x >= 2:", "if not x > 2:", "y: float | None = x.to(7)", "y: float | None = x.detach()", "return +y * 1.5",
        "return -y / 1.5",
    ):  # fmt: skip
        assert expected in after
    assert len(after) == len(set(after)) + 2  # three statements become "pass" alone


def test_statements_and_bodies_are_known_by_their_lines():
    found = changes()
    (default, *_), *_ = found[8]
    assert default.body == (8, 18) and found[10][0][0].body is None
    (dropped, before, new), *_ = found[14]
    assert (dropped.first, dropped.last) == (14, 16) and (before, new) == ("g( y, )", "pass")
    assert [(m.first, m.last) for m, *_ in found[10]] == [(10, 10)] * len(found[10])
