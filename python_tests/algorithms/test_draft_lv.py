"""DRaFT-LV's noised samples against the formulas, by hand and in plain autograd through a tiny UNet."""

import math

import pytest
import torch
from models import UNETS, add_lora

from rftcore.algorithms.draft import draft
from rftcore.algorithms.draft_lv import denoise, renoise

T_1, GUIDANCE, N = 1, 3.0, 2


def fp64(values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_renoise_by_hand():
    """alpha_bar = 0.64: x_1 = 0.8 x_0 + 0.6 noise = (0.8 5 + 0.6 10, 0.8 0 - 0.6 5) = (10, -3); x_0 is a constant."""
    x_0, noise = fp64([5.0, 0.0]), fp64([10.0, -5.0])
    x_1 = renoise(x_0, noise, 0.64)
    assert x_1.tolist() == pytest.approx([10.0, -3.0], abs=1e-14)
    x_1.sum().backward()
    assert x_0.grad is None


@pytest.mark.parametrize(("prediction_type", "expected", "by_output"), [
    ("epsilon", (10 - 0.6 * 5) / 0.8, -0.75),
    ("v_prediction", 0.8 * 10 - 0.6 * 5, -0.6),
    ("sample", 5.0, 1.0),
])  # fmt: skip
def test_denoise_by_hand(prediction_type, expected, by_output):
    """x_1 = 10, output 5, alpha_bar = 0.64: (x_1 - 0.6 m) / 0.8, 0.8 x_1 - 0.6 m, m; and its derivative by m."""
    output = fp64([5.0])
    x_0 = denoise(torch.tensor([10.0], dtype=torch.float64), output, 0.64, prediction_type)
    x_0.sum().backward()
    assert x_0.item() == pytest.approx(expected, abs=1e-14)
    assert output.grad.item() == pytest.approx(by_output, abs=1e-15)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_an_exact_output_gives_x_0_back(prediction_type):
    """eps = noise, v = sqrt(a) noise - sqrt(1 - a) x_0, or x_0 itself."""
    x_0, noise = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    a = 0.7
    v = math.sqrt(a) * noise - math.sqrt(1 - a) * x_0
    output = {"epsilon": noise, "v_prediction": v, "sample": x_0}[prediction_type]
    found = denoise(renoise(x_0, noise, a), output, a, prediction_type)
    torch.testing.assert_close(found, x_0, rtol=1e-13, atol=1e-13)


def test_gradient_through_a_unet():
    """The sum of DRaFT-1's loss and n of noised samples, against the paper's formula in plain autograd."""
    unet = add_lora(UNETS["sd1"]().double().eval())
    parameters = [p for p in unet.parameters() if p.requires_grad]
    embeds = torch.randn(2 * 2, 5, 12, dtype=torch.float64)
    x_t, *noises = torch.randn(1 + N, 2, 4, 8, 8, dtype=torch.float64)
    a, weight = 0.99915, torch.randn(2, 4, 8, 8, dtype=torch.float64)

    def eps(x):
        negative, positive = unet(torch.cat([x, x]), T_1, embeds, return_dict=False)[0].chunk(2)
        return negative + GUIDANCE * (positive - negative)

    def reward(x_0):
        return (weight * x_0.tanh()).sum((1, 2, 3))

    x_0 = denoise(x_t, eps(x_t), a, "epsilon")
    loss = draft(reward(x_0))
    for noise in noises:
        x_1 = renoise(x_0, noise, a)
        loss = loss + draft(reward(denoise(x_1, eps(x_1), a, "epsilon")))
    found = torch.autograd.grad(loss, parameters)

    expected = [torch.zeros_like(p) for p in parameters]
    base = (x_t - (1 - a) ** 0.5 * eps(x_t)) / a**0.5
    terms = [base]
    for noise in noises:
        x_1 = a**0.5 * base.detach() + (1 - a) ** 0.5 * noise
        terms.append((x_1 - (1 - a) ** 0.5 * eps(x_1)) / a**0.5)
    for term in terms:
        for image in range(2):
            grads = torch.autograd.grad(reward(term)[image], parameters, retain_graph=True)
            for total, grad in zip(expected, grads, strict=True):
                total -= grad / 2
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("alpha_bar_1", [0.0, 1.0, -0.1, float("nan")])
def test_alpha_bar_is_checked(alpha_bar_1):
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match=r"alpha_bar_1=.*\(0, 1\)"):
        renoise(x, x, alpha_bar_1)
    with pytest.raises(ValueError, match=r"alpha_bar_1=.*\(0, 1\)"):
        denoise(x, x, alpha_bar_1, "epsilon")


def test_shapes_and_types_are_checked():
    x = torch.zeros(2, 4, 8, 8)
    with pytest.raises(ValueError, match=r"noise has shape \(1, 4, 8, 8\)"):
        renoise(x, x[:1], 0.9)
    with pytest.raises(ValueError, match=r"output has shape \(1, 4, 8, 8\)"):
        denoise(x, x[:1], 0.9, "epsilon")
    with pytest.raises(ValueError, match="prediction_type='score'.*'v_prediction'"):
        denoise(x, x, 0.9, "score")
