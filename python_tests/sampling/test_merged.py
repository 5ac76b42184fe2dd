"""Adapters merged for the length of a chain: the same model, and the same module afterwards."""

import copy
from contextlib import nullcontext

import pytest
import torch
from checks import relative_error
from diffusers import DDIMScheduler
from models import UNETS, add_lora, randomise_norms
from peft import IA3Config, LoHaConfig, LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer

import rftcore
from rftcore.sampling.denoiser import Denoiser
from rftcore.sampling.merged import merged, merged_bytes, merged_weights

CLIP_RANGE = 1e-4  # DDPO's
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYTHING = [
    *(*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2", "conv_shortcut"),
    *("time_emb_proj", "conv_in", "conv_out", "downsamplers.0.conv", "upsamplers.0.conv"),
]


def adapt(unet, targets=ATTENTION, name="default", r=2, alpha=3, **options):
    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, **options)
    if hasattr(unet, "add_adapter"):
        unet.add_adapter(config, name)
    else:
        inject_adapter_in_model(config, unet, name)
    for key, parameter in unet.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, std=0.2)
    return unet.eval()


def plain(kind="sd1", dtype=torch.float64):
    return randomise_norms(UNETS[kind]()).to(dtype).eval().requires_grad_(False)


def layers(unet):
    return [layer for layer in unet.modules() if isinstance(layer, BaseTunerLayer)]


