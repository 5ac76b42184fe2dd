"""Inputs that do not fit each other, and classes that were changed: stock's behaviour, not another one."""

import copy
import subprocess
import sys

import pytest
import torch
from against_stock import assert_equal, assert_same, backward, inputs, make, pair, results
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D

import rftcore


@pytest.mark.parametrize("images, texts", [(4, 1), (2, 4), (4, 2)])
def test_texts_and_images_of_other_numbers_fail_as_stock_does(images, texts):
    for model in pair(make()):
        arguments = inputs(batch=images)
        arguments["encoder_hidden_states"] = torch.randn(texts, 5, 12, dtype=torch.double)
        with pytest.raises(RuntimeError):
            model(**arguments)


def test_one_embedding_for_all_images():
    stock, ours = pair(make())
    x, temb = torch.randn(4, 16, 8, 8, dtype=torch.double), torch.randn(1, 64, dtype=torch.double)
    expected = stock.down_blocks[0].resnets[0](x, temb)
    torch.testing.assert_close(ours.down_blocks[0].resnets[0](x, temb), expected, rtol=1e-11, atol=1e-11)
    assert "temb is (1, 64)" in rftcore.report(ours).stock["down_blocks.0.resnets.0"]


@pytest.mark.parametrize("channels", [12, 15, 64])
def test_an_input_of_other_channels_is_an_error(channels):
    _, ours = pair(make())
    with pytest.raises((ValueError, RuntimeError)):
        ours.conv_norm_out(torch.randn(1, channels, 8, 8, dtype=torch.double))


def test_fp32_residuals_in_a_bf16_stream():
    """ControlNet's, under autocast: no gradient may be read in another dtype than it has."""
    stock, ours = pair(make().float())
    found = []
    for model in (copy.deepcopy(stock).double(), stock, ours):
        exact = model.dtype == torch.float64
        arguments = inputs(dtype=model.dtype)
        generator = torch.Generator().manual_seed(1)
        shapes = [(2, 16, 8, 8), (2, 16, 8, 8), (2, 16, 4, 4), (2, 32, 4, 4)]
        residuals = [torch.randn(shape, generator=generator).to(model.dtype) for shape in shapes]
        middle = torch.randn(2, 32, 4, 4, generator=generator).to(model.dtype)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
            output = model(
                **arguments, down_block_additional_residuals=residuals, mid_block_additional_residual=middle
            ).sample
        backward(output)
        found.append(torch.cat([p.grad.flatten().double() for p in model.parameters() if p.requires_grad]))
    exact, of_stock, of_ours = found
    assert (of_ours - exact).norm() <= 2 * (of_stock - exact).norm()


class _Doubled(BasicTransformerBlock):
    def forward(self, hidden_states, *args, **kwargs):
        return 2 * hidden_states


def test_a_block_that_was_given_another_class():
    """As token merging does."""
    stock, ours = pair(make())
    for model in (stock, ours):
        model.mid_block.attentions[0].transformer_blocks[0].__class__ = _Doubled
    assert_same(ours, stock)
    assert "_Doubled" in str(rftcore.report(ours))


_PATCHED_FIRST = """
import copy, os, sys
sys.path[:0] = {path!r}
import torch, rftcore, rftcore.blocks
from against_stock import assert_equal, make, results
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.upsampling import Upsample2D

for kind in (FeedForward, Attention, Upsample2D):
    if os.fork() == 0:
        original = kind.forward
        kind.forward = lambda self, *args, **kwargs: 1.5 * original(self, *args, **kwargs)
        stock = make()
        unet = rftcore.accelerate(copy.deepcopy(stock))
        assert_equal(results(unet), results(stock))
        sys.exit()
    if os.wait()[1]:
        sys.exit(kind.__name__)
"""


@pytest.mark.slow
def test_a_class_that_was_patched_before_any_call():
    """In processes of their own: here these classes have long been seen."""
    done = subprocess.run([sys.executable, "-c", _PATCHED_FIRST.format(path=sys.path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_who_looks_at_the_norms_output_sees_it():
    def double(y):
        y.mul_(2)

    def triple_gradient(y):
        y.register_hook(lambda gradient: 3 * gradient)

    for look in (double, triple_gradient, torch.Tensor.retain_grad):
        stock, ours = pair(make())
        for model in (stock, ours):
            model.conv_act.register_forward_pre_hook(lambda module, args, look=look: look(args[0]))
        assert_same(ours, stock)


def test_a_hook_in_the_place_of_dropout():
    stock, ours = pair(make())
    for model in (stock, ours):
        layer = model.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
        layer.lora_dropout["default"].register_forward_hook(lambda module, args, output: 2 * output)
    assert_same(ours, stock)


def test_a_shallow_copy_of_a_block_that_is_gone_says_so():
    block = rftcore.accelerate(make()).mid_block.resnets[0]
    shallow = copy.copy(block)
    del block
    with pytest.raises(RuntimeError, match="copy.deepcopy"):
        shallow(torch.randn(1, 32, 4, 4).double(), torch.randn(1, 64).double())


def test_data_parallel_is_refused():
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        rftcore.accelerate(torch.nn.DataParallel(make()))


@pytest.mark.parametrize(
    "kind, method",
    [
        (ResnetBlock2D, "forward"),
        (BasicTransformerBlock, "forward"),
        (AttnProcessor2_0, "__call__"),
        (torch.nn.Conv2d, "forward"),
    ],
)
def test_a_class_that_was_patched(kind, method, monkeypatch):
    stock, ours = pair(make())
    original = getattr(kind, method)

    def patched(self, *args, **kwargs):
        return 1.5 * original(self, *args, **kwargs)

    before = results(stock)
    monkeypatch.setattr(kind, method, patched)
    expected = results(stock)
    assert not torch.allclose(expected["output"], before["output"])
    assert_equal(results(ours), expected)
    monkeypatch.undo()
    assert_equal(results(ours), before)


def test_a_convolution_that_was_made_to_wrap_round():
    """As seamless tiling does."""
    stock, ours = pair(make())
    for model in (stock, ours):
        convolution = model.mid_block.resnets[0].conv1
        convolution._conv_forward = lambda x, weight, bias: torch.nn.functional.conv2d(
            torch.nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias
        )
    assert_same(ours, stock)
