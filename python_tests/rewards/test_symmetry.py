"""Symmetry, by hand and of images made symmetric."""

import pytest
import torch

from rftcore import rewards
from rftcore.rewards import RewardSpecError
from rftcore.rewards.symmetry import symmetry

KINDS = {
    "left_right": lambda x: x[..., ::-1],
    "up_down": lambda x: x[..., ::-1, :],
    "half_turn": lambda x: x[..., ::-1, ::-1],
    "quarter_turn": lambda x: x.swapaxes(-1, -2)[..., ::-1, :],
}


@pytest.mark.parametrize("kind", KINDS)
def test_symmetry(kind):
    x = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    reward = rewards.load("symmetry", options={"kind": kind})
    assert reward.differentiable
    value = reward(x, ["", ""])
    other = torch.from_numpy(KINDS[kind](x.detach().numpy()).copy())
    torch.testing.assert_close(value, -(x - other).square().mean(dim=(1, 2, 3)))
    # Following the gradient ends in an image that is symmetric.
    even = x.detach().clone()
    for _ in range(200):
        even.requires_grad_()
        (gradient,) = torch.autograd.grad(reward(even, ["", ""]).sum(), even)
        even = (even + 10 * gradient).detach()
    torch.testing.assert_close(reward(even, ["", ""]), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-8)
    assert (value < -1e-3).all()


def test_by_hand():
    x = torch.zeros(1, 3, 2, 4)
    x[0, 0, 0, 0] = 1.0  # two of 24 values differ by 1
    assert rewards.load("symmetry")(x, [""]).item() == pytest.approx(-2 / 24)


def test_errors():
    with pytest.raises(RewardSpecError, match="kind='mirror'; it must be 'left_right' or 'up_down'"):
        rewards.load("symmetry", options={"kind": "mirror"})
    with pytest.raises(RewardSpecError, match="kind='mirror'.*left_right, up_down"):
        symmetry(torch.zeros(1, 3, 4, 4), [""], kind="mirror")
    with pytest.raises(RewardSpecError, match=r"square images, got \(4, 6\)"):
        rewards.load("symmetry", options={"kind": "quarter_turn"})(torch.zeros(1, 3, 4, 6), [""])
