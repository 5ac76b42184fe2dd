"""Hooks, parametrizations, offloading and subclass weights: as often, with the same tensors and effects as stock."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from against_stock import assert_equal, assert_same, assert_served, inputs, make, pair, results, tensors
from checks import relative_error
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook

import rftcore

BLOCKS = [
    "",
    "conv_in",
    "conv_norm_out",
    "conv_act",
    "conv_out",
    "down_blocks.0",
    "down_blocks.0.resnets.0",
    "down_blocks.0.attentions.0",
    "down_blocks.0.attentions.0.transformer_blocks.0",
    "down_blocks.0.downsamplers.0",
    "mid_block",
    "mid_block.resnets.1",
    "mid_block.attentions.0",
    "up_blocks.0",
    "up_blocks.0.resnets.1",
    "up_blocks.0.upsamplers.0",
    "up_blocks.1",
    "up_blocks.1.resnets.0",
    "up_blocks.1.attentions.1",
    "up_blocks.1.attentions.1.transformer_blocks.0",
]

# Blocks that compute something themselves.
LAYERS = {name for name in BLOCKS if "." in name or "conv_in" in name} - {"down_blocks.0", "up_blocks.0", "up_blocks.1"}

_FIRST = "down_blocks.0.attentions.0.transformer_blocks.0"

# An inner module, and the block that then runs its own forward.
INNER = {
    f"{_FIRST}.attn1.to_q": _FIRST,
    f"{_FIRST}.attn1.to_q.lora_A.default": _FIRST,
    f"{_FIRST}.attn1.to_out.1": _FIRST,
    f"{_FIRST}.norm1": _FIRST,
    "up_blocks.1.attentions.0.transformer_blocks.0.attn2": "up_blocks.1.attentions.0.transformer_blocks.0",
    "up_blocks.1.attentions.0.transformer_blocks.0.ff": "up_blocks.1.attentions.0.transformer_blocks.0",
    "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.0": "up_blocks.1.attentions.0.transformer_blocks.0",
    "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2": "up_blocks.1.attentions.0.transformer_blocks.0",
    "up_blocks.1.attentions.0.proj_in": "up_blocks.1.attentions.0",
    "up_blocks.1.attentions.0.norm": "up_blocks.1.attentions.0",
    "mid_block.resnets.0.norm1": "mid_block.resnets.0",
    "mid_block.resnets.0.nonlinearity": "mid_block.resnets.0",
    "mid_block.resnets.0.conv1": "mid_block.resnets.0",
    "mid_block.resnets.0.time_emb_proj": "mid_block.resnets.0",
    "up_blocks.0.resnets.0.conv2": "up_blocks.0.resnets.0",
    "up_blocks.0.resnets.0.dropout": "up_blocks.0.resnets.0",
    "up_blocks.1.resnets.0.conv_shortcut": "up_blocks.1.resnets.0",
    "down_blocks.0.downsamplers.0.conv": "down_blocks.0.downsamplers.0",
    "up_blocks.0.upsamplers.0.conv": "up_blocks.0.upsamplers.0",
}


def watch(module):
    """Registers every kind of hook; returns what they see and a function that removes them."""
    seen = []

    def note(event):
        def hook(_, *values):
            seen.append((event, [t.detach().clone() for t in tensors(list(values))]))

        return hook

    handles = [
        module.register_forward_pre_hook(note("pre"), with_kwargs=True),
        module.register_forward_hook(note("forward"), with_kwargs=True),
        module.register_full_backward_pre_hook(note("backward pre")),
        module.register_full_backward_hook(note("backward")),
    ]
    return seen, lambda: [handle.remove() for handle in handles]


def assert_same_events(ours, stock):
    assert [event for event, _ in ours] == [event for event, _ in stock]
    for (event, mine), (_, expected) in zip(ours, stock, strict=True):
        assert len(mine) == len(expected), event
        for a, b in zip(mine, expected, strict=True):
            assert torch.equal(a, b) or relative_error(a, b) <= 1e-11, event


@pytest.mark.parametrize("name", BLOCKS)
def test_hooks_of_a_block_fire_as_stock(name):
    stock, unet = pair(make())
    expected, _ = watch(stock.get_submodule(name))
    seen, remove = watch(unet.get_submodule(name))
    assert_same(unet, stock)
    assert {event for event, _ in seen} == {"pre", "forward", "backward pre", "backward"}
    assert_same_events(seen, expected)
    remove()
    results(unet)
    assert_served(unet)


def test_a_hook_on_a_transformer_does_not_cost_its_inner_block():
    """The block inside and the ResNet before it are served still."""
    _, unet = pair(make())
    unet.up_blocks[1].attentions[0].register_forward_hook(lambda *_: None)
    results(unet)
    served = rftcore.report(unet).served
    assert {f"up_blocks.1.attentions.0.{n}" for n in ("transformer_blocks.0",)} | {"up_blocks.1.resnets.0"} <= set(
        served
    )


def enlarge(module, arguments, output):
    return output * 1.5


def enlarge_in_place(module, arguments, output):
    output.mul_(1.5)


def enlarge_input(module, arguments):
    return (arguments[0] * 1.5, *arguments[1:])


def enlarge_gradient(module, inner, outer):
    return tuple(g if g is None else g * 1.5 for g in inner)


HOOKS = {
    "forward": lambda module: module.register_forward_hook(enlarge),
    "pre": lambda module: module.register_forward_pre_hook(enlarge_input),
    "backward": lambda module: module.register_full_backward_hook(enlarge_gradient),
}
CASES = [(name, "forward") for name in INNER] + [
    ("mid_block.resnets.0.conv1", "pre"),
    ("mid_block.resnets.0.conv1", "backward"),
    ("up_blocks.1.attentions.0.transformer_blocks.0.ff", "pre"),
    ("up_blocks.1.attentions.0.transformer_blocks.0.attn2", "backward"),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_hook_inside_a_block_has_its_effect(name, kind):
    stock, unet = pair(make())
    plain = results(stock)
    HOOKS[kind](stock.get_submodule(name))
    handle = HOOKS[kind](unet.get_submodule(name))
    changed = results(stock)
    assert not torch.equal(changed["input 0"], plain["input 0"])
    assert_equal(results(unet), changed)
    assert "has hooks" in rftcore.report(unet).stock[INNER[name]]
    handle.remove()
    assert_equal(results(unet), plain)
    assert_served(unet)


@pytest.mark.parametrize(
    "name", ["conv_in", "conv_norm_out", "conv_act", "mid_block.resnets.0", "up_blocks.1.resnets.1"]
)
@pytest.mark.parametrize("hook", [enlarge, enlarge_in_place])
def test_a_hook_on_a_block_has_its_effect(name, hook):
    stock, unet = pair(make())
    for model in (stock, unet):
        model.get_submodule(name).register_forward_hook(hook)
    assert_same(unet, stock)


def test_a_tensor_hook_set_by_a_forward_hook():
    """Of a GroupNorm's output that the SiLU after it would otherwise pass over."""
    stock, unet = pair(make())
    norms = {}
    for label, model in (("stock", stock), ("ours", unet)):
        model.conv_norm_out.register_forward_hook(
            lambda _, args, y, label=label: y.register_hook(lambda grad: norms.update({label: grad.clone()})) and None
        )
    assert_same(unet, stock)
    assert relative_error(norms["ours"], norms["stock"]) <= 1e-11


