"""The transition buffer against a Python list, resumed in between."""

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rftcore.training.transition_buffer import TransitionBuffer


def rows(start, count):
    """`count` rows that can be told apart, of three columns, dtypes and shapes."""
    number = torch.arange(start, start + count)
    return {"x_t": number[:, None, None] * torch.ones(2, 3), "step": number, "log_prob": number.double() / 3}


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(0, 12), max_size=8), st.integers(0, 8))
def test_keeps_the_latest_rows_oldest_first(capacity, sizes, resumed_at):
    """As a list of which the end is kept, whatever the sizes added; saved and loaded once on the way."""
    buffer, kept, start = TransitionBuffer(capacity), [], 0
    for turn, size in enumerate(sizes):
        if turn == resumed_at:
            file = io.BytesIO()
            torch.save(buffer.state_dict(), file)
            file.seek(0)
            buffer = TransitionBuffer(capacity)
            buffer.load_state_dict(torch.load(file, weights_only=True))
        buffer.add(rows(start, size))
        kept = [*kept, *range(start, start + size)][-capacity:]
        start += size
        assert len(buffer) == len(kept)
        taken = buffer.take(torch.arange(len(kept)))
        assert taken["step"].tolist() == kept
        assert taken["x_t"][:, 1, 2].tolist() == kept
        assert taken["log_prob"].dtype == torch.float64
        assert taken["log_prob"].tolist() == [number / 3 for number in kept]


def test_take_in_any_order_and_again():
    buffer = TransitionBuffer(4)
    buffer.add(rows(0, 6))
    assert buffer.take([3, 0, 3])["step"].tolist() == [5, 2, 5]
    assert buffer.take([])["x_t"].shape == (0, 2, 3)


def test_what_goes_in_and_out_is_copied():
    buffer, given_rows = TransitionBuffer(4), rows(0, 2)
    buffer.add(given_rows)
    given_rows["x_t"].fill_(7)
    state = buffer.state_dict()
    buffer.take([0, 1])["x_t"].fill_(8)
    buffer.add(rows(10, 4))
    assert state["x_t"][:, 0, 0].tolist() == [0, 1]
    assert buffer.take([0])["x_t"][0, 0, 0] == 10


def test_gradients_stay_outside():
    buffer = TransitionBuffer(2)
    buffer.add({"x": torch.ones(2, requires_grad=True) * 2})
    assert not buffer.take([0])["x"].requires_grad


def test_clear_forgets_the_columns_too():
    buffer = TransitionBuffer(3)
    buffer.add(rows(0, 2))
    buffer.clear()
    assert len(buffer) == 0 and buffer.state_dict() == {}
    buffer.add({"other": torch.ones(1)})
    assert list(buffer.state_dict()) == ["other"]


def test_an_empty_state_round_trips():
    buffer = TransitionBuffer(3)
    buffer.load_state_dict(TransitionBuffer(3).state_dict())
    assert len(buffer) == 0


def test_what_is_wrong_is_named_and_nothing_is_added():
    buffer = TransitionBuffer(3)
    buffer.add(rows(0, 2))
    for wrong, message in [
        ({**rows(0, 2), "step": torch.zeros(1, dtype=torch.long)}, "as many rows"),
        ({}, "as many rows"),
        ({"step": torch.tensor(1)}, "as many rows"),
        ({"step": torch.zeros(1, dtype=torch.long)}, "columns must stay"),
        ({**rows(0, 1), "log_prob": torch.zeros(1)}, "columns must stay.*float64.*float32"),
        ({**rows(0, 1), "x_t": torch.zeros(1, 2, 4)}, "columns must stay"),
    ]:
        with pytest.raises(ValueError, match=message):
            buffer.add(wrong)
    assert len(buffer) == 2
    for indices in ([2], [-1]):
        with pytest.raises(IndexError, match=r"lie in \[0, 2\)"):
            buffer.take(indices)
    with pytest.raises(ValueError, match="2 rows, more than capacity=1"):
        TransitionBuffer(1).load_state_dict(buffer.state_dict())
    with pytest.raises(ValueError, match="capacity=0 must be at least 1"):
        TransitionBuffer(0)
