"""rftcore.report names every block once, served or with the reason why not."""

import pytest
import torch
from against_stock import assert_same, inputs, make, pair, results
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from models import UNETS

import rftcore


@pytest.mark.parametrize("kind", UNETS)
def test_every_block_is_named(kind):
    unet = make(kind)
    before = rftcore.report(unet)
    assert before.recompute is None and not before.served and set(before.stock.values()) == {"not accelerated"}
    rftcore.accelerate(unet, recompute="qkv")
    report = rftcore.report(unet)
    assert report.recompute == "qkv" and not report.stock and set(report.served) == set(before.stock)
    blocks = {n for n, m in unet.named_modules() if isinstance(m, ResnetBlock2D | Transformer2DModel)}
    assert blocks | {"conv_in", "conv_norm_out", "conv_act", "conv_out"} <= set(report.served)
    assert {"time_embedding.linear_1", "time_embedding.linear_2"} <= set(report.outside)
    known = tuple(f"{name}." for name in report.served)
    for name, module in unet.named_modules():
        if any(True for _ in module.parameters(recurse=False)):
            # Each layer with weights belongs to a block or is outside of all.
            assert (name in report.served or name.startswith(known)) != (name in report.outside), name


def test_as_text():
    unet = rftcore.accelerate(make(), recompute="ff")
    unet.mid_block.resnets[0].conv1.register_forward_hook(lambda *_: None)
    lines = str(rftcore.report(unet)).splitlines()
    assert lines == [
        "recompute: ff; 24 blocks served",
        "stock: mid_block.resnets.0: Conv2d has hooks",
        "outside of known blocks: time_embedding.linear_1, time_embedding.linear_2",
    ]
    assert str(rftcore.report(rftcore.restore(unet))).startswith(
        "recompute: not accelerated; 0 blocks served\nstock: conv_in"
    )


def test_a_report_changes_nothing():
    stock, unet = pair(make())
    state = torch.get_rng_state()
    rftcore.report(unet)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(unet, stock)


def test_a_reason_of_a_call_goes_with_the_next():
    _, unet = pair(make())
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 2).bool()
    unet(**inputs(), encoder_attention_mask=mask)
    assert "attention mask" in rftcore.report(unet).stock["mid_block.attentions.0.transformer_blocks.0"]
    results(unet)
    assert not rftcore.report(unet).stock


def test_another_activation():
    """Of which no program is written: the ResNets run stock, the transformers do not."""
    stock, unet = pair(make(lora=False, act_fn="mish"))
    assert_same(unet, stock)
    report = rftcore.report(unet)
    assert report.stock["mid_block.resnets.0"] == "Mish in place of SiLU"
    assert "mid_block.attentions.0" in report.served and "up_blocks.1.attentions.1" in report.served


@pytest.mark.parametrize(
    "options",
    [
        {"resnet_time_scale_shift": "scale_shift"},
        {"only_cross_attention": True},
        {"resnet_skip_time_act": True, "time_embedding_act_fn": "silu"},
        {"resnet_out_scale_factor": 1.3},
        {"mid_block_type": None},
        {"conv_in_kernel": 1, "conv_out_kernel": 1},
        {"downsample_padding": 0},
        {"transformer_layers_per_block": 2, "use_linear_projection": True},
        {"upcast_attention": True},
        {"mid_block_scale_factor": 2.0},
        {"down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
         "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
         "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D")},
    ],
    ids=lambda options: "-".join(map(str, options)),
)  # fmt: skip
def test_uncommon_builds(options):
    """Whatever of them is served: the numbers are stock's."""
    unet = make(lora=False, **options)
    stock, unet = pair(unet)
    assert_same(unet, stock)
    assert rftcore.report(unet).served


@pytest.mark.parametrize(
    "options", [{"mid_block_add_attention": False}, {"use_quant_conv": False, "use_post_quant_conv": False}]
)
def test_autoencoders(options):
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, **options,
    )  # fmt: skip
    report = rftcore.report(rftcore.accelerate(vae))
    assert not report.stock and not report.outside
    assert ("decoder.mid_block.attentions.0" in report.served) == options.get("mid_block_add_attention", True)
