"""What accelerate promises in numbers: bytes kept, FLOPs and calls of the published models, counted on fake tensors."""

import pytest
import torch

import rftcore
from benchmarks import shapes
from benchmarks.counts import Counts
from benchmarks.memory import PeakBytes, saved_bytes

MIB = 2**20


@pytest.fixture(scope="module")
def sd15():
    return shapes.unet("sd15", torch.bfloat16)


@pytest.fixture(scope="module")
def sdxl():
    return shapes.unet("sdxl", torch.bfloat16)


@pytest.fixture(scope="module")
def autoencoder():
    return shapes.autoencoder()


def kept(model, mode, run):
    """MiB kept by one forward, the forward's counts, and the output."""
    with mode, saved_bytes(model.parameters()) as saved, Counts() as forward:
        output = run()
    return saved["bytes"] / MIB, forward, output


def of_unet(name, model, mode, autocast=False):
    args, kwargs = shapes.unet_inputs(name, mode)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(*args, **kwargs).sample

    return kept(model, mode, run)


def of_decoder(model, mode):
    with mode:
        latents = torch.randn(1, 4, 64, 64, dtype=torch.bfloat16, requires_grad=True)
    return kept(model, mode, lambda: model.decode(latents).sample)


def backward_of(model, mode, output):
    """The counts of the backward."""
    model.zero_grad()
    with mode, Counts() as backward:
        output.sum().backward()
    return backward


SD15 = {"none": 470, "ff": 292, "qkv": 200, "block": 52}
SDXL = {"none": 3750, "ff": 2150, "qkv": 1320, "block": 330}


@pytest.mark.slow
def test_stock_keeps_what_the_budgets_are_compared_with(sd15, sdxl, autoencoder):
    for model, _ in (sd15, sdxl, autoencoder):
        rftcore.restore(model)
    assert of_unet("sd15", *sd15)[0] == pytest.approx(784, abs=1)
    assert of_unet("sdxl", *sdxl)[0] == pytest.approx(5493, abs=1)
    assert of_decoder(*autoencoder)[0] == pytest.approx(2908, abs=1)


@pytest.mark.parametrize("level", SD15)
def test_sd15_keeps(sd15, level):
    rftcore.accelerate(sd15[0], level)
    assert of_unet("sd15", *sd15)[0] <= SD15[level]


@pytest.mark.parametrize(
    "level", ["none", *(pytest.param(each, marks=pytest.mark.slow) for each in ("ff", "qkv", "block"))]
)
def test_sdxl_keeps(sdxl, level):
    rftcore.accelerate(sdxl[0], level)
    assert of_unet("sdxl", *sdxl)[0] <= SDXL[level]


def test_decoder_keeps(autoencoder):
    rftcore.accelerate(autoencoder[0])
    assert of_decoder(*autoencoder)[0] <= 900


def test_none_runs_no_product_again(sd15):
    model, mode = sd15
    flops = []
    for set_up in (rftcore.restore, rftcore.accelerate):
        set_up(model)
        _, forward, output = of_unet("sd15", model, mode)
        flops.append((forward.flops, backward_of(model, mode, output).flops))
    (stock_forward, stock_backward), (forward, backward) = flops
    assert forward == stock_forward
    # What the adapters' A make of their inputs: thousandths.
    assert stock_backward <= backward <= 1.002 * stock_backward


@pytest.fixture(scope="module")
def none_backward_flops(sd15):
    model, mode = sd15
    rftcore.accelerate(model)
    return backward_of(model, mode, of_unet("sd15", model, mode)[2]).flops


@pytest.mark.parametrize(
    "budget, extra",
    [
        (165, 0.16),
        (55, 0.445),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((270, 0.08), (96, 0.26), (61, 0.41))),
    ],
)
def test_auto_keeps_to_its_budget_for_few_flops(sd15, none_backward_flops, budget, extra):
    model, mode = sd15
    rftcore.accelerate(model, "auto", memory_budget=budget * MIB)
    mib, forward, output = of_unet("sd15", model, mode)
    backward = backward_of(model, mode, output)
    assert mib <= budget
    assert backward.flops - none_backward_flops <= extra * forward.flops


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.7, 0.12])
def test_auto_uses_its_budget(sdxl, autoencoder, share):
    for (model, mode), run in ((sdxl, lambda m, f: of_unet("sdxl", m, f)), (autoencoder, of_decoder)):
        rftcore.accelerate(model)
        all_of_it, *_ = run(model, mode)
        budget = max(share, 0.6 if run is of_decoder else 0) * all_of_it
        rftcore.accelerate(model, "auto", memory_budget=int(budget * MIB))
        mib, *_ = run(model, mode)
        assert 0.9 * budget <= mib <= budget


@pytest.mark.slow
def test_fp32_lora_keeps_as_little(sd15):
    model, mode = shapes.unet("sd15", torch.float32)
    for level in SD15:
        rftcore.accelerate(sd15[0], level)
        yardstick, *_ = of_unet("sd15", *sd15)
        rftcore.accelerate(model, level)
        for autocast in (False, True):
            mib, *_ = of_unet("sd15", model, mode, autocast)
            assert mib <= 1.01 * yardstick, (level, autocast)


def test_sd15_launches(sd15):
    rftcore.accelerate(sd15[0])
    _, forward, output = of_unet("sd15", *sd15)
    backward = backward_of(*sd15, output)
    assert forward.calls + backward.calls < 1300


@pytest.mark.parametrize(
    ("level", "peak"),
    [
        ("none", 500),
        pytest.param("ff", 344, marks=pytest.mark.slow),
        pytest.param("qkv", 252, marks=pytest.mark.slow),
        ("block", 147),
    ],
)
def test_sd15_backward_peaks_at(sd15, level, peak):
    """A stage that is one program holds no more at a time than its layers one by one."""
    model, mode = sd15
    rftcore.accelerate(model, level)
    args, kwargs = shapes.unet_inputs("sd15", mode)
    model.zero_grad()
    with mode, PeakBytes() as counted:
        model(*args, **kwargs).sample.sum().backward()
    model.zero_grad()
    assert counted.peak / MIB <= peak