class _Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize(
    "name",
    [
        "mid_block.resnets.0.conv1",
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
        "down_blocks.0.resnets.0.time_emb_proj",
        "up_blocks.0.upsamplers.0.conv",
        "conv_out",
    ],
)
def test_a_parametrization_runs_stock(name):
    stock, unet = pair(make())
    for model in (stock, unet):
        torch.nn.utils.parametrize.register_parametrization(model.get_submodule(name), "weight", _Doubled())
    assert_same(unet, stock)
    if name != "conv_out":  # which is then no block that we know
        assert "Parametrized" in str(rftcore.report(unet))
    for model in (stock, unet):
        torch.nn.utils.parametrize.remove_parametrizations(model.get_submodule(name), "weight")
    assert_same(unet, stock)
    assert_served(unet)


def test_weight_norm_runs_stock():
    """The old one, by a forward pre-hook, and the new one, by a parametrization."""
    for normalise in (torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm):
        stock, unet = pair(make(lora=False))
        for model in (stock, unet):
            normalise(model.mid_block.resnets[0].conv1)
        assert_same(unet, stock)
        assert "mid_block.resnets.0" in rftcore.report(unet).stock


class _Enlarge(ModelHook):
    def post_forward(self, module, output):
        return 1.5 * output


@pytest.mark.parametrize("hook", [AlignDevicesHook(execution_device="cpu"), _Enlarge()], ids=["align", "enlarge"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "name", ["mid_block.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn1.to_k"]
)
def test_accelerates_hooks_inside_a_block(name, when, hook):
    unet = make()
    if when == "before":
        add_hook_to_module(unet.get_submodule(name), hook)
        stock = copy.deepcopy(unet)
        rftcore.accelerate(unet)
    else:
        stock, unet = pair(unet)
        for model in (stock, unet):
            add_hook_to_module(model.get_submodule(name), hook)
    assert_same(unet, stock)
    assert "has a forward of its own" in str(rftcore.report(unet))
    for model in (stock, unet):
        remove_hook_from_module(model.get_submodule(name))
    assert_same(unet, stock)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["mid_block.resnets.0", "up_blocks.1.attentions.0", "up_blocks.1", "conv_in"])
