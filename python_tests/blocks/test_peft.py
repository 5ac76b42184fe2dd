"""Adapters of every kind that PEFT puts on a UNet: plain LoRA is served, the others run stock and are named."""

import copy
from contextlib import nullcontext

import pytest
import torch
from against_stock import (
    assert_equal,
    assert_same,
    assert_served,
    backward,
    inputs,
    make,
    pair,
    randomise_adapters,
    results,
)
from checks import relative_error
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.training_utils import cast_training_params
from models import UNETS
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.checkpoint import checkpoint

import rftcore

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]
PROJECTIONS = ["proj_in", "proj_out"]
RESNETS = ["conv1", "conv2", "conv_shortcut", "time_emb_proj"]
ENDS = ["conv_in", "conv_out", "downsamplers.0.conv", "upsamplers.0.conv"]
EVERYTHING = ATTENTION + FEED_FORWARD + PROJECTIONS + RESNETS + ENDS


def plain(kind="sd1", **options):
    return make(kind, lora=False, **options).requires_grad_(False)


def adapt(unet, targets=ATTENTION, name="default", r=2, alpha=3, **options):
    """Adds an adapter whose A and B are both random, in the UNet's dtype."""
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, **options)
    if hasattr(unet, "add_adapter"):
        unet.add_adapter(config, name)
    else:
        inject_adapter_in_model(config, unet, name)
    return randomise_adapters(unet.to(unet.dtype))


def layers(unet):
    return [layer for layer in unet.modules() if isinstance(layer, BaseTunerLayer)]


TARGETS = {
    "attention": ATTENTION,
    "feed-forward": FEED_FORWARD,
    "projections": PROJECTIONS,
    "resnets": RESNETS,
    "ends": ENDS,
    "everything": EVERYTHING,
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("targets", "kind"), [*((targets, "sd1") for targets in TARGETS), ("projections", "sd2"), ("everything", "sd2")]
)
def test_adapters(targets, kind, when):
    unet = plain(kind)
    if when == "after":
        rftcore.accelerate(unet)
        results(unet, inputs(kind))
    adapt(unet, TARGETS[targets])
    stock = rftcore.restore(copy.deepcopy(unet))
    rftcore.accelerate(unet) if when == "before" else None
    assert_same(unet, stock, lambda: inputs(kind))
    report = rftcore.report(unet)
    assert set(report.stock) <= ({"conv_in", "conv_out"} if when == "after" else set()), str(report)
    rftcore.accelerate(unet)
    assert_same(unet, stock, lambda: inputs(kind))
    assert_served(unet)
    rftcore.restore(unet)
    assert not [name for name, module in unet.named_modules() if "forward" in module.__dict__]


@pytest.mark.parametrize("level", ["ff", "qkv", "block"])
def test_adapters_of_all_layers_at_every_level(level):
    stock, unet = pair(adapt(plain("sdxl"), EVERYTHING), recompute=level)
    assert_same(unet, stock, lambda: inputs("sdxl"))
    assert_served(unet)


@pytest.mark.parametrize(
    "options",
    [{"use_rslora": True}, {"r": 5, "alpha": 1}, {"rank_pattern": {"to_k": 3}, "alpha_pattern": {"to_v": 7}}],
    ids=["rslora", "alpha", "patterns"],
)
def test_scalings(options):
    stock, unet = pair(adapt(plain(), **options))
    assert_same(unet, stock)
    assert_served(unet)


def two_adapters(kind="sd1"):
    unet = adapt(adapt(plain(kind), ATTENTION + ["conv1"]), [*ATTENTION, "ff.net.2"], "second", r=3, alpha=1)
    unet.set_adapters(["default", "second"], [0.7, 1.3])
    return unet


def test_two_adapters_at_once():
    stock, unet = pair(two_adapters())
    both = results(stock)["output"]
    assert_same(unet, stock)
    assert_served(unet)
    for names, scales in ((["second"], [1.0]), (["default"], [-0.5]), (["default", "second"], [0.0, 1.0])):
        for model in (stock, unet):
            model.set_adapters(names, scales)
        assert_same(unet, stock)
        assert not torch.equal(results(stock)["output"], both)
    for model in (stock, unet):
        for layer in layers(model):
            layer.set_adapter(["default", "second"])
    assert_same(unet, stock)
    assert_served(unet)


