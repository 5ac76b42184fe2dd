"""RWR's weights and loss against NumPy loops."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rftcore.algorithms.rwr import dense_weights, per_prompt, sparse_weights, weighted_mse


def tensor(values, gradient=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=gradient)


def test_dense_weights_by_hand():
    """temperature ln 2, r = (0, 1, 2): 3 (1, 2, 4) / 7: the temperature multiplies."""
    weights = dense_weights(tensor([0.0, 1.0, 2.0]), math.log(2))
    assert weights.tolist() == pytest.approx([3 / 7, 6 / 7, 12 / 7], rel=1e-14)


def test_published_temperature():
    r = [20.0, 25.0, 10.0, -3.0]
    expected = np.exp(0.2 * np.array(r)) / np.exp(0.2 * np.array(r)).sum() * 4
    np.testing.assert_allclose(dense_weights(tensor(r)).numpy(), expected, rtol=1e-13)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.floats(0.01, 1))
def test_sparse_weights_keep_the_best(scores, top):
    """Whoever has fewer than floor(top N) (at least one) samples above itself is kept, ties with it."""
    kept = max(1, math.floor(top * len(scores) + 1e-9))
    expected = [float(sum(other > score for other in scores) < kept) for score in scores]
    assert sparse_weights(tensor(scores), top).tolist() == expected


@pytest.mark.parametrize(("N", "top", "kept"), [(1, 0.1, 1), (9, 0.1, 1), (19, 0.1, 1), (20, 0.1, 2), (100, 0.29, 29)])
def test_sparse_weights_count(N, top, kept):
    assert sparse_weights(torch.arange(float(N)), top).sum() == kept


def test_per_prompt_by_hand():
    """Each prompt's own softmax, times its own count, in the samples' order."""
    prompts, r = ["a", "b", "a", "b", "b"], tensor([0.0, 0.0, 1.0, 1.0, 2.0])
    w = per_prompt(partial(dense_weights, temperature=math.log(2)), prompts, r)
    assert w.tolist() == pytest.approx([2 / 3, 3 / 7, 4 / 3, 6 / 7, 12 / 7], rel=1e-14)
    assert per_prompt(sparse_weights, prompts, r).tolist() == [0, 0, 1, 0, 1]


def test_weighted_mse_by_a_loop():
    """Value and gradient: dL/deps = 2 w_b (eps - noise) / (B C h w)."""
    generator = torch.Generator().manual_seed(0)
    eps, noise = (torch.randn(3, 2, 2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    w = tensor([0.5, 0.0, 2.5], gradient=True)
    eps.requires_grad_()
    loss = weighted_mse(eps, noise, w)
    loss.backward()
    expected = 0.0
    for b in range(3):
        errors = [(e - n) ** 2 for e, n in zip(eps[b].flatten().tolist(), noise[b].flatten().tolist(), strict=True)]
        expected += w[b].item() * sum(errors) / len(errors) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-13)
    gradient = 2 * w.detach().reshape(3, 1, 1, 1) * (eps - noise).detach() / (3 * 16)
    assert torch.allclose(eps.grad, gradient, rtol=1e-13, atol=0)
    assert w.grad is None


def test_weights_of_one_are_the_plain_mse():
    eps, noise = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 4, 3, 3)
    plain = torch.nn.functional.mse_loss(eps, noise)
    assert torch.allclose(weighted_mse(eps, noise, torch.ones(2)), plain, rtol=1e-6)


def test_what_is_wrong_is_named():
    eps = torch.ones(2, 1, 1, 1, requires_grad=True)
    with pytest.raises(ValueError, match=r"w \(1,\)"):
        weighted_mse(eps, eps.detach(), torch.ones(1))
    with pytest.raises(ValueError, match=r"one shape.*noise \(1, 1, 1\)"):
        weighted_mse(eps, torch.ones(1, 1, 1), torch.ones(2))
    with pytest.raises(ValueError, match="eps carries no gradient"):
        weighted_mse(eps.detach(), eps.detach(), torch.ones(2))
    with pytest.raises(ValueError, match="top=0 must lie in"):
        sparse_weights(torch.ones(3), top=0)
    with pytest.raises(ValueError, match="prompts must be 3 strings"):
        per_prompt(dense_weights, ["a"], torch.ones(3))
    for weights in (dense_weights, sparse_weights):
        with pytest.raises(ValueError, match="shape"):
            weights(torch.ones(2, 2))
