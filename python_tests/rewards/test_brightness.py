"""Brightness, by hand."""

import torch

from rftcore import rewards


def test_brightness():
    reward = rewards.load("brightness")
    assert reward.differentiable and reward.range == (0.0, 1.0)
    images = torch.zeros(3, 3, 2, 4)
    images[1] = 1.0
    images[2, 0, 0] = 0.6  # 4 of 24 values
    images.requires_grad_()
    value = reward(images, [""] * 3)
    torch.testing.assert_close(value, torch.tensor([0.0, 1.0, 0.1]))
    value.sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 1 / 24))
