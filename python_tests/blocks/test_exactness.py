"""Outputs and every gradient are stock's: all models, all levels, all backends, all dtypes."""

import copy

import pytest
import torch
from against_stock import assert_equal, assert_same, assert_served, backward, inputs, make, pair, results
from checks import relative_error
from diffusers import AutoencoderKL
from models import UNETS, randomise_norms

import rftcore
from benchmarks.memory import saved_bytes
from rftcore.blocks import program

LEVELS = ["none", "ff", "qkv", "block"]


@pytest.mark.covering(2)
@pytest.mark.parametrize("size", [(8, 8), (10, 6)])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", UNETS)
def test_unets_with_adapters(kind, level, backend, size):
    stock, ours = pair(make(kind), recompute=level, backend=backend)
    assert_same(ours, stock, lambda: inputs(kind, size=size), gradients=9)
    assert_served(ours)


@pytest.mark.covering(1)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", UNETS)
def test_unets_trained_in_full(kind, level):
    stock, ours = pair(make(kind, lora=False), recompute=level)
    assert_same(ours, stock, lambda: inputs(kind), gradients=99)
    assert_served(ours)


@pytest.mark.parametrize("kind", UNETS)
def test_nothing_but_the_latents_wants_a_gradient(kind):
    stock, ours = pair(make(kind).requires_grad_(False), recompute="qkv")
    assert_same(ours, stock, lambda: inputs(kind, leaves=("sample",)), gradients=0)


def autoencoder(mid_block_add_attention=True):
    model = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        mid_block_add_attention=mid_block_add_attention,
    )
    return randomise_norms(model.double())


def decoded(model, full):
    """The image, and the gradients of the latents and, where it is trained, of the model."""
    z = torch.randn(2, 4, 6, 5, dtype=torch.double, generator=torch.Generator().manual_seed(2)).requires_grad_()
    model.requires_grad_(full).zero_grad()
    image = model.decode(z).sample
    backward(image)
    return {"image": image.detach(), "z": z.grad, **{n: p.grad for n, p in model.named_parameters()}}


def encoded(model, full):
    x = torch.randn(2, 3, 12, 10, dtype=torch.double, generator=torch.Generator().manual_seed(2)).requires_grad_()
    model.requires_grad_(full).zero_grad()
    moments = model.encode(x).latent_dist.parameters
    backward(moments)
    return {"moments": moments.detach(), "x": x.grad, **{n: p.grad for n, p in model.named_parameters()}}


@pytest.mark.covering(1)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("run", [decoded, encoded])
@pytest.mark.parametrize("level", LEVELS)
def test_autoencoder(level, run, full):
    model = autoencoder()
    stock = run(copy.deepcopy(model), full)
    rftcore.accelerate(model, level)
    assert_equal(run(model, full), stock)
    assert_served(model)


def test_autoencoder_without_attention():
    model = autoencoder(mid_block_add_attention=False)
    stock = decoded(copy.deepcopy(model), False)
    rftcore.accelerate(model)
    assert_equal(decoded(model, False), stock)


@pytest.mark.covering(1)
@pytest.mark.parametrize("share", [1.0, 0.8, 0.5, 0.4])
@pytest.mark.parametrize("kind", UNETS)
def test_auto(kind, share):
    stock, ours = pair(make(kind))
    everything = kept(ours, kind)
    rftcore.accelerate(ours, "auto", memory_budget=int(share * everything) + 2**16)
    assert_same(ours, stock, lambda: inputs(kind), gradients=9)
    assert_served(ours)
    assert kept(ours, kind) <= share * everything + 2**16


def kept(model, kind):
    with saved_bytes(model.parameters()) as saved:
        model(**inputs(kind))
    return saved["bytes"]


@pytest.mark.parametrize("lora", [True, False])
def test_any_choice_of_values_to_make_again(lora, monkeypatch):
    """Not only the levels: each block makes again what it is told to, whatever that is."""
    stock, ours = pair(make("sdxl", lora=lora))
    generator = torch.Generator()

    def some(place, chosen, tensors, parameters):
        names = [name for step in chosen.steps for name in step.outputs]
        return frozenset(name for name in names if torch.rand((), generator=generator) < 0.5)

    monkeypatch.setattr("rftcore.blocks.serving.Place._drop", some)
    expected = results(stock, inputs("sdxl"))
    for seed in range(12):
        generator.manual_seed(seed)
        assert_equal(results(ours, inputs("sdxl")), expected)


def test_levels_make_no_difference_of_a_bit():
    stock, ours = pair(make("sd1"))
    first = results(ours)
    for level in LEVELS[1:]:
        rftcore.accelerate(ours, level)
        assert_equal(results(ours), first, bound=0)


@pytest.mark.covering(2)
@pytest.mark.parametrize("adapters", ["alike", torch.float32])
# Not fp16 under autocast to bf16: stock mixes dtypes there, and fails.
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True),
     (torch.float16, False)],
)  # fmt: skip
@pytest.mark.parametrize("kind", UNETS)
def test_low_precision(kind, dtype, autocast, adapters):
    """At most twice stock's own error in the same precision, both against fp64."""
    unet = make(kind).to(dtype)
    for parameter in unet.parameters():
        if parameter.requires_grad and adapters != "alike":
            parameter.data = parameter.data.to(adapters)
    exact = values(copy.deepcopy(unet).double(), kind, torch.float64, False)
    stock = values(copy.deepcopy(unet), kind, dtype, autocast)
    for level in LEVELS:
        ours = values(rftcore.accelerate(unet, level), kind, dtype, autocast)
        assert [t.dtype for t in ours] == [t.dtype for t in stock]
        (mine, *my_errors), (yardstick, *errors) = errors_of(ours, exact), errors_of(stock, exact)
        assert mine <= 2 * yardstick + 1e-6
        # Together, each as a share of its norm: in a gradient of rank 2 stock's own error is small or large by chance.
        assert norm(my_errors) <= 2 * norm(errors) + 1e-6
    assert_served(unet)


def norm(values):
    return sum(value**2 for value in values) ** 0.5


def errors_of(found, exact):
    return [relative_error(tensor, expected) for tensor, expected in zip(found, exact, strict=True)]


def values(model, kind, dtype, autocast):
    """The output and all gradients; the inputs are the same numbers in all precisions."""
    arguments = inputs(kind, dtype=dtype)
    for name, tensor in arguments.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            rounded = tensor.detach().to(torch.bfloat16).to(tensor.dtype)
            arguments[name] = rounded.requires_grad_(tensor.requires_grad)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(**arguments, return_dict=False)[0]
    backward(output)
    leaves = (*arguments.values(), *model.parameters())
    return [output.detach(), *(t.grad for t in leaves if isinstance(t, torch.Tensor) and t.grad is not None)]


def test_a_plan_that_makes_nothing_again_reads_what_it_keeps():
    """Every value that a backward reads is kept or made again, and nothing else is kept."""
    stock, ours = pair(make("sd1"))
    seen = []

    def spy(chosen_program, needs, drop, original=program.plan):
        found = original(chosen_program, needs, drop)
        seen.append((chosen_program, found))
        return found

    program.plan, original = spy, program.plan
    try:
        results(ours)
    finally:
        program.plan = original
    assert seen
    for chosen_program, found in seen:
        names = {name for step in chosen_program.steps for name in (*step.outputs, *step.statistics)}
        assert set(found.kept) <= names | set(chosen_program.inputs)
        for i in found.remade:
            assert chosen_program.steps[i].kind.cheap