def test_accelerates_hooks_on_a_block(name, when):
    unet = make()
    stock = copy.deepcopy(unet)
    add_hook_to_module(stock.get_submodule(name), _Enlarge() if name != "up_blocks.1.attentions.0" else ModelHook())
    if when == "after":
        rftcore.accelerate(unet)
    add_hook_to_module(unet.get_submodule(name), _Enlarge() if name != "up_blocks.1.attentions.0" else ModelHook())
    if when == "before":
        rftcore.accelerate(unet)
    assert_same(unet, stock)
    rftcore.restore(unet)
    assert_same(unet, stock)
    for model in (stock, unet):
        remove_hook_from_module(model.get_submodule(name))
    # What the hook had put aside and brings back is not ours either.
    assert "rftcore" not in repr(unet.get_submodule(name).forward)
    assert_same(unet, stock)


def test_cpu_offload():
    """Weights that are there only while their own module runs."""
    unet = make().requires_grad_(False)
    stock, unet = pair(unet)
    expected = results(stock)
    cpu_offload(unet, execution_device="cpu")
    assert any(p.device.type == "meta" for p in unet.parameters())
    with torch.no_grad():
        mine = unet(**inputs(), return_dict=False)[0]
    assert relative_error(mine, expected["output"]) <= 1e-11


class _Subclass(torch.Tensor):
    """Enlarges what a linear layer or a convolution returns."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        output = super().__torch_function__(function, types, args, kwargs or {})
        if function in (nn.functional.linear, torch.conv2d, nn.functional.conv2d):
            return 1.5 * output.as_subclass(torch.Tensor)
        return output


@pytest.mark.parametrize(
    "name",
    ["mid_block.resnets.1.conv2", "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.base_layer", "conv_in"],
)
def test_weights_of_a_subclass_run_stock(name):
    stock, unet = pair(make())
    plain = results(stock)["output"]
    for model in (stock, unet):
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(_Subclass), requires_grad=False)
    assert_same(unet, stock)
    assert not torch.equal(plain, results(stock)["output"])
    assert "is a _Subclass" in str(rftcore.report(unet))


class _Marked(torch.Tensor):
    """Has no operation of its own."""


def test_inputs_of_a_subclass_run_stock():
    stock, unet = pair(make())

    def arguments():
        made = inputs(leaves=())
        return {**made, "sample": made["sample"].as_subclass(_Marked)}

    assert type(unet(**arguments()).sample) is type(stock(**arguments()).sample) is _Marked
    assert_same(unet, stock, arguments, gradients=2)
    report = rftcore.report(unet)
    assert not LAYERS & set(report.served) and "_Marked" in report.stock["up_blocks.1.resnets.0"]


def test_a_subclass_that_a_hook_brings_in_midway():
    stock, unet = pair(make())
    for model in (stock, unet):
        model.up_blocks[1].attentions[0].register_forward_hook(
            lambda _, args, output: (output[0].as_subclass(_Marked),) if isinstance(output, tuple) else output
        )
    assert_same(unet, stock)


def test_global_hooks_run_stock():
    stock, unet = pair(make())
    seen = []
    handle = register_module_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    try:
        expected = results(stock)
        names, seen[:] = list(seen), []
        assert_equal(results(unet), expected)
        assert seen == names and "Conv2d" in names
        report = rftcore.report(unet)
        assert not LAYERS & set(report.served) and "hooks for all modules" in report.stock["up_blocks.1.resnets.0"]
    finally:
        handle.remove()
    results(unet)
    assert_served(unet)


def test_global_backward_hooks_run_stock():
    stock, unet = pair(make())
    seen = []
    handle = register_module_full_backward_hook(lambda module, inner, outer: seen.append(type(module).__name__))
    try:
        expected = results(stock)
        names, seen[:] = list(seen), []
        assert_equal(results(unet), expected)
        assert seen == names and "GroupNorm" in names
    finally:
        handle.remove()
