"""rftcore.blocks.recompute: for the calls inside, whatever the model was accelerated with."""

import copy

import pytest
import torch
from against_stock import assert_equal, assert_same, inputs, make, pair, results
from models import UNETS

import rftcore
from benchmarks.memory import PeakBytes, saved_bytes
from rftcore.blocks import costs, recompute

LEVELS = ["none", "ff", "qkv", "block"]


def kept(model, arguments=None):
    with saved_bytes(model.parameters()) as saved:
        model(**(inputs() if arguments is None else arguments))
    return saved["bytes"]


def everything(model, kind="sd1", size=8):
    """Of every layer, the values that it can make again."""
    priced = costs.priced(model, 2, size, size, torch.float64, None)
    return {layer.name: [name for item in cost.items for name in item.names] for layer, cost in priced}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("options", [{"recompute": "qkv"}, {"recompute": "auto", "memory_budget": "10MiB"}])
def test_a_level_is_that_of_accelerate(level, options):
    yardstick = kept(rftcore.accelerate(make(), level))
    unet = rftcore.accelerate(make(), **options)
    usual = kept(unet)
    with recompute(unet, level):
        assert kept(unet) == yardstick
    assert kept(unet) == usual


def test_the_innermost_counts_and_is_taken_back():
    unet = rftcore.accelerate(make())
    none, block = kept(unet), kept(rftcore.accelerate(make(), "block"))
    with recompute(unet, "block"):
        with recompute(unet, {}):
            assert kept(unet) == none
        assert kept(unet) == block
        with pytest.raises(ZeroDivisionError), recompute(unet, "none"):
            raise ZeroDivisionError
        assert kept(unet) == block
    assert kept(unet) == none


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in UNETS),
        *(pytest.param(kind, {"layers_per_block": 2}, marks=pytest.mark.slow) for kind in ("sd1", "sd2", "sdxl")),
    ],
)
def test_everything_made_again_is_exact(kind, options):
    stock, unet = pair(make(kind, **options))
    drops = everything(unet)
    least = kept(rftcore.accelerate(copy.deepcopy(unet), "block"), inputs(kind))
    with recompute(unet, drops):
        assert_same(unet, stock, lambda: inputs(kind))
        if kind != "unconditional":
            assert kept(unet, inputs(kind)) < least


def test_each_value_of_a_stage_alone_is_exact():
    stock, unet = pair(make())
    expected = results(stock)
    none = kept(unet)
    for value in everything(unet)["up_blocks.1"]:
        with recompute(unet, {"up_blocks.1": [value]}):
            assert_equal(results(unet), expected)
            # To make a time embedding's projection again, the embedding is kept: it may be the wider one.
            assert kept(unet) < none or value.endswith("embedding"), value


def test_trained_in_full_it_is_exact():
    stock, unet = pair(make(lora=False, layers_per_block=2))
    with recompute(unet, everything(unet)):
        assert_same(unet, stock)


def test_names_that_are_no_values_are_passed_over():
    unet = rftcore.accelerate(make())
    none = kept(unet)
    with recompute(unet, {"up_blocks.1": ["nothing", "hidden_states"], "no layer": ["u"]}):
        assert kept(unet) == none


def test_a_backward_makes_again_what_its_forward_was_told_to():
    stock, unet = pair(make())
    expected = results(stock)

    def later(output):
        with recompute(unet, "none"):
            output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(11), dtype=output.dtype))

    with recompute(unet, everything(unet)):
        found = results(unet, differentiate=later)
    assert_equal(found, expected)


def test_layers_of_a_stage_that_cannot_be_served_as_one_are_served_each():
    stock, unet = pair(make(layers_per_block=2))
    for model in (stock, unet):
        model.up_blocks[1].attentions[1].register_forward_hook(lambda module, args, output: None)
    drops = everything(unet)
    assert "up_blocks.1" not in drops and "up_blocks.1.attentions.0" in drops and "up_blocks.1.resnets.1" in drops
    with recompute(unet, drops):
        assert_same(unet, stock)


def test_a_copy_has_its_own():
    unet = rftcore.accelerate(make())
    copied = copy.deepcopy(unet)
    none = kept(unet)
    with recompute(unet, "block"):
        assert kept(copied) == none > kept(unet)


def test_values_are_let_go_of_layer_by_layer():
    """Kept boundaries part a stage: no layer's values wait for the whole stage's backward."""
    peaks = []
    for level in ("none", "block"):
        unet = rftcore.accelerate(make(layers_per_block=3), level)
        with PeakBytes() as counted:
            unet(**inputs()).sample.sum().backward()
        peaks.append(counted.peak)
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize("drops", ["all", "auto", ""])
def test_an_unknown_level(drops):
    unet = rftcore.accelerate(make())
    with pytest.raises(ValueError, match=r"drops=.*choose one of 'none', 'ff', 'qkv', 'block'"), recompute(unet, drops):
        pass


def test_a_module_that_is_not_accelerated():
    with pytest.raises(ValueError, match=r"not accelerated; call rftcore.accelerate"), recompute(make(), "none"):
        pass
