"""The supervised baselines against values worked out by hand."""

import pytest
import torch

from rftcore.algorithms.sft import kl_d, kl_o


def tensor(values, gradient=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=gradient)


def test_kl_o_by_hand():
    """(r + gamma) = (3, 1.5): L = (3 * 0.5 + 1.5 * 2) / 2 = 2.25, dL/dnll = (r + gamma) / 2; r is a constant."""
    nll, r = tensor([0.5, 2.0], gradient=True), tensor([1.0, -0.5], gradient=True)
    loss = kl_o(nll, r, gamma=2.0)
    loss.backward()
    assert loss.item() == 2.25
    assert nll.grad.tolist() == [1.5, 0.75] and r.grad is None


def test_kl_d_by_hand():
    """KL-O's 2.25 + 0.1 mean(3, 5) = 2.65."""
    nll, divergence = tensor([0.5, 2.0], gradient=True), tensor([3.0, 5.0], gradient=True)
    loss = kl_d(nll, tensor([1.0, -0.5]), 2.0, 0.1, divergence)
    loss.backward()
    assert loss.item() == pytest.approx(2.65, rel=1e-15)
    assert divergence.grad.tolist() == [0.05, 0.05]
    assert nll.grad.tolist() == [1.5, 0.75]


def test_without_reward_kl_o_is_the_denoising_loss():
    """r = 0, gamma = 1: what pre-training minimises, so that gamma holds the model where it is."""
    nll = tensor([[0.5, 2.0], [1.0, 4.0]], gradient=True)
    assert kl_o(nll, torch.zeros(2, 2), 1.0).item() == nll.mean().item()


def test_what_is_wrong_is_named():
    nll = tensor([1.0, 2.0], gradient=True)
    with pytest.raises(ValueError, match=r"one shape.*r \(3,\)"):
        kl_o(nll, torch.ones(3), 1.0)
    with pytest.raises(ValueError, match="nll carries no gradient"):
        kl_o(nll.detach(), torch.ones(2), 1.0)
    with pytest.raises(ValueError, match="divergence carries no gradient"):
        kl_d(nll, torch.ones(2), 1.0, 0.1, torch.ones(2))
    with pytest.raises(ValueError, match=r"one shape.*divergence \(1,\)"):
        kl_d(nll, torch.ones(2), 1.0, 0.1, torch.ones(1, requires_grad=True))