def test_an_adapter_is_added_and_deleted():
    stock, unet = pair(adapt(plain()))
    results(unet)
    for model in (stock, unet):
        adapt(model, [*ATTENTION, "conv2"], "second", r=3)
        model.set_adapters(["default", "second"])
    assert_same(unet, stock)
    for model in (stock, unet):
        model.delete_adapters("default")
    assert_same(unet, stock)
    for model in (stock, unet):
        model.unload_lora()
    assert_same(unet, stock, gradients=2)
    assert_served(unet)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_scale_for_one_call(kind):
    """The UNet has gone back to the adapters' own scale when the backward runs."""
    stock, unet = pair(adapt(plain(kind), EVERYTHING))
    own = results(stock, inputs(kind))

    def arguments():
        return inputs(kind) | {"cross_attention_kwargs": {"scale": 0.3}}

    assert_same(unet, stock, arguments)
    assert_served(unet)
    assert relative_error(results(stock, arguments())["output"], own["output"]) > 1e-3
    assert_equal(results(unet, inputs(kind)), own)


def test_the_scale_of_a_graph_is_its_forwards():
    stock, unet = pair(adapt(plain()))

    def rescale_then_backward(model):
        def differentiate(output):
            model.set_adapters("default", 0.1)
            backward(output)
            model.set_adapters("default", 1.0)

        return differentiate

    expected = results(stock)
    assert_equal(results(unet, differentiate=rescale_then_backward(unet)), expected)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_disabled_adapters(recompute):
    stock, unet = pair(two_adapters(), recompute=recompute)
    own = results(stock)
    for model in (stock, unet):
        model.disable_adapters()
    assert_same(unet, stock, gradients=2)
    assert_served(unet)
    assert relative_error(results(stock)["output"], own["output"]) > 1e-3
    for model in (stock, unet):
        model.enable_adapters()
    assert_same(unet, stock)
    for model in (stock, unet):
        model.disable_lora()
    assert_same(unet, stock, gradients=2)
    for model in (stock, unet):
        model.enable_lora()
    assert_same(unet, stock)


def test_merged_and_unmerged():
    stock, unet = pair(adapt(plain(), EVERYTHING))
    for model in (stock, unet):
        model.fuse_lora(lora_scale=0.8)
    assert_same(unet, stock, gradients=2)
    assert_served(unet)
    assert all(mine.merged for mine in layers(unet))
    for model in (stock, unet):
        model.unfuse_lora()
    assert_same(unet, stock)
    for model in (stock, unet):
        for layer in layers(model):
            layer.merge()
    assert_same(unet, stock, gradients=2)
    assert_served(unet)


def test_merged_and_disabled():
    """PEFT then unmerges in the forward."""
    stock, unet = pair(adapt(plain()))
    for model in (stock, unet):
        for layer in layers(model):
            layer.merge()
            layer._disable_adapters = True
    assert "PEFT's forward unmerges them" in rftcore.report(unet).stock["mid_block.attentions.0"]
    assert_same(unet, stock, gradients=2)
    assert not any(layer.merged for layer in layers(unet))
    assert_same(unet, stock, gradients=2)
    assert_served(unet)


@pytest.mark.covering(1)
@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING], ids=["attention", "everything"])
@pytest.mark.parametrize(("p", "recompute"), [(0.0, "none"), (0.4, "none"), (0.4, "block")])
def test_dropout(p, recompute, targets):
    """From the same state of the generator: the same masks, and the same state afterwards."""
    unet = adapt(adapt(plain(), targets, lora_dropout=p), ["to_q", "conv1"], "second", r=3, lora_dropout=p / 2)
    unet.set_adapters(["default", "second"])
    stock, unet = pair(unet.train(), recompute=recompute)

    def seeded(model):
        torch.manual_seed(5)
        return results(model)

    expected = seeded(stock)
    after = torch.get_rng_state()
    assert_equal(seeded(unet), expected)
    assert torch.equal(torch.get_rng_state(), after)
    assert_served(unet)
    if p:
        assert relative_error(results(stock)["output"], expected["output"]) > 1e-3
        stock.eval(), unet.eval()
        assert_same(unet, stock)


@pytest.mark.parametrize(
    ("kind", "targets"), [("sd2", ["proj_in"]), ("sdxl", ["proj_in", "to_q", "conv1"]), ("unconditional", ["conv1"])]
)
def test_dropout_in_front_of_what_is_a_view(kind, targets):
    """Masks are drawn in the order of memory, and tokens of an image may be a view of it."""
    stock, unet = pair(adapt(plain(kind), targets, lora_dropout=0.3).train())
    expected, found = [], []
    for model, into in ((stock, expected), (unet, found)):
        torch.manual_seed(5)
        into.append(results(model, inputs(kind)))
    assert_equal(found[0], expected[0])
    assert_served(unet)


