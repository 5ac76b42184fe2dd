"""DRTune's loss against values worked out by hand; its gradient path is tested in test_paths."""

import pytest
import torch

from rftcore.algorithms.drtune import drtune


def test_loss_and_gradient_by_hand():
    """L = -(3 - 1) / 2 = -1; dL/dr = -1/2."""
    r = torch.tensor([3.0, -1.0], dtype=torch.float64, requires_grad=True)
    loss = drtune(r)
    loss.backward()
    assert loss.item() == -1.0
    assert r.grad.tolist() == [-0.5, -0.5]


def test_rewards_are_checked():
    with pytest.raises(ValueError, match="carry no gradient"):
        drtune(torch.ones(3))
