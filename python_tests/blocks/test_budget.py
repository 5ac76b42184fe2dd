"""recompute="auto": planned once a shape, kept whatever is trained, and never in the way of a forward."""

import copy

import pytest
import torch
from against_stock import assert_same, assert_served, inputs, make, pair
from diffusers import UNet2DModel
from models import text_unet
from torch.nn.attention import SDPBackend, sdpa_kernel

import rftcore
from benchmarks.memory import saved_bytes
from rftcore.blocks.budget import Budget, bytes_of


def kept(model, arguments):
    with saved_bytes(model.parameters()) as saved:
        model(**arguments)
    return saved["bytes"]


@pytest.fixture
def choices(monkeypatch):
    """The shapes that a budget was divided for."""
    made, choose = [], Budget._choose

    def spy(self, *key):
        made.append(key)
        return choose(self, *key)

    monkeypatch.setattr(Budget, "_choose", spy)
    return made


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "unconditional"])
def test_a_shape_is_planned_once(kind, choices):
    unet = rftcore.accelerate(make(kind), "auto", memory_budget="300KiB")
    for _ in range(3):
        unet(**inputs(kind))
    assert len(choices) == 1
    unet(**inputs(kind, batch=1))
    assert len(choices) == 2
    with torch.no_grad():
        unet(**inputs(kind, batch=3))
    assert len(choices) == 2


def test_an_odd_size_is_planned_once_for_each_way_it_was_rounded(choices):
    unet = rftcore.accelerate(make(), "auto", memory_budget="300KiB")
    for _ in range(3):
        unet(**inputs(size=(9, 7)))
    assert len(choices) == len(set(choices)) == 2


def test_what_is_trained_is_planned_for(choices):
    unet = make()
    rftcore.accelerate(unet)
    unet.requires_grad_(True)
    everything = kept(unet, inputs())
    unet.requires_grad_(False)
    rftcore.accelerate(unet, "auto", memory_budget=int(0.6 * everything))
    for trained in (False, True):
        unet.requires_grad_(trained)
        assert kept(unet, inputs()) <= 0.6 * everything
    assert len(choices) == 2


def test_other_texts_and_masks_are_exact():
    stock, ours = pair(make(), recompute="auto", memory_budget="250KiB")
    for tokens in (1, 5, 40):
        text = torch.randn(2, tokens, 12, dtype=torch.double, generator=torch.Generator().manual_seed(0))
        assert_same(ours, stock, lambda text=text: {**inputs(), "encoder_hidden_states": text})
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert_same(ours, stock, lambda: {**inputs(), "encoder_attention_mask": mask})


@pytest.mark.parametrize("backend", ["auto", "cpu", "flash", "math", "reference"])
def test_backends(backend):
    stock, ours = pair(make(), recompute="auto", memory_budget="250KiB", backend=backend)
    assert_same(ours, stock)


def test_under_a_choice_of_kernels():
    stock, ours = pair(make(), recompute="auto", memory_budget="250KiB")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        assert_same(ours, stock)


@pytest.mark.parametrize(
    "options",
    [
        {"downsample_type": "resnet", "upsample_type": "resnet"},
        {"down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D")},
        {"mid_block_type": None},
    ],
)
def test_builds_it_does_not_know_run(options):
    defaults = {"block_out_channels": (16, 32), "norm_num_groups": 4, "attention_head_dim": 8, "layers_per_block": 1}
    types = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    channels = {"in_channels": 4, "out_channels": 4}
    unet = UNet2DModel(sample_size=8, **{**defaults, **types, **channels, **options}).double()
    stock, ours = pair(unet, recompute="auto", memory_budget="1MiB")
    assert_same(ours, stock, lambda: inputs("unconditional"))


def test_a_layer_that_runs_otherwise_than_planned_is_not_planned_for_again(choices):
    unet = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        add_attention=False,
    ).double()
    rftcore.accelerate(unet, "auto", memory_budget="1MiB")
    x = torch.randn(1, 16, 8, 8, dtype=torch.double, requires_grad=True)
    for _ in range(3):
        unet.up_blocks[1].resnets[0](torch.cat([x, x, x], dim=1), torch.zeros(1, 64).double())
    assert len(choices) == 1


def test_two_odd_layers_do_not_drive_each_other_out(choices):
    unet = rftcore.accelerate(make(layers_per_block=2), "auto", memory_budget="1MiB")
    for inner in unet.up_blocks[1].resnets:
        inner.register_forward_hook(lambda module, args, output: None)
    for _ in range(2):
        unet(**inputs())
    seen = len(choices)
    for _ in range(3):
        unet(**inputs())
    assert len(choices) == seen


def test_copies_keep_to_it():
    unet = rftcore.accelerate(make(), "auto", memory_budget="250KiB")
    copied = copy.deepcopy(unet)
    del unet
    assert kept(copied, inputs()) <= 250 * 2**10
    assert_served(copied)


def test_too_small_a_budget_says_what_is_needed():
    unet = rftcore.accelerate(make(), "auto", memory_budget=1000)
    with pytest.raises(ValueError, match=r"memory_budget=.*the least is .*make the batch smaller"):
        unet(**inputs())
    with torch.no_grad():
        unet(**inputs())


@pytest.mark.parametrize(
    "text, number", [(5, 5), ("7", 7), ("2KiB", 2048), ("1.5 MiB", 1572864), ("3GB", 3 * 10**9), ("10B", 10)]
)
def test_bytes_of(text, number):
    assert bytes_of(text) == number


@pytest.mark.parametrize("text", [0, -1, True, 1.5, "", "many", "1 PiB", "0MiB", "-1MiB", None])
def test_bytes_of_nonsense(text):
    with pytest.raises(ValueError, match="memory_budget="):
        bytes_of(text)


def test_no_middle():
    unet = text_unet(mid_block_type=None).double()
    stock, ours = pair(unet, recompute="auto", memory_budget="1MiB")
    assert_same(ours, stock)