def test_dropout_under_a_checkpoint():
    """Which draws the masks twice itself."""
    stock, unet = pair(adapt(plain(), EVERYTHING, lora_dropout=0.4).train(), recompute="block")
    torch.manual_seed(5)
    expected = results(stock)
    for reentrant in (False, True):
        torch.manual_seed(5)
        given = inputs()
        for parameter in unet.parameters():
            parameter.grad = None
        output = checkpoint(lambda x, text: unet(x, inputs()["timestep"], text).sample, given["sample"],
                            given["encoder_hidden_states"], use_reentrant=reentrant)  # fmt: skip
        torch.manual_seed(99)
        backward(output)
        found = [
            output,
            given["sample"].grad,
            given["encoder_hidden_states"].grad,
            *(p.grad for p in unet.parameters()),
        ]
        assert_equal(dict(zip(expected, found, strict=True)), expected)


def test_dropout_of_the_unets_own():
    stock, unet = pair(make(lora=False, dropout=0.3).train())

    def seeded(model):
        torch.manual_seed(5)
        return results(model)

    assert_equal(seeded(unet), seeded(stock))
    assert "dropout p=0.3 is active" in rftcore.report(unet).stock["mid_block.resnets.0"]
    stock.eval(), unet.eval()
    assert_same(unet, stock)
    assert_served(unet)


KINDS = {
    "DoRA": (LoraConfig(r=2, lora_alpha=3, target_modules=[*ATTENTION, "conv1"], use_dora=True), "is not plain LoRA"),
    "lora_bias": (LoraConfig(r=2, lora_alpha=3, target_modules=ATTENTION, lora_bias=True), "has lora_bias"),
    "LoHa": (LoHaConfig(r=2, alpha=3, target_modules=[*ATTENTION, "conv1"]), "not LoRA's"),
    "LoKr": (LoKrConfig(r=2, alpha=3, target_modules=[*ATTENTION, "conv1"]), "not LoRA's"),
    "IA3": (IA3Config(target_modules=["to_k", "to_v", "ff.net.2"], feedforward_modules=["ff.net.2"]), "not LoRA's"),
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", KINDS)
def test_adapters_of_other_kinds_run_stock(name, when):
    config, reason = KINDS[name]
    unet = plain()
    rftcore.accelerate(unet) if when == "after" else None
    inject_adapter_in_model(copy.deepcopy(config), unet)
    randomise_adapters(unet.to(torch.float64))
    if name == "IA3":
        for key, parameter in unet.named_parameters():
            if "ia3_l" in key:
                torch.nn.init.normal_(parameter, 1.0, 0.3)
    stock = rftcore.restore(copy.deepcopy(unet))
    rftcore.accelerate(unet) if when == "before" else None
    assert_same(unet, stock)
    report = rftcore.report(unet)
    assert reason in report.stock["mid_block.attentions.0"]
    assert "conv_out" in report.served


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING], ids=["attention", "everything"])
def test_fp32_adapters_on_a_bf16_base(targets, autocast):
    """Output and gradients are at most twice as far from fp64 as stock's are.

    The adapters' together: how roundings fall out for one small matrix is chance, by a factor of 6 either way.
    """
    exact = adapt(plain(), targets)
    unet = copy.deepcopy(exact).to(torch.bfloat16)
    for (name, parameter), source in zip(unet.named_parameters(), exact.parameters(), strict=True):
        source.data = source.data.to(torch.bfloat16 if "lora" not in name else torch.float32).double()
        parameter.data.copy_(source.data)
    cast_training_params(unet)
    for parameter, source in zip(unet.parameters(), exact.parameters(), strict=True):
        if parameter.requires_grad:
            parameter.data = source.data.float()
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16, torch.float32}
    stock, unet = pair(unet)
    arguments = inputs(dtype=torch.bfloat16)
    wide = {k: v.detach().double().requires_grad_() if v.is_floating_point() else v for k, v in arguments.items()}

    def measured(model, given, lower=autocast):
        def differentiate(output):  # outside of autocast
            output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output))

        context = torch.autocast("cpu", torch.bfloat16) if lower else nullcontext()
        for leaf in (*model.parameters(), *(t for t in given.values() if t.requires_grad)):
            leaf.grad = None
        with context:
            output = model(**given).sample
        differentiate(output)
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        return [output.detach(), *(t.grad for t in given.values() if t.requires_grad), *gradients]

    truth = measured(exact, wide, lower=False)
    theirs, ours = measured(stock, arguments), measured(unet, arguments)
    assert [t.dtype for t in ours] == [t.dtype for t in theirs]
    mine, yardstick = (torch.tensor(list(map(relative_error, found, truth))) for found in (ours, theirs))
    for of in (slice(0, 1), slice(1, 3), slice(3, None)):  # the output, the inputs' gradients, the adapters'
        assert mine[of].square().mean().sqrt() <= 2 * yardstick[of].square().mean().sqrt() + 1e-6
    assert_served(unet)


@pytest.mark.parametrize("kind", UNETS)
def test_full_fine_tuning(kind):
    stock, unet = pair(make(kind, lora=False))
    found = results(unet, inputs(kind))
    assert all(gradient is not None for gradient in found.values())
    assert_equal(found, results(stock, inputs(kind)))
    assert_served(unet)


