"""The value function against NumPy, and that it learns what depends on the step."""

import numpy as np
import pytest
import torch

from rftcore.algorithms.dpok import value_loss
from rftcore.algorithms.value_function import ValueFunction


def test_forward_by_numpy():
    """h = relu(gate[step] * (W h + b)) three times, then W h + b, written out in fp64."""
    torch.manual_seed(0)
    model = ValueFunction(2 * 3 * 3, 5, num_steps=4, hidden=7).double()
    x_t, text, step = torch.randn(6, 2, 3, 3), torch.randn(6, 5), torch.tensor([0, 3, 1, 1, 2, 0])
    weights = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    for n in range(6):
        h = np.concatenate([x_t[n].numpy().ravel(), text[n].numpy()]).astype(np.float64)
        for layer in range(3):
            linear = weights[f"layers.{layer}.weight"] @ h + weights[f"layers.{layer}.bias"]
            h = np.maximum(weights[f"gates.{layer}.weight"][step[n]] * linear, 0)
        expected = (weights["output.weight"] @ h + weights["output.bias"]).item()
        assert model(x_t, text, step)[n].item() == pytest.approx(expected, rel=1e-12)


def test_published_sizes():
    """Latents (4, 64, 64), text 768, 50 steps: 17152 * 256 + 256 + 2 (256^2 + 256) + 257 + 3 * 50 * 256 weights."""
    model = ValueFunction(4 * 64 * 64, 768, num_steps=50)
    expected = 17152 * 256 + 256 + 2 * (256 * 256 + 256) + 257 + 3 * 50 * 256
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    gates = torch.cat([gate.weight.flatten() for gate in model.gates])
    assert gates.min() >= 0 and gates.max() < 1 and abs(gates.mean() - 0.5) < 0.01
    # Xavier: 2 / (fan in + fan out), and normal: a uniform one ends at sqrt 3 deviations.
    weight, variance = model.layers[0].weight, 2 / (17152 + 256)
    assert weight.var().item() == pytest.approx(variance, rel=0.01)
    assert weight.abs().max() > 4 * variance**0.5


def test_the_same_seed_gives_the_same_function():
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(ValueFunction(4, 2, 3)(torch.ones(2, 1, 2, 2), torch.ones(2, 2), torch.tensor([0, 2])))
    assert torch.equal(*outputs)


def test_learns_a_reward_that_depends_on_state_text_and_step():
    torch.manual_seed(0)
    model = ValueFunction(4, 3, num_steps=5, hidden=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    x_t, text, step = torch.randn(256, 1, 2, 2), torch.randn(256, 3), torch.arange(256) % 5
    r = x_t.mean((1, 2, 3)) * (1 + step) + text[:, 0]
    for _ in range(300):
        optimizer.zero_grad()
        value_loss(model(x_t, text, step), r).backward()
        optimizer.step()
    assert value_loss(model(x_t, text, step), r) < 0.05 * r.var()


def test_inputs_in_half_precision_are_taken():
    model = ValueFunction(4, 3, 5)
    output = model(torch.ones(2, 1, 2, 2).bfloat16(), torch.ones(2, 3).half(), torch.tensor([0, 4]))
    assert output.shape == (2,) and output.dtype == torch.float32


@pytest.mark.parametrize(
    ("x_t", "text", "step"),
    [((2, 1, 2, 3), (2, 3), 2), ((2, 1, 2, 2), (2, 4), 2), ((2, 1, 2, 2), (1, 3), 2), ((2, 1, 2, 2), (2, 3), 1)],
)
def test_wrong_shapes_are_named(x_t, text, step):
    with pytest.raises(ValueError, match=r"C \* h \* w = 4.*\(N, 3\)"):
        ValueFunction(4, 3, 5)(torch.ones(x_t), torch.ones(text), torch.zeros(step, dtype=torch.long))
