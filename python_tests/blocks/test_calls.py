"""All that a UNet's call may hold: residuals, labels, masks, sizes, layouts; and what diffusers switches on a model."""

import copy

import pytest
import torch
from against_stock import assert_equal, assert_same, assert_served, inputs, make, pair, results, tensors, weights
from checks import relative_error
from diffusers.models.attention_processor import AttnProcessor
from models import UNETS

import rftcore


def with_extra(kind="sd1", **extra):
    """A call's arguments, with further ones made by functions of a generator."""

    def arguments():
        made = inputs(kind)
        generator = torch.Generator().manual_seed(9)
        return made | {name: make_extra(generator) for name, make_extra in extra.items()}

    return arguments


def randn(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


# Of the outputs of conv_in and of every layer and downsampler on the way down.
SKIPS = [(2, 16, 8, 8), (2, 16, 8, 8), (2, 16, 4, 4), (2, 32, 4, 4)]


def test_controlnet_residuals():
    stock, unet = pair(make())
    arguments = with_extra(
        down_block_additional_residuals=lambda g: tuple(randn(g, *shape) for shape in SKIPS),
        mid_block_additional_residual=lambda g: randn(g, 2, 32, 4, 4),
    )
    assert all(gradient is not None for gradient in list(results(stock, arguments()).values())[1:8])
    assert_same(unet, stock, arguments)
    assert_served(unet)


def test_t2i_adapter_residuals():
    """Added in place to a block's output."""
    stock, unet = pair(make())
    arguments = with_extra(
        down_intrablock_additional_residuals=lambda g: [randn(g, 2, 16, 8, 8).detach(), randn(g, 2, 32, 4, 4).detach()]
    )
    assert_same(unet, stock, arguments)
    assert_served(unet)


@pytest.mark.parametrize(
    "options", [{"num_class_embeds": 5}, {"class_embed_type": "timestep"}], ids=["labels", "times"]
)
def test_class_labels(options):
    stock, unet = pair(make(lora=False, **options))
    assert_same(unet, stock, with_extra(class_labels=lambda g: torch.tensor([3, 1])))
    assert_served(unet)


# What diffusers masks at all: an attention mask is for one resolution, that of the middle.
ONE_RESOLUTION = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
MASKS = {
    "encoder_attention_mask": lambda g: torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 1, 1]]).bool(),
    "attention_mask": lambda g: (torch.rand(2, 16, generator=g) > 0.3).double(),
}


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("names", [["encoder_attention_mask"], ["attention_mask"], list(MASKS)], ids="+".join)
def test_masks_run_stock(names, kind):
    stock, unet = pair(make(kind, **ONE_RESOLUTION))
    plain = results(stock, inputs(kind))
    arguments = with_extra(kind, **{name: MASKS[name] for name in names})
    assert_same(unet, stock, arguments)
    assert relative_error(results(stock, arguments())["output"], plain["output"]) > 1e-6
    report = rftcore.report(unet)
    assert {name for name, reason in report.stock.items() if "attention mask" in reason} >= {
        "down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.0.attentions.1",
    }  # fmt: skip
    assert "up_blocks.0.resnets.1" in report.served
    assert_equal(results(unet, inputs(kind)), plain)
    assert_served(unet)


def test_unknown_cross_attention_kwargs_are_named():
    stock, unet = pair(make())
    arguments = with_extra(cross_attention_kwargs=lambda g: {"unheard_of": 1})
    assert_same(unet, stock, arguments)
    assert "unheard_of" in rftcore.report(unet).stock["mid_block.attentions.0"]


def test_freeu():
    stock, unet = pair(make())
    plain = results(stock)["output"]
    for model in (stock, unet):
        model.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    assert_same(unet, stock)
    assert relative_error(results(stock)["output"], plain) > 1e-6
    report = rftcore.report(unet)
    assert "FreeU" in report.stock["up_blocks.0"] and "FreeU" in report.stock["up_blocks.1"]
    assert "up_blocks.1.resnets.0" in report.served
    for model in (stock, unet):
        model.disable_freeu()
    assert_same(unet, stock)
    assert_served(unet)
    assert relative_error(results(unet)["output"], plain) <= 1e-11


