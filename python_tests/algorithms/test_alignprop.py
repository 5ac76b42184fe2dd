"""AlignProp's loss against values worked out by hand."""

import pytest
import torch

from rftcore.algorithms.alignprop import alignprop


def rewards(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_released_aesthetic_by_hand():
    """L = 0.01 (|5 - 10| + |12 - 10|) / 2 = 0.035; dL/dr = 0.01 sign(r - 10) / 2: -0.005 below 10, 0.005 above."""
    r = rewards(5.0, 12.0)
    loss = alignprop(r)
    loss.backward()
    assert loss.item() == pytest.approx(0.035, abs=1e-15)
    assert r.grad.tolist() == [-0.005, 0.005]


def test_released_hps_by_hand():
    """L = 0.01 ((1 - 0.25) + (1 - 0.5)) / 2 = 0.00625; dL/dr = -0.005."""
    r = rewards(0.25, 0.5)
    loss = alignprop(r, target=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.00625, abs=1e-15)
    assert r.grad.tolist() == [-0.005, -0.005]


def test_without_a_target_by_hand():
    """L = -0.5 (-10 + 16) / 2 = -1.5; dL/dr = -0.5 / 2, also beyond 10."""
    r = rewards(-10.0, 16.0)
    loss = alignprop(r, target=None, scale=0.5)
    loss.backward()
    assert loss.item() == -1.5
    assert r.grad.tolist() == [-0.25, -0.25]


def test_rewards_are_checked():
    with pytest.raises(ValueError, match="carry no gradient"):
        alignprop(torch.ones(3))
    with pytest.raises(ValueError, match=r"shape \(B,\).*\(2, 1\)"):
        alignprop(torch.ones(2, 1, requires_grad=True), target=None)
