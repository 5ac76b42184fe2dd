"""Best of n against all subsets, one by one."""

from fractions import Fraction
from itertools import combinations, permutations
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rftcore.algorithms.best_of_n import best, expected_at_best, expected_best


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-9, 9)), min_size=1, max_size=8), st.data())
def test_equals_every_subset_enumerated(samples, data):
    """The mean over all subsets of n of the best's score, and of the others' mean over those that tie for best."""
    n = data.draw(st.integers(1, len(samples)))
    tops, held_out = [], []
    for subset in combinations(samples, n):
        top = max(score for score, _ in subset)
        tied = [other for score, other in subset if score == top]
        tops.append(top)
        held_out.append(Fraction(sum(tied), len(tied)))
    scores, others = (torch.tensor(column, dtype=torch.float32) for column in zip(*samples, strict=True))
    assert expected_best(scores, n).item() == pytest.approx(sum(tops) / len(tops), rel=1e-13, abs=1e-13)
    expected = float(sum(held_out) / len(held_out))
    assert expected_at_best(scores, others, n).item() == pytest.approx(expected, rel=1e-13, abs=1e-13)


def test_equals_what_best_chooses_over_all_orders():
    """`best` breaks ties by order; over all orders of the draws that is the estimator's fair share."""
    samples, n = [(1.0, 5.0), (2.0, 1.0), (2.0, 7.0), (0.0, 3.0)], 3
    draws = torch.tensor(list(permutations(samples, n)))  # (24, 3, 2)
    chosen = draws[torch.arange(len(draws)), best(draws[:, :, 0])]
    scores, others = torch.tensor(samples).T
    assert expected_best(scores, n).item() == pytest.approx(chosen[:, 0].mean().item(), rel=1e-6)
    assert expected_at_best(scores, others, n).item() == pytest.approx(chosen[:, 1].mean().item(), rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 50, 1000, 1999, 2000])
def test_exact_for_many_samples(n):
    """N = 2000, whose C(N, n) overflow fp64: against whole-number arithmetic."""
    N = 2000
    total = sum(comb(i - 1, n - 1) * i * i for i in range(n, N + 1))
    expected = float(Fraction(total, comb(N, n)))
    scores = torch.arange(1, N + 1, dtype=torch.float64).square()[torch.randperm(N)]
    assert expected_best(scores, n).item() == pytest.approx(expected, rel=1e-12)


def test_ends():
    """n = 1 is the mean, n = N the maximum."""
    scores = torch.tensor([3.0, -1.0, 4.0, 1.5])
    assert expected_best(scores, 1).item() == pytest.approx(1.875, rel=1e-14)
    assert expected_best(scores, 4).item() == 4.0


def test_best_takes_the_first_of_equals():
    scores = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [-1.0, float("-inf"), 0.0]])
    assert best(scores).tolist() == [1, 0, 2]
    assert best(torch.ones(3, 200)).tolist() == [0] * 3


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match=r"shape \(P, n\)"):
        best(torch.ones(3))
    with pytest.raises(ValueError, match="NaN"):
        best(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="NaN"):
        expected_best(torch.tensor([1.0, float("nan")]), 1)
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"n={n} must lie in"):
            expected_best(torch.ones(3), n)
    for others in (2, 4):
        with pytest.raises(ValueError, match="one shape"):
            expected_at_best(torch.ones(3), torch.ones(others), 1)
