"""DRaFT+'s divergence against values worked out by hand."""

import pytest
import torch

from rftcore.algorithms.draft_plus import divergence


def fp64(values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_divergence_and_gradient_by_hand():
    """B = 2, C = 2, H = 1, W = 2: eps - eps_base is (1, -3, 0, 2), then (0, 0, 4, 0).

    d = (1 + 9 + 0 + 4) / 4 = 3.5 and 16 / 4 = 4; dd/deps = 2 (eps - eps_base) / 4. The base is a constant.
    """
    base = fp64([[[[1.0, 1.0]], [[0.0, -1.0]]], [[[2.0, 0.0]], [[1.0, 5.0]]]])
    eps = fp64([[[[2.0, -2.0]], [[0.0, 1.0]]], [[[2.0, 0.0]], [[5.0, 5.0]]]])
    d = divergence(eps, base)
    d.sum().backward()
    assert d.tolist() == [3.5, 4.0]
    assert eps.grad.flatten().tolist() == [0.5, -1.5, 0.0, 1.0, 0.0, 0.0, 2.0, 0.0]
    assert base.grad is None


def test_pulls_back_to_the_base():
    """A descent step on the divergence alone halves the distance to the base: 1 - 2 lr / CHW = 1/2 at lr = CHW / 4."""
    base = torch.randn(3, 4, 2, 2, dtype=torch.float64)
    eps = torch.randn_like(base).requires_grad_()
    divergence(eps, base).sum().backward()
    torch.testing.assert_close(eps - 4 * eps.grad - base, (eps - base) / 2, rtol=1e-14, atol=1e-14)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"\(2, 4, 8, 8\).*\(1, 4, 8, 8\)"):
        divergence(torch.zeros(2, 4, 8, 8), torch.zeros(1, 4, 8, 8))
    with pytest.raises(ValueError, match=r"\(3,\)"):
        divergence(torch.zeros(3), torch.zeros(3))
