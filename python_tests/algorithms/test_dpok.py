"""DPOK's losses against values and gradients worked out by hand and sample by sample in Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rftcore.algorithms.dpok import dpok, policy, value_loss


def tensor(values, gradient=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=gradient)


def test_policy_by_hand():
    """c = 0.1, w = 10; r = (1.05, 1.5, 1.5, 0.5, 0.5), A = (2, 1, -1, 1, -1).

    clamp(r) = (1.05, 1.1, 1.1, 0.9, 0.9); L = -10 (2.1 + 1.1 - 1.1 + 0.9 - 0.9) / 5 = -4.2.
    dL/dlog p = -10 A r / 5 inside the band, (-4.2, 0, 0, 0, 0); DDPO's second and third to last would not be 0.
    """
    log_prob = tensor([math.log(r) for r in (1.05, 1.5, 1.5, 0.5, 0.5)], gradient=True)
    loss = policy(log_prob, tensor([0.0] * 5), tensor([2.0, 1.0, -1.0, 1.0, -1.0]), 10, clip_range=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(-4.2, rel=1e-14)
    assert log_prob.grad.tolist() == pytest.approx([-4.2, 0, 0, 0, 0], rel=1e-14)
    assert log_prob.grad[1:].tolist() == [0.0] * 4


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-3e-4, 3e-4), st.floats(-2, 2), st.floats(-5, 5)), min_size=1, max_size=12),
    st.floats(0.1, 1000),
    st.floats(1e-5, 0.5),
)
def test_policy_sample_by_sample(samples, reward_weight, clip_range):
    """Against a loop in Python floats, gradient included: 0 on both sides of the band whatever A's sign."""
    loss, gradient = 0.0, []
    for difference, old, A in samples:
        ratio = math.exp((old + difference) - old)
        loss -= reward_weight * A * min(max(ratio, 1 - clip_range), 1 + clip_range) / len(samples)
        inside = 1 - clip_range <= ratio <= 1 + clip_range
        gradient.append(-reward_weight * A * ratio / len(samples) if inside else 0.0)
    old = tensor([old for _, old, _ in samples])
    log_prob = (old + tensor([difference for difference, _, _ in samples])).requires_grad_()
    ours = policy(log_prob, old, tensor([A for *_, A in samples]), reward_weight, clip_range)
    ours.backward()
    assert ours.item() == pytest.approx(loss, rel=1e-12, abs=1e-11)
    assert log_prob.grad.tolist() == pytest.approx(gradient, rel=1e-12, abs=1e-11)


def test_dpok_adds_the_weighted_mean_divergence():
    """One w: log p = w, d = (w^2, 3 w^2) at w = 0, then at w = 1e-5: L = -A mean(r) + 0.1 * 2 w^2, by hand."""
    for at in (0.0, 1e-5):
        w = tensor(at, gradient=True)
        divergence = torch.stack([w**2, 3 * w**2])
        loss = dpok(
            torch.stack([w, w]), tensor([0.0, 0.0]), tensor([1.0, 3.0]), divergence, reward_weight=10, kl_weight=0.1
        )
        loss.backward()
        assert loss.item() == pytest.approx(-20 * math.exp(at) + 0.2 * at**2, rel=1e-14)
        assert w.grad.item() == pytest.approx(-20 * math.exp(at) + 0.4 * at, rel=1e-14)


def test_outside_the_band_only_the_divergence_is_left():
    w = tensor(0.5, gradient=True)
    dpok(w.reshape(1), tensor([0.0]), tensor([-1.0]), (w**2).reshape(1), 10, 0.25).backward()
    assert w.grad.item() == 0.25


def test_value_loss_by_hand():
    """v - r = (1, -3): L = 10 / 2, dL/dv = 2 (v - r) / 2; the reward is a constant."""
    v, r = tensor([2.0, 1.0], gradient=True), tensor([1.0, 4.0], gradient=True)
    loss = value_loss(v, r)
    loss.backward()
    assert loss.item() == 5.0
    assert v.grad.tolist() == [1.0, -3.0] and r.grad is None


def test_only_the_policy_gets_a_gradient():
    log_prob, old, A = (tensor([0.5, 1.0], gradient=True) for _ in range(3))
    policy(log_prob, old, A, 10).backward()
    assert log_prob.grad is not None and old.grad is None and A.grad is None


def test_what_is_wrong_is_named():
    log_prob, A = tensor([1.0, 2.0], gradient=True), tensor([1.0, 2.0])
    with pytest.raises(ValueError, match=r"one shape.*divergence \(3,\)"):
        dpok(log_prob, A, A, torch.ones(3, requires_grad=True), 10, 0.01)
    with pytest.raises(ValueError, match="divergence carries no gradient"):
        dpok(log_prob, A, A, A, 10, 0.01)
    with pytest.raises(ValueError, match="log_prob carries no gradient"):
        policy(A, A, A, 10)
    with pytest.raises(ValueError, match="clip_range=1 must lie in"):
        policy(log_prob, A, A, 10, clip_range=1)
    with pytest.raises(ValueError, match=r"one shape.*v \(2, 1\), r \(2,\)"):
        value_loss(log_prob.reshape(2, 1), A)
    with pytest.raises(ValueError, match="v carries no gradient"):
        value_loss(A, A)


def test_value_loss_has_the_values_dtype():
    """Rewards come in whatever dtype their model has."""
    v = torch.tensor([2.0, 1.0], requires_grad=True)
    for dtype in (torch.float64, torch.bfloat16, torch.int64):
        loss = value_loss(v, torch.tensor([1, 4], dtype=dtype))
        assert loss.dtype == torch.float32 and loss.item() == 5.0
