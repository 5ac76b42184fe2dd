"""What was used last is kept."""

import pytest

from rftcore.sampling.recent import Recent


def test_what_was_used_longest_ago_goes_first():
    recent = Recent(2)
    recent["a"], recent["b"] = 1, 2
    assert recent.get("a", lambda: pytest.fail("it is there")) == 1
    recent["c"] = 3
    assert "a" in recent and "b" not in recent and "c" in recent and len(recent) == 2
    recent["a"] = 4
    assert recent.get("d", lambda: 5) == 5
    assert recent.get("a", lambda: pytest.fail("it was used")) == 4 and "c" not in recent and len(recent) == 2


def test_a_value_is_made_once():
    recent, made = Recent(1), []
    for _ in range(3):
        assert recent.get("x", lambda: made.append(1)) is None
    assert made == [1]


def test_emptied_has_the_same_size():
    recent = Recent(2)
    recent["a"] = 1
    empty = recent.emptied()
    assert len(empty) == 0 and len(recent) == 1
    for key in "abc":
        empty[key] = key
    assert len(empty) == 2