@pytest.mark.parametrize("kind", ["sd1", "sd2", "unconditional"])
def test_gradient_checkpointing(kind):
    stock, unet = pair(make(kind, lora=False))
    expected = results(stock, inputs(kind))
    stock.train(), unet.train()
    unet.enable_gradient_checkpointing()
    assert_equal(results(unet, inputs(kind)), expected)
    report = rftcore.report(unet)
    assert "gradient checkpointing" in report.stock["up_blocks.0"]
    assert "up_blocks.0.resnets.0" in report.served
    with torch.no_grad():
        unet(**inputs(kind))
    unet.disable_gradient_checkpointing()
    assert_equal(results(unet, inputs(kind)), expected)
    assert_served(unet)


def chunk(unet, size, dim):
    for module in unet.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(size, dim)


# How to switch it on and off, and why a block is not served then, if it is not.
PROCESSORS = {
    "attention slice": (
        lambda u: u.set_attention_slice(1),
        lambda u: u.set_default_attn_processor(),
        "SlicedAttnProcessor",
    ),
    "slice size": (
        lambda u: u.set_attention_slice("max"),
        lambda u: u.set_default_attn_processor(),
        "SlicedAttnProcessor",
    ),
    "AttnProcessor": (lambda u: u.set_attn_processor(AttnProcessor()), lambda u: u.set_default_attn_processor(), None),
    "default": (lambda u: u.set_default_attn_processor(), lambda u: None, None),
    "chunked": (lambda u: chunk(u, 1, 1), lambda u: chunk(u, None, 0), "chunked feed-forward"),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", PROCESSORS)
def test_processors(name, when):
    switch, switch_back, reason = PROCESSORS[name]
    unet = make("sd2")
    stock = copy.deepcopy(unet)
    if when == "after":
        rftcore.accelerate(unet)
    switch(stock), switch(unet)
    if when == "before":
        rftcore.accelerate(unet)
    assert_same(unet, stock, lambda: inputs("sd2"))
    if reason is None:
        assert_served(unet)
    else:
        assert reason in rftcore.report(unet).stock["mid_block.attentions.0"]
    switch_back(stock), switch_back(unet)
    assert_same(unet, stock, lambda: inputs("sd2"))
    assert_served(unet)


def test_fused_projections():
    """diffusers keeps the fused weights when it goes back."""
    stock, unet = pair(make("sd2", lora=False))
    stock.fuse_qkv_projections(), unet.fuse_qkv_projections()
    assert_same(unet, stock, lambda: inputs("sd2"))
    assert "processor is a Fused" in rftcore.report(unet).stock["mid_block.attentions.0"]
    stock.unfuse_qkv_projections(), unet.unfuse_qkv_projections()
    assert_same(unet, stock, lambda: inputs("sd2"))


@pytest.mark.parametrize("kind", UNETS)
@pytest.mark.parametrize(("batch", "size"), [(1, (9, 7)), (3, (2, 6))])
def test_batches_and_odd_sizes(kind, batch, size):
    if kind == "unconditional":
        size = tuple(2 * (s // 2) for s in size)  # it has no way to upsample to another size
    stock, unet = pair(make(kind))
    assert_same(unet, stock, lambda: inputs(kind, batch, size))
    assert_served(unet)


@pytest.mark.parametrize("kind", UNETS)
def test_channels_last(kind):
    stock, unet = pair(make(kind, lora=False))
    stock.to(memory_format=torch.channels_last), unet.to(memory_format=torch.channels_last)

    def arguments():
        made = inputs(kind, leaves=())
        made["sample"] = made["sample"].contiguous(memory_format=torch.channels_last)
        return {name: t.requires_grad_() if name == "sample" else t for name, t in made.items()}

    assert_same(unet, stock, arguments)
    assert_served(unet)
    with torch.no_grad():
        mine, theirs = unet(**arguments()).sample, stock(**arguments()).sample
    assert mine.stride() == theirs.stride()


def strided(tensor):
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), torch.nan, dtype=tensor.dtype)
    wide[..., 1::2] = tensor
    return wide[..., 1::2]


LAYOUTS = {
    "strided": strided,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda t: t[:1].expand(t.shape),
    "expanded along a row": lambda t: t[..., :1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["sd1", "unconditional"])
def test_inputs_that_are_not_contiguous(kind, layout):
    stock, unet = pair(make(kind))

    def arguments():
        made = inputs(kind, leaves=())
        for name in ("sample", "encoder_hidden_states"):
            if name in made:
                made[name] = LAYOUTS[layout](made[name]).detach().requires_grad_()
        return made

    assert_same(unet, stock, arguments)
    assert_served(unet)


GRADIENTS = {
    "sum": lambda output: output.sum().backward(),
    "expanded": lambda output: output.backward(weights(output)[:1].expand(output.shape)),
    "transposed": lambda output: output.backward(LAYOUTS["transposed"](weights(output))),
    "channels_last": lambda output: output.backward(weights(output).contiguous(memory_format=torch.channels_last)),
    "one pixel": lambda output: output[0, 0, 0, 0].backward(),
}


@pytest.mark.parametrize("layout", GRADIENTS)
@pytest.mark.parametrize("kind", ["sd1", "unconditional"])
def test_gradients_that_are_not_contiguous(kind, layout):
    stock, unet = pair(make(kind))
    expected = results(stock, inputs(kind), GRADIENTS[layout])
    assert_equal(results(unet, inputs(kind), GRADIENTS[layout]), expected)


def test_tuple_or_dict():
    stock, unet = pair(make())
    for return_dict in (True, False):
        mine, theirs = (model(**inputs(), return_dict=return_dict) for model in (unet, stock))
        assert type(mine) is type(theirs) and len(mine) == len(theirs) == 1
        assert relative_error(mine[0], theirs[0]) <= 1e-11


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("mid_block.resnets.0", lambda: [torch.randn(2, 32, 4, 4), torch.randn(2, 64)]),
        ("mid_block.attentions.0", lambda: [torch.randn(2, 32, 4, 4), torch.randn(2, 5, 12)]),
        ("down_blocks.0.downsamplers.0", lambda: [torch.randn(2, 16, 7, 5)]),
        ("up_blocks.0.upsamplers.0", lambda: [torch.randn(2, 32, 3, 5), (5, 9)]),
        ("conv_in", lambda: [torch.randn(2, 4, 5, 3)]),
        ("conv_norm_out", lambda: [torch.randn(2, 16, 5, 3)]),
        ("conv_act", lambda: [torch.randn(2, 16, 5, 3)]),
    ],
)
def test_a_block_called_by_itself(name, arguments):
    """Positionally, and on inputs that no UNet would give it."""
    stock, unet = pair(make(lora=False).float().double())
    called = [a.double().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments()]
    outputs = []
    for model in (stock, unet):
        block = model.get_submodule(name)
        output = tensors(block(*called, **({"return_dict": False} if "attentions" in name else {})))[0]
        leaves = [*tensors(called), *block.parameters()]
        outputs.append([output, *torch.autograd.grad(output, leaves, weights(output))])
    assert max(map(relative_error, *outputs)) <= 1e-11


