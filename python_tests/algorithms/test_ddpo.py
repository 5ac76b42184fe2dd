"""DDPO's losses against values and gradients worked out by hand and sample by sample in Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rftcore.algorithms.ddpo import approx_kl, clip_fraction, importance_sampling, score_function

CLIP = 1e-4


def tensor(values, gradient=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=gradient)


def test_score_function_by_hand():
    """L = -(2 (-1) + (-3)(-0.5)) / 2 = 0.25, dL/dlog p = -A / 2."""
    log_prob = tensor([-1.0, -0.5], gradient=True)
    loss = score_function(log_prob, tensor([2.0, -3.0]))
    loss.backward()
    assert loss.item() == 0.25
    assert log_prob.grad.tolist() == [-1.0, 1.5]


def test_importance_sampling_by_hand():
    """c = 0.1; r = (1.5, 1.5, 0.5, 0.5), A = (1, -1, 1, -1).

    -A r = (-1.5, 1.5, -0.5, 0.5), -A clip(r) = (-1.1, 1.1, -0.9, 0.9); maxima (-1.1, 1.5, -0.5, 0.9), L = 0.2.
    dL/dlog p = -A r / 4 where the unclipped one is the maximum, else 0: (0, 1.5, -0.5, 0) / 4.
    """
    log_prob = tensor([math.log(1.5), math.log(1.5), math.log(0.5), math.log(0.5)], gradient=True)
    loss = importance_sampling(log_prob, tensor([0.0] * 4), tensor([1.0, -1.0, 1.0, -1.0]), clip_range=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(0.2, abs=1e-15)
    assert log_prob.grad.tolist() == pytest.approx([0, 0.375, -0.125, 0], abs=1e-15)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-3e-4, 3e-4), st.floats(-2, 2), st.floats(-5, 5)), min_size=1, max_size=12),
    st.floats(1e-5, 0.5),
)
def test_importance_sampling_sample_by_sample(samples, clip_range):
    """Against a loop in Python floats; the gradient by cases: 0 where r left the band as A asked, else -A r / N."""
    loss, gradient = 0.0, []
    for difference, old, A in samples:
        ratio = math.exp((old + difference) - old)
        clipped = min(max(ratio, 1 - clip_range), 1 + clip_range)
        loss += max(-A * ratio, -A * clipped) / len(samples)
        left = (A > 0 and ratio > 1 + clip_range) or (A < 0 and ratio < 1 - clip_range)
        gradient.append(0.0 if left else -A * ratio / len(samples))
    old = tensor([old for _, old, _ in samples])
    log_prob = (old + tensor([difference for difference, _, _ in samples])).requires_grad_()
    ours = importance_sampling(log_prob, old, tensor([A for *_, A in samples]), clip_range)
    ours.backward()
    assert ours.item() == pytest.approx(loss, rel=1e-12, abs=1e-14)
    assert log_prob.grad.tolist() == pytest.approx(gradient, rel=1e-12, abs=1e-14)


def test_gradient_at_ratio_one_is_the_score_functions():
    """d(-A r) = -A r dlog p, and r = 1: both losses move theta alike in a first update, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    gradients = []
    for loss in (score_function, lambda log_prob, A: importance_sampling(log_prob, log_prob.detach(), A)):
        theta = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3).requires_grad_()
        loss(-theta.square(), A).backward()
        gradients.append(theta.grad)
    assert torch.equal(*gradients)


def test_the_pessimistic_side_keeps_its_gradient():
    """Outside the band on the side A does not want, the policy is still pulled back."""
    log_prob = tensor([5 * CLIP, -5 * CLIP], gradient=True)
    importance_sampling(log_prob, tensor([0.0, 0.0]), tensor([-1.0, 1.0])).backward()
    assert log_prob.grad.tolist() == pytest.approx([0.5 * math.exp(5 * CLIP), -0.5 * math.exp(-5 * CLIP)], rel=1e-15)


def test_one_advantage_per_sample_holds_for_every_step():
    """A (B,) is A (B, S) repeated along the steps, also where B = S."""
    generator = torch.Generator().manual_seed(1)
    log_prob = torch.randn(3, 3, generator=generator, dtype=torch.float64).requires_grad_()
    old, A = log_prob.detach() + 1e-5, tensor([1.0, 2.0, -4.0])
    repeated = A[:, None].repeat(1, 3)
    assert torch.equal(score_function(log_prob, A), score_function(log_prob, repeated))
    assert torch.equal(importance_sampling(log_prob, old, A), importance_sampling(log_prob, old, repeated))
    assert not torch.equal(score_function(log_prob, A), score_function(log_prob, repeated.T))


def test_only_the_policy_gets_a_gradient():
    log_prob, old, A = (tensor([0.5, 1.0], gradient=True) for _ in range(3))
    importance_sampling(log_prob, old, A).backward()
    assert log_prob.grad is not None and old.grad is None and A.grad is None


def test_logged_values_by_hand():
    """d = (0, 2c, -2c, c / 2): 0.5 mean(d^2) = 0.5 (8.25 c^2) / 4; two of four ratios leave the band."""
    log_prob = tensor([0.0, 2 * CLIP, -2 * CLIP, CLIP / 2], gradient=True)
    old = tensor([0.0] * 4)
    assert approx_kl(log_prob, old).item() == pytest.approx(0.5 * 8.25 * CLIP**2 / 4, rel=1e-12)
    assert clip_fraction(log_prob, old, CLIP).item() == 0.5
    assert not approx_kl(log_prob, old).requires_grad


def test_what_is_wrong_is_named():
    log_prob, A = tensor([1.0, 2.0], gradient=True), tensor([1.0, 2.0])
    with pytest.raises(ValueError, match=r"one shape.*log_prob \(2,\), A \(3,\)"):
        score_function(log_prob, torch.ones(3))
    with pytest.raises(ValueError, match="one shape"):
        importance_sampling(log_prob, torch.ones(1), A)
    with pytest.raises(ValueError, match="one shape"):
        score_function(log_prob.reshape(1, 2), A)
    with pytest.raises(ValueError, match="at least one entry"):
        score_function(log_prob[:0], A[:0])
    with pytest.raises(ValueError, match="log_prob carries no gradient"):
        score_function(log_prob.detach(), A)
    with pytest.raises(ValueError, match="clip_range=0 must lie in"):
        importance_sampling(log_prob, A, A, clip_range=0)
    with pytest.raises(ValueError, match="old_log_prob.*bfloat16.*float32 or float64"):
        importance_sampling(log_prob, A.bfloat16(), A)
    with pytest.raises(ValueError, match="one shape"):
        approx_kl(log_prob, torch.ones(3))
