"""Advantages against NumPy and a slow simulation of the tracker."""

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rftcore.algorithms.advantages import PromptStatistics, standardised


def test_standardised_by_hand():
    """r = (1, 2, 3, 6): mean 3, population variance (4 + 1 + 0 + 9) / 4 = 3.5 (the sample's would be 14 / 3)."""
    A = standardised(torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64))
    expected = np.array([-2, -1, 0, 3]) / (3.5**0.5 + 1e-8)
    np.testing.assert_allclose(A.numpy(), expected, rtol=1e-15)
    assert A.dtype == torch.float64


def test_standardised_is_computed_in_fp64():
    """1e4 + (0, 1, 2, 3) / 1024 is exact in fp32, its mean's square is not."""
    r = 1e4 + torch.arange(4) / 1024
    assert r.dtype == torch.float32
    assert torch.equal(standardised(r), standardised(r.double()).float())


@pytest.mark.parametrize("r", [[5.0], [0.1] * 10])
def test_equal_rewards_have_no_advantage(r):
    assert standardised(torch.tensor(r)).tolist() == [0.0] * len(r)
    assert PromptStatistics(8, 1).advantages(["p"] * len(r), torch.tensor(r)).tolist() == [0.0] * len(r)


def test_no_gradient_passes():
    r = torch.ones(3, requires_grad=True)
    assert not standardised(r).requires_grad
    assert not PromptStatistics().advantages(["a"] * 3, r).requires_grad


class Simulated:
    """The tracker, slowly: every reward of every prompt is kept, and the last `buffer_size` are looked at."""

    def __init__(self, buffer_size, min_count):
        self.buffer_size, self.min_count, self.history = buffer_size, min_count, []

    def advantages(self, prompts, r):
        self.history += list(zip(prompts, r, strict=True))
        result = []
        for prompt, reward in zip(prompts, r, strict=True):
            seen = [value for name, value in self.history if name == prompt][-self.buffer_size :]
            seen = r if len(seen) < self.min_count else seen
            result.append((reward - np.mean(seen)) / (np.std(seen) + 1e-6))
        return result


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from("abc"), st.floats(-5, 5, allow_subnormal=False)), min_size=1, max_size=9),
        max_size=8,
    ),
    st.integers(1, 6),
    st.integers(0, 4),
    st.integers(0, 7),
)
def test_statistics_equal_the_simulation_across_a_round_trip(batches, min_count, larger, resumed_at):
    statistics, simulated = PromptStatistics(min_count + larger, min_count), Simulated(min_count + larger, min_count)
    for step, batch in enumerate(batches):
        if step == resumed_at:
            state = json.loads(json.dumps(statistics.state_dict()))
            statistics = PromptStatistics(min_count + larger, min_count)
            statistics.load_state_dict(state)
        prompts, r = [prompt for prompt, _ in batch], [reward for _, reward in batch]
        A = statistics.advantages(prompts, torch.tensor(r, dtype=torch.float64))
        # A flat batch's std is rounding alone, and the 1e-6 added to it makes 1e-9 of 1e-15.
        np.testing.assert_allclose(A.numpy(), simulated.advantages(prompts, r), rtol=1e-8, atol=1e-8)


def test_a_round_trip_is_exact():
    """Through JSON and through torch.load(weights_only=True): the next batch's advantages are equal bit for bit."""
    generator = torch.Generator().manual_seed(0)
    prompts = [f"p{i % 3}" for i in range(24)]
    original = PromptStatistics(10, 4)
    for _ in range(3):
        original.advantages(prompts, torch.randn(24, generator=generator))
    file = io.BytesIO()
    torch.save(original.state_dict(), file)
    file.seek(0)
    states = [json.loads(json.dumps(original.state_dict())), torch.load(file, weights_only=True)]
    r = torch.randn(24, generator=generator, dtype=torch.float64)
    expected = original.advantages(prompts, r)
    for state in states:
        copy = PromptStatistics(10, 4)
        copy.load_state_dict(state)
        assert torch.equal(copy.advantages(prompts, r), expected)
        assert copy.state_dict() == original.state_dict()


def test_a_state_is_a_copy():
    statistics = PromptStatistics(4, 1)
    state = statistics.state_dict()
    statistics.advantages(["a"], torch.ones(1))
    assert state["rewards"] == {}
    assert statistics.state_dict()["rewards"] == {"a": [1.0]}


def test_what_is_wrong_is_named_and_nothing_is_remembered():
    statistics = PromptStatistics(4, 2)
    with pytest.raises(ValueError, match="2 of 3 rewards are not finite: nan at 0 .'a cat'.*inf at 2"):
        statistics.advantages(["a cat", "b", "c"], torch.tensor([float("nan"), 1, float("inf")]))
    with pytest.raises(ValueError, match="prompts must be 2 strings.*not one string"):
        statistics.advantages("ab", torch.ones(2))
    with pytest.raises(ValueError, match="prompts must be 2 strings.*not 1"):
        statistics.advantages(["a"], torch.ones(2))
    assert statistics.state_dict()["rewards"] == {}
    with pytest.raises(ValueError, match=r"min_count=5 must lie in \[1, buffer_size=4\]"):
        PromptStatistics(4, 5)
    with pytest.raises(ValueError, match="made with.*'buffer_size': 4"):
        PromptStatistics(8, 2).load_state_dict(statistics.state_dict())
    with pytest.raises(ValueError, match="rewards are not finite"):
        standardised(torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize("shape", [(), (0,), (2, 1)])
def test_wrong_shape(shape):
    with pytest.raises(ValueError, match="shape"):
        standardised(torch.ones(shape))


def test_whole_numbers_are_refused():
    """Advantages of their dtype would be rounded."""
    for advantages in (standardised, lambda r: PromptStatistics().advantages(["a", "b"], r)):
        with pytest.raises(ValueError, match="floating, not torch.int64"):
            advantages(torch.tensor([1, 2]))
