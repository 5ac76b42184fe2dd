"""Blocks by Triton's kernels, in its interpreter: as good as stock at every level, and in how many launches."""

import collections

import pytest
import torch
from against_stock import inputs, make, pair, randomise_adapters
from checks import relative_error
from peft import LoraConfig

import rftcore
from rftcore.ops.backends import Op

launch = pytest.importorskip("rftcore.kernels.launch", reason="Triton is not installed", exc_type=ImportError)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter; test_on_gpu is for a GPU")


LEVELS = ["none", "ff", "qkv", "block"]


@pytest.fixture
def launched(monkeypatch):
    """How often each kernel was launched."""
    counts, run = collections.Counter(), launch.Launch.run

    def spy(self):
        counts[f"{self.kernel.fn.__module__.rpartition('.')[2]}.{self.kernel.fn.__name__.strip('_')}"] += 1
        run(self)

    monkeypatch.setattr(launch.Launch, "run", spy)
    return counts


def results(model, dtype, kind="sd1", size=(4, 4)):
    """The output and all gradients."""
    call = inputs(kind, batch=1, dtype=dtype, size=size)
    output = model(**call).sample
    leaves = [call["sample"], *(p for p in model.parameters() if p.requires_grad)]
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return output, torch.autograd.grad(output, leaves, grad.to(dtype))


# 144 tokens are more than those that stay on chip.
@pytest.mark.parametrize(("kind", "size", "levels"), [
    pytest.param("sd1", (12, 12), ["none"], marks=pytest.mark.slow),
    pytest.param("sdxl", (4, 4), LEVELS, marks=pytest.mark.slow),
])  # fmt: skip
def test_levels_are_as_good_as_stock_and_equal_each_other(kind, size, levels, launched):
    unet = randomise_adapters(make(kind))
    exact, exact_gradients = results(unet, torch.float64, kind, size)
    stock, ours = pair(unet.float(), backend="triton")
    theirs, their_gradients = results(stock, torch.float32, kind, size)
    first = None
    for level in levels:
        rftcore.accelerate(ours, level, backend="triton")
        launched.clear()
        output, gradients = results(ours, torch.float32, kind, size)
        used = {"cross_attention.forward_kernel", "lora_linear.project_kernel", "gated_linear.forward_kernel"}
        assert used < launched.keys()
        assert ("attention.forward_kernel" in launched) == (size == (12, 12))
        first = first or (output, gradients)
        assert torch.equal(output, first[0])
        assert relative_error(output, exact) <= 2 * relative_error(theirs, exact) + 1e-6
        assert error(gradients, exact_gradients) <= 2 * error(their_gradients, exact_gradients) + 1e-6
    rftcore.restore(ours)


@pytest.mark.parametrize(
    "targets",
    [
        ["to_q", "ff.net.0.proj"],
        *(pytest.param(each, marks=pytest.mark.slow) for each in (["to_q", "to_v"], ["ff.net.2"])),
    ],
)
def test_the_bits_are_those_of_a_forward_without_a_graph(targets):
    """What a sample is drawn by and what it is scored again by: a gate is joined to its projection in both or neither."""
    unet = make(lora=False).requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, target_modules=targets))
    _, ours = pair(randomise_adapters(unet).float(), backend="triton")
    call = inputs(batch=1, dtype=torch.float32, size=(4, 4), leaves=())
    with torch.no_grad():
        sampled = ours(**call).sample
    scored = ours(**call).sample
    assert scored.requires_grad and torch.equal(sampled, scored)


@pytest.mark.covering(1)
@pytest.mark.parametrize("trained", ["bias", "ff.net.0.proj.bias", "norm3.weight", "ff.net.0.proj.weight", ""])
@pytest.mark.parametrize("level", ["none", "ff"])
def test_what_is_trained_is_left_to_others(trained, level, monkeypatch):
    """In the order of a GPU, where Triton comes first, also for what a backward chooses."""
    monkeypatch.setattr(Op, "_order", lambda op, *inputs: sorted(op.not_supported_reasons, key="triton".__ne__))
    unet = make(lora=False)
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name.endswith(trained))
    _, exact = results(unet, torch.float64)
    stock, ours = pair(unet.float(), recompute=level)
    (_, theirs), (_, gradients) = results(stock, torch.float32), results(ours, torch.float32)
    assert error(gradients, exact) <= 2 * error(theirs, exact) + 1e-6


def error(gradients, exact):
    """The root mean square of the gradients' relative errors: one of a few elements scatters by chance."""
    errors = [relative_error(g, e) ** 2 for g, e in zip(gradients, exact, strict=True)]
    return (sum(errors) / len(errors)) ** 0.5


def test_launches(launched):
    """Of a block's attention, feed-forward and their backward; u is written where it is kept, and only there."""
    _, ours = pair(randomise_adapters(make("sd1")).float(), backend="triton")
    for level, made_again in (("none", False), ("ff", True)):
        rftcore.accelerate(ours, level, backend="triton")
        launched.clear()
        results(ours, torch.float32)
        blocks = launched["gated_linear.forward_kernel"]
        assert launched["gated_linear.backward_kernel"] == (blocks if made_again else 0)
        assert launched["geglu.backward_kernel"] == (0 if made_again else blocks)
        assert launched["attention.forward_kernel"] + launched["cross_attention.forward_kernel"] == 2 * blocks
        # Queries, keys and values at once; the other attention's queries; its keys and values; and both outputs.
        assert launched["lora_linear.project_kernel"] == 5 * blocks