PARTS = {
    "norms": lambda name: "norm" in name,
    "biases": lambda name: name.endswith("bias"),
    "one convolution": lambda name: name == "mid_block.resnets.0.conv2.weight",
    "one shortcut's bias": lambda name: name == "up_blocks.1.resnets.0.conv_shortcut.bias",
    "queries": lambda name: "to_q.weight" in name,
    "keys of text": lambda name: "attn2.to_k.weight" in name,
    "time embedding": lambda name: "time_emb" in name,
    "ends": lambda name: name.startswith(("conv_in", "conv_out", "conv_norm_out")),
    "up-blocks": lambda name: name.startswith("up_blocks"),
}


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_parts_are_trained_and_others_later(recompute):
    """What requires a gradient is looked at on every call."""
    stock, unet = pair(plain(), recompute=recompute)
    for part, chosen in PARTS.items():
        for model in (stock, unet):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(chosen(name))
        expected = results(stock, inputs(leaves=()))
        assert sum(g is not None for g in expected.values()) == 1 + sum(chosen(n) for n, _ in stock.named_parameters())
        try:
            assert_equal(results(unet, inputs(leaves=())), expected)
        except AssertionError as error:
            raise AssertionError(part) from error
        assert_equal(results(unet), results(stock))
    assert_served(unet)


@pytest.mark.parametrize("leaves", [["sample"], ["encoder_hidden_states"], ["sample", "encoder_hidden_states"]])
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_inputs_are_trained(kind, leaves):
    """Text alone, as in textual inversion and prompt tuning."""
    stock, unet = pair(plain(kind))
    assert_same(unet, stock, lambda: inputs(kind, leaves=leaves), gradients=len(leaves))
    assert_served(unet)


def pipeline(unet):
    parts = dict.fromkeys(["vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    return StableDiffusionPipeline(**parts, unet=unet, scheduler=DDIMScheduler(), requires_safety_checker=False)


def test_adapters_are_saved_and_loaded(tmp_path):
    """Accelerated or not, on either side."""
    stock, unet = pair(adapt(plain(), ATTENTION + ["conv1"]))
    expected = results(stock)["output"]
    state = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(stock).items()}
    mine = get_peft_model_state_dict(unet)
    assert list(mine) == list(state) and all(torch.equal(mine[name], state[name]) for name in state)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=mine)

    other = rftcore.accelerate(copy.deepcopy(stock).double())
    other.delete_adapters("default")
    other.unload_lora()
    loaded = pipeline(other)
    loaded.load_lora_weights(tmp_path)
    loaded.unet.double()
    # A file in diffusers' layout has no lora_alpha.
    for layer in layers(loaded.unet):
        layer.set_scale("default_0", 1.5)
    assert relative_error(results(loaded.unet)["output"], expected) <= 1e-7
    rftcore.accelerate(loaded.unet)
    assert relative_error(results(loaded.unet)["output"], expected) <= 1e-7
    assert_served(loaded.unet)
    loaded.unload_lora_weights()
    assert_same(loaded.unet, plain_of(stock), gradients=2)

    fresh = rftcore.accelerate(adapt(plain_of(stock), ATTENTION + ["conv1"]))
    for parameter in fresh.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    set_peft_model_state_dict(fresh, state)
    assert_same(fresh, stock)


def plain_of(adapted):
    other = copy.deepcopy(adapted)
    other.unload_lora()
    return other


@pytest.mark.parametrize("when", ["before", "after"])
def test_get_peft_model(when):
    unet = plain()
    rftcore.accelerate(unet) if when == "after" else None
    config = LoraConfig(r=2, lora_alpha=3, target_modules=ATTENTION + ["conv2"])
    wrapped = get_peft_model(unet, config)
    randomise_adapters(wrapped.double())
    stock = rftcore.restore(copy.deepcopy(wrapped))
    assert rftcore.accelerate(wrapped) is wrapped if when == "before" else True
    assert_same(wrapped, stock)
    assert_served(wrapped)
    with wrapped.disable_adapter(), stock.disable_adapter():
        assert_same(wrapped, stock, gradients=2)
    merged, expected = copy.deepcopy(wrapped).merge_and_unload(), copy.deepcopy(stock).merge_and_unload()
    assert_same(merged, expected, gradients=2)
    rftcore.restore(wrapped)
    assert not [name for name, module in wrapped.named_modules() if "forward" in module.__dict__]


def test_unconditional_unets_are_adapted_too():
    unet = plain("unconditional")
    adapt(unet, ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_in"])
    stock, unet = pair(unet)
    assert_same(unet, stock, lambda: inputs("unconditional"))
    assert_served(unet)