def test_a_transformer_blocks_own_arguments():
    stock, unet = pair(make(lora=False))
    hidden_states = torch.randn(2, 6, 32, dtype=torch.float64, requires_grad=True)
    text = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    found = []
    for model in (stock, unet):
        block = model.mid_block.attentions[0].transformer_blocks[0]
        output = block(hidden_states, None, text)
        leaves = [hidden_states, text, *block.parameters()]
        found.append([output, *torch.autograd.grad(output, leaves, weights(output))])
    assert max(map(relative_error, *found)) <= 1e-11


@pytest.mark.parametrize("kind", ["sd1", "sdxl", "unconditional"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_those_of_a_forward_without_a_graph(kind, dtype):
    """What a sample is drawn by, and what it is scored again by."""
    _, ours = pair(make(kind).to(dtype))
    call = inputs(kind, dtype=dtype, leaves=())
    with torch.no_grad():
        sampled = ours(**call).sample
    with torch.inference_mode():
        inferred = ours(**call).sample
    scored = ours(**call).sample
    assert scored.requires_grad and torch.equal(sampled, scored) and torch.equal(inferred, scored)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_who_changes_the_last_norms_output_without_a_graph_is_heard(mode):
    def double(module, args, y):
        y.mul_(2)

    stock, ours = pair(make())
    for model in (stock, ours):
        model.conv_norm_out.register_forward_hook(double)
    with mode():
        mine, theirs = ours(**inputs(leaves=())).sample, stock(**inputs(leaves=())).sample
    assert relative_error(mine, theirs) < 1e-11
