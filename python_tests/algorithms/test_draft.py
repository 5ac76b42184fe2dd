"""DRaFT's loss against values worked out by hand."""

import pytest
import torch

from rftcore.algorithms.draft import draft


def test_loss_and_gradient_by_hand():
    """L = -(1 + 2 - 6 + 9) / 4 = -1.5, and dL/dr_i = -1/4 for every sample."""
    r = torch.tensor([1.0, 2.0, -6.0, 9.0], dtype=torch.float64, requires_grad=True)
    loss = draft(r)
    loss.backward()
    assert loss.item() == -1.5
    assert r.grad.tolist() == [-0.25] * 4


def test_ascends_the_reward_through_a_chain():
    """x0 = 3 w, r = -(x0 - 1)^2: at w = 1, dL/dw = 2 (3 - 1) 3 = 12."""
    w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    draft((-((3 * w - 1) ** 2)).reshape(1)).backward()
    assert w.grad.item() == 12.0


def test_rewards_without_gradient_are_named():
    with pytest.raises(ValueError, match="carry no gradient.*no_grad.*backprop_steps"):
        draft(torch.ones(3))


@pytest.mark.parametrize("shape", [(), (0,), (2, 1)])
def test_wrong_shape(shape):
    with pytest.raises(ValueError, match="shape"):
        draft(torch.ones(shape, requires_grad=True))