def call(unet, kind="sd1", dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    if kind != "unconditional":
        options["encoder_hidden_states"] = randn(2, 5, 12)
    if kind == "sdxl":
        options["added_cond_kwargs"] = {"text_embeds": randn(2, 10), "time_ids": randn(2, 6)}
    return unet(randn(2, 4, 8, 8), torch.tensor([21, 801]), **options, return_dict=False)[0]


def snapshot(unet):
    """Everything that merging touches: the tensors themselves, their bits and versions, and the switches."""
    tensors = {name: (id(p), p._version, p.clone()) for name, p in unet.named_parameters()}
    switches = [(id(x), x._disable_adapters, list(x.merged_adapters), dict(x.scaling)) for x in layers(unet)]
    return tensors, switches, [name for name, p in unet.named_parameters() if p.requires_grad]


def assert_untouched(unet, before):
    tensors, switches, trainable = snapshot(unet)
    assert switches == before[1] and trainable == before[2] and tensors.keys() == before[0].keys()
    for name, (identity, version, value) in tensors.items():
        assert (identity, version) == before[0][name][:2] and torch.equal(value, before[0][name][2])


@torch.no_grad()
def assert_same(unet, kind="sd1", **options):
    """Merged = unmerged, by both ways of using it, and nothing is left of it."""
    before, expected = snapshot(unet), call(unet, kind)
    with merged(unet, **options) as weights:
        assert relative_error(call(unet, kind), expected) <= 1e-12
        assert all(unet.get_submodule(name.removesuffix(".base_layer.weight")).disable_adapters for name in weights)
        stand_ins = {name: weight.clone() for name, weight in weights.items()}
    assert_untouched(unet, before)
    assert torch.equal(call(unet, kind), expected)
    found = merged_weights(unet, **options)
    assert found.keys() == stand_ins.keys() and all(torch.equal(found[name], w) for name, w in stand_ins.items())
    return stand_ins


@pytest.mark.parametrize("accelerated", [False, True], ids=["stock", "accelerated"])
@pytest.mark.parametrize("kind", UNETS)
def test_the_same_model(kind, accelerated):
    unet = adapt(plain(kind), EVERYTHING)
    if accelerated:
        rftcore.accelerate(unet)
    weights = assert_same(unet, kind)
    assert len(weights) == len(layers(unet))
    if accelerated:
        assert not rftcore.report(unet).stock


def test_accelerated_before_it_was_adapted():
    unet = rftcore.accelerate(plain())
    assert_same(adapt(unet, EVERYTHING))


@pytest.mark.parametrize(
    "options",
    [{"use_rslora": True}, {"rank_pattern": {"to_k": 3}, "alpha_pattern": {"to_v": 7}}, {"lora_dropout": 0.5}],
    ids=["rslora", "patterns", "dropout in eval"],
)
def test_scalings(options):
    assert_same(adapt(plain(), **options))


def test_several_adapters_and_frozen_weights_without_one():
    unet = adapt(adapt(plain(), [*ATTENTION, "conv1"]), [*ATTENTION, "ff.net.2"], "second", r=3, alpha=1)
    unet.set_adapters(["default", "second"], [0.7, -1.3])
    both = assert_same(unet)
    assert {name.removesuffix(".base_layer.weight") for name in both} == {
        name for name, layer in unet.named_modules() if isinstance(layer, BaseTunerLayer)
    }
    unet.set_adapters("second", 0.5)
    second = assert_same(unet)
    assert not any("conv1" in name for name in second) and any("ff.net.2" in name for name in second)
    name = next(name for name in second if "to_q" in name)
    assert not torch.equal(both[name], second[name])


@torch.no_grad()
@pytest.mark.parametrize("scale", [0.3, 0.0])
def test_the_scale_of_a_call(scale):
    """It acts on adapters alone: merged, it is handed to `merged`, and the call may still carry it."""
    unet = adapt(plain(), EVERYTHING)
    own, kwargs = call(unet), {"cross_attention_kwargs": {"scale": scale}}
    expected = call(copy.deepcopy(unet), **kwargs)
    assert relative_error(expected, own) > 1e-3
    with merged(unet, scale):
        assert relative_error(call(unet), expected) <= 1e-12
        assert relative_error(call(unet, **kwargs), expected) <= 1e-12


@torch.no_grad()
def test_disabled_and_merged_adapters_are_left_alone():
    unet = adapt(plain(), EVERYTHING)
    adapted = call(unet)
    unet.disable_adapters()
    assert assert_same(unet) == {}
    unet.enable_adapters()
    first, *_ = layers(unet)
    first.merge()
    assert relative_error(call(unet), adapted) <= 1e-12
    assert len(assert_same_but_for(unet, first)) == len(layers(unet)) - 1


def assert_same_but_for(unet, layer):
    """As `assert_same`, where a layer's adapter stays on, which PEFT merged."""
    before, expected = snapshot(unet), call(unet)
    with merged(unet) as weights:
        assert not layer.disable_adapters and layer.merged
        assert relative_error(call(unet), expected) <= 1e-12
    assert_untouched(unet, before)
    return weights


@torch.no_grad()
def test_modules_to_save_stay_on():
    unet = adapt(plain(), modules_to_save=["conv_out"])
    for name, parameter in unet.named_parameters():
        if "modules_to_save" in name:
            parameter.mul_(1.5)
    assert_same(unet)


@torch.no_grad()
def test_through_the_denoiser():
    unet = adapt(plain(), EVERYTHING)
    denoiser = Denoiser(unet)
    x, conditioning = torch.randn(1, 4, 8, 8).double(), {"prompt_embeds": torch.randn(2, 5, 12).double()}
    expected = denoiser(x, torch.tensor(3), conditioning, guided=True)
    with merged(denoiser.module) as weights:
        assert relative_error(denoiser(x, torch.tensor(3), conditioning, guided=True), expected) <= 1e-12
        again = denoiser(x, torch.tensor(3), conditioning, guided=True, parameters=weights)
        assert relative_error(again, expected) <= 1e-12


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("masters", ["same", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounded_once(dtype, masters, layout):
    """Each merged weight is the fp64 one, rounded to its dtype: within half a unit, and fp32's own error of the sum."""
    unet = adapt(plain(dtype=dtype), EVERYTHING).to(memory_format=layout)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype if masters == "same" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        weights = merged_weights(unet)
    exact = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, BaseTunerLayer):
            a, b = (part["default"].weight.double().flatten(1) for part in (layer.lora_A, layer.lora_B))
            base = layer.base_layer.weight
            exact[f"{name}.base_layer.weight"] = (
                base,
                base.double() + (b @ a).view(base.shape) * layer.scaling["default"],
            )
    assert exact.keys() == weights.keys()
    for name, weight in weights.items():
        base, expected = exact[name]
        assert weight.dtype == dtype and weight.stride() == base.stride()
        unit = torch.finfo(dtype).eps
        error = (weight.double() - expected).abs() - expected.abs() * unit / 2
        assert error.max() <= expected.abs().max() * (1e-6 if dtype == torch.float32 else unit * 1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_the_unmerged_model(dtype):
    unet = adapt(plain(dtype=dtype), EVERYTHING)
    exact = call(copy.deepcopy(unet).double())
    stock = relative_error(call(unet, dtype=dtype), exact)
    with merged(unet):
        assert relative_error(call(unet, dtype=dtype), exact) <= 2 * stock + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes(dtype):
    """Counted: what is kept lives as merged weights, and nothing of a frozen weight without an adapter."""
    unet = adapt(plain(dtype=dtype)).to(dtype)
    stated = merged_bytes(unet)
    assert stated.kept == sum(weight.nbytes for weight in merged_weights(unet).values())
    biggest = max(layer.get_base_layer().weight.numel() for layer in layers(unet))
    assert stated.transient == (0 if dtype == torch.float32 else 4 * biggest)
    # A plan is made of models without weights.
    shapes = copy.deepcopy(unet).to("meta")
    assert merged_bytes(shapes) == stated
    assert sum(weight.nbytes for weight in merged_weights(shapes).values()) == stated.kept
    addresses = {parameter.data_ptr() for parameter in unet.parameters()}
    with merged(unet):
        new = {name for name, p in unet.state_dict().items() if p.numel() and p.data_ptr() not in addresses}
        assert new == {f"{name}.base_layer.weight" for name, m in unet.named_modules() if m in layers(unet)}


@torch.no_grad()
def test_nothing_is_left_after_an_error():
    unet = adapt(plain())
    before = snapshot(unet)
    with pytest.raises(KeyError, match="mine"), merged(unet):
        raise KeyError("mine")
    assert_untouched(unet, before)


def parametrized(unet):
    layer = layers(unet)[0].base_layer
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Identity())


def subclassed(unet):
    class Quantised(torch.nn.Parameter):
        pass

    layer = layers(unet)[0].base_layer
    layer._parameters["weight"] = layer.weight.data.as_subclass(Quantised)


def shared(unet):
    first, second = [layer for layer in layers(unet) if layer.base_layer.weight.shape == (16, 16)][:2]
    second.base_layer._parameters["weight"] = first.base_layer.weight


def hooked(unet):
    layers(unet)[0].base_layer.register_forward_pre_hook(lambda *_: None)


def replaced(unet):
    layers(unet)[0].forward = lambda x: x


def merged_then_disabled(unet):
    layers(unet)[0].merge()
    layers(unet)[0]._disable_adapters = True


def dilated(unet):
    adapt(unet, ["conv1"], "second")
    unet.set_adapters(["default", "second"])
    unet.down_blocks[0].resnets[0].conv1.base_layer.dilation = (2, 2)


BROKEN = {
    "DoRA": (LoraConfig(r=2, target_modules=ATTENTION, use_dora=True), None, "DoraLinearVariant"),
    "lora_bias": (LoraConfig(r=2, target_modules=["to_out.0"], lora_bias=True), None, "lora_bias"),
    "dropout": (LoraConfig(r=2, target_modules=ATTENTION, lora_dropout=0.5), lambda u: u.train(), r"dropout p=0.5"),
    "LoHa": (LoHaConfig(r=2, target_modules=ATTENTION), None, "not LoRA of a Linear or Conv2d"),
    "IA3": (IA3Config(target_modules=["to_k"], feedforward_modules=[]), None, "not LoRA of a Linear or Conv2d"),
    "parametrized": (None, parametrized, "[Pp]arametriz"),
    "subclass": (None, subclassed, "Quantised"),
    "float8": (None, lambda u: layers(u)[0].base_layer.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "shared": (None, shared, "is the same weight"),
    "hooked": (None, hooked, "Linear has hooks"),
    "replaced": (None, replaced, "forward of its own"),
    "merged, then disabled": (None, merged_then_disabled, "merged adapters are disabled"),
    "dilated": (None, dilated, r"dilation=\(2, 2\)"),
}


@torch.no_grad()
@pytest.mark.parametrize("case", BROKEN)
def test_what_cannot_be_merged(case):
    config, breaks, reason = BROKEN[case]
    unet = plain()
    if config is None:
        adapt(unet)
    else:
        inject_adapter_in_model(config, unet)
        unet.eval()
    if breaks is not None:
        breaks(unet)
    for refuse in (merged_weights, merged_bytes, lambda u: merged(u).__enter__()):
        with pytest.raises(ValueError, match=f"cannot be merged: .*{reason}.*; sample with the adapters unmerged"):
            refuse(unet)
    assert not any(layer._disable_adapters for layer in layers(unet)) or case == "merged, then disabled"


def test_a_gradient_or_a_scale_that_is_none():
    unet = adapt(plain())
    with pytest.raises(ValueError, match="torch.no_grad"), merged(unet):
        pass
    with torch.no_grad(), pytest.raises(ValueError, match="scale=nan"):
        merged_weights(unet, float("nan"))


def rollout(unet, merge):
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    sampler = rftcore.CheckpointedSampler(unet, scheduler, num_inference_steps=50, guidance_scale=5.0, eta=1.0)
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(2, 5, 12, generator=generator).to(unet.dtype) for _ in range(2)]
    with torch.no_grad(), merged(unet) if merge else nullcontext():
        trajectory = sampler(*given, generator=generator)
        same_path, _ = sampler.log_prob(trajectory, torch.arange(50))
    with torch.no_grad():
        unmerged, _ = sampler.log_prob(trajectory, torch.arange(50))
    return trajectory.log_probs, same_path, unmerged


@pytest.mark.parametrize("merge", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_ratio_of_a_rollout(merge):
    """A rollout's ratio is 1 bit for bit by the path that made it; in bf16 a merged one's is not by the unmerged path.

    Here |log p(unmerged) - log p(merged)| is 3.0e-4 in the mean and 1.8e-3 at most (nats per element, 50 steps, eta 1):
    18 times DDPO's clip range. So a merged rollout is scored again before an update (design, invariant 5).
    """
    unet = rftcore.accelerate(add_lora(randomise_norms(UNETS["sd1"]())).to(torch.bfloat16).eval())
    sampled, same_path, unmerged = rollout(unet, merge)
    assert torch.equal(sampled, same_path)
    shift = (unmerged - sampled).abs()
    assert (shift.max() > CLIP_RANGE) == merge
