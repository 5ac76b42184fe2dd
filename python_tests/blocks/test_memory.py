"""Nothing is held longer than it must be, and a backward's own peak is no larger than stock's."""

import copy
import gc
import weakref

import pytest
import torch
from against_stock import backward, inputs, make, pair

import rftcore
from benchmarks.memory import PeakBytes
from rftcore.blocks.program import plan


@pytest.fixture
def without_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def step(unet, kind="sd1"):
    unet.zero_grad()
    backward(unet(**inputs(kind)).sample)
    unet.zero_grad()


@pytest.mark.parametrize("level", ["none", "block"])
def test_a_step_leaves_nothing_behind(level, without_collector):
    unet = rftcore.accelerate(make(), level)
    step(unet)
    live = []
    with PeakBytes() as counted:
        for _ in range(3):
            step(unet)
            live.append(counted.live)
    assert live == [0, 0, 0]


def test_a_failed_backward_leaves_nothing_behind(without_collector):
    unet = rftcore.accelerate(make())
    step(unet)

    def fail(grad):
        raise RuntimeError("on purpose")

    def failing_step():
        arguments = inputs()
        arguments["sample"].register_hook(fail)
        try:
            unet(**arguments).sample.sum().backward()
        except RuntimeError as error:
            return str(error)

    with PeakBytes() as counted:
        assert failing_step() == "on purpose"
        unet.zero_grad()
        assert counted.live == 0


@pytest.mark.parametrize("options", [{}, {"recompute": "auto", "memory_budget": "1MiB"}])
def test_a_model_that_is_let_go_of_is_gone(options, without_collector):
    unet = rftcore.accelerate(make(), **options)
    step(unet)
    weight = weakref.ref(unet.mid_block.resnets[0].conv1.weight)
    stock = make()
    of_stock = weakref.ref(stock.mid_block.resnets[0].conv1.weight)
    del unet, stock
    assert of_stock() is None  # or else it would not be accelerate's doing
    assert weight() is None


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_peaks(kind):
    """Each below the one before: stock, "none", "block"."""
    peaks = []
    unet = make(kind)
    for level in (None, "none", "block"):
        if level:
            rftcore.accelerate(unet, level)
        step(unet, kind)
        with PeakBytes() as counted:
            step(unet, kind)
        peaks.append(counted.peak)
    assert peaks == sorted(peaks, reverse=True)


def test_a_bias_may_change_before_the_backward():
    """Nothing reads it, so stock does not mind either."""
    found = []
    for unet in pair(make(lora=False)):
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(name.endswith("bias") and "norm" not in name)
        output = unet(**inputs()).sample
        with torch.no_grad():
            for parameter in unet.parameters():
                if parameter.requires_grad:
                    parameter.mul_(0.5)
        backward(output)
        found.append(torch.cat([p.grad.flatten() for p in unet.parameters() if p.requires_grad]))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


def test_plans_do_not_depend_on_scales():
    unet = rftcore.accelerate(make())
    step(unet)
    before = plan.cache_info().currsize
    for scale in (0.1, 0.2, 0.3):
        backward(unet(**inputs(), cross_attention_kwargs={"scale": scale}).sample)
    assert plan.cache_info().currsize == before


def test_a_copied_block_does_not_bring_the_model_along():
    unet = rftcore.accelerate(make(), "auto", memory_budget="10MiB")
    step(unet)
    block = copy.deepcopy(unet.mid_block.resnets[0])
    held = {id(m) for m in unet.modules()}
    reached = gc.get_referents(block.forward.place.serving)
    assert block.forward.place.serving.budget is None and not held & {id(r) for r in reached}
    x, temb = torch.randn(1, 32, 4, 4).double(), torch.randn(1, 64).double()
    torch.testing.assert_close(block(x, temb), unet.mid_block.resnets[0](x, temb))
