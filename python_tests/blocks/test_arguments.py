"""What accelerate refuses, in words, and what a served model says of inputs that stock refuses too."""

import pytest
import torch
from against_stock import assert_same, inputs, make, pair, results
from diffusers import StableDiffusionPipeline, UNet1DModel

import rftcore


@pytest.mark.parametrize("function", [rftcore.accelerate, rftcore.report])
@pytest.mark.parametrize("module", [torch.nn.Linear(2, 2), "unet", None, UNet1DModel, StableDiffusionPipeline], ids=str)
def test_an_unknown_module(module, function):
    with pytest.raises(ValueError, match=r"pipeline\.unet and pipeline\.vae") as error:
        function(module)
    assert type(module).__name__ in str(error.value) and "UNet2DConditionModel" in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recompute": "all"}, r"recompute='all' is unknown; choose one of 'none', 'ff', 'qkv', 'block', 'auto'"),
        ({"recompute": None}, "recompute=None is unknown"),
        ({"recompute": "auto"}, "give memory_budget"),
        ({"memory_budget": "1GiB"}, r"only then"),
        ({"recompute": "ff", "memory_budget": 10}, r"recompute='ff' with memory_budget=10"),
        (
            {"recompute": "auto", "memory_budget": "much"},
            r"memory_budget='much'; it must be a positive number of bytes",
        ),
        ({"recompute": "auto", "memory_budget": 0}, "positive"),
        ({"recompute": "auto", "memory_budget": "0GiB"}, "positive"),
        ({"recompute": "auto", "memory_budget": -5}, "positive"),
        ({"recompute": "auto", "memory_budget": "9" * 400 + "GiB"}, "positive"),
        ({"recompute": "auto", "memory_budget": "0.1B"}, "positive"),
        ({"recompute": "auto", "memory_budget": 1.5}, "positive"),
        ({"recompute": "auto", "memory_budget": True}, "positive"),
        ({"backend": "fastest"}, r"backend='fastest' is unknown; choose one of 'auto', .*'reference'"),
        ({"backend": None}, "backend=None is unknown"),
    ],
    ids=str,
)
def test_unknown_settings_change_nothing(options, words):
    stock, unet = pair(make(), recompute="ff")
    with pytest.raises(ValueError, match=words):
        rftcore.accelerate(unet, **options)
    assert rftcore.report(unet).recompute == "ff"
    assert_same(unet, stock)


def test_a_backend_that_cannot_serve():
    """cuDNN's attention, on a CPU. What was asked for before stays."""
    stock, unet = pair(make(), recompute="ff")
    with pytest.raises(RuntimeError, match=r"attention: backend='cudnn' cannot serve this input: .*cpu.*rftcore info"):
        rftcore.accelerate(unet, backend="cudnn")
    assert rftcore.report(unet).recompute == "ff"
    assert_same(unet, stock)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_backend_that_can(backend):
    stock, unet = pair(make("sd2"), backend=backend)
    assert_same(unet, stock, lambda: inputs("sd2"))
    assert not rftcore.report(unet).stock


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.ones(2, 4, 8, 8, dtype=torch.int64), r"conv_in: x is torch\.int64; it must be fp64, fp32, bf16 or fp16"),
        (torch.ones(2, 4, 8, 8, dtype=torch.complex128), r"conv_in: x is torch\.complex128"),
        (
            torch.ones(2, 4, 8, 8, device="meta", dtype=torch.float64),
            "conv_in: x is on meta, its weights are on cpu; move one",
        ),
    ],
    ids=["int64", "complex128", "meta"],
)
def test_inputs_that_no_layer_takes(tensor, words):
    stock, unet = pair(make())
    arguments = inputs(leaves=()) | {"sample": tensor}
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        stock(**arguments)
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        unet(**arguments)
    with pytest.raises(ValueError, match=words):
        unet.conv_in(tensor)
    assert_same(unet, stock)


def test_text_on_another_device():
    stock, unet = pair(make())
    arguments = inputs(leaves=())
    arguments["encoder_hidden_states"] = arguments["encoder_hidden_states"].to("meta")
    with pytest.raises(ValueError, match=r"attentions\.0.*encoder_hidden_states is on meta, its weights are on cpu"):
        unet(**arguments)
    assert_same(unet, stock)


@pytest.mark.parametrize("name", ["sample", "encoder_hidden_states"])
def test_another_floating_dtype_is_refused_as_by_stock(name):
    stock, unet = pair(make())
    arguments = inputs(leaves=())
    arguments[name] = arguments[name].float()
    for model in (stock, unet):
        with pytest.raises(RuntimeError, match="dtype|type"):
            model(**arguments)
    assert_same(unet, stock)


@pytest.mark.parametrize("name", ["sample", "encoder_hidden_states"])
def test_a_wrong_size_is_refused_as_by_stock(name):
    stock, unet = pair(make())
    arguments = inputs(leaves=())
    arguments[name] = arguments[name][:, :3] if name == "sample" else arguments[name][..., :7]
    for model in (stock, unet):
        with pytest.raises(RuntimeError):
            model(**arguments)
    assert_same(unet, stock)


def test_weights_on_several_devices():
    unet = make()
    unet.mid_block.to("meta")
    with pytest.raises(ValueError, match=r"weights on cpu, meta; they must be on one device.*offloading"):
        rftcore.accelerate(unet)


def test_a_budget_that_cannot_be_kept_says_what_could():
    _, unet = pair(make(), recompute="auto", memory_budget=1)
    with pytest.raises(ValueError, match=r"memory_budget=0 MiB cannot be kept for an input of 2 x 8 x 8.*Raise it"):
        unet(**inputs())
    with torch.no_grad():  # keeps nothing
        unet(**inputs(leaves=()))


def test_a_transformer_without_text_is_refused_as_by_stock():
    stock, unet = pair(make())
    arguments = inputs(leaves=()) | {"encoder_hidden_states": None}
    errors = []
    for model in (stock, unet):
        try:
            errors.append(model(**arguments).sample)
        except Exception as error:  # noqa: BLE001
            errors.append(type(error))
    assert errors[0] == errors[1] if isinstance(errors[0], type) else torch.allclose(*errors, rtol=1e-11)
    assert results(unet)["output"].shape == (2, 4, 8, 8)
