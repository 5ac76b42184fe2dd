"""ReFL's loss against values worked out by hand."""

import pytest
import torch

from rftcore.algorithms.refl import refl


def test_loss_and_gradient_by_hand():
    """relu(2 - r) of -1, 1.5, 2 and 3 is 3, 0.5, 0, 0: L = 1e-3 3.5 / 4; dL/dr = -1e-3 / 4 below the margin, else 0."""
    r = torch.tensor([-1.0, 1.5, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    loss = refl(r)
    loss.backward()
    assert loss.item() == pytest.approx(8.75e-4, abs=1e-18)
    assert r.grad.tolist() == pytest.approx([-2.5e-4, -2.5e-4, 0.0, 0.0], abs=1e-18)


def test_margin_and_scale_by_hand():
    """L = 0.5 ((0.25 + 0.75) / 2) = 0.25 with margin 1; dL/dr = -0.5 / 2."""
    r = torch.tensor([0.75, 0.25], dtype=torch.float64, requires_grad=True)
    loss = refl(r, margin=1.0, scale=0.5)
    loss.backward()
    assert loss.item() == 0.25
    assert r.grad.tolist() == [-0.25, -0.25]


def test_rewards_are_checked():
    with pytest.raises(ValueError, match="carry no gradient"):
        refl(torch.ones(3))
    with pytest.raises(ValueError, match=r"shape \(B,\).*\(0,\)"):
        refl(torch.ones(0, requires_grad=True))
