"""accelerate changes instances' forwards and nothing else; restore leaves no trace; copies have their own weights."""

import copy
import pickle

import pytest
import torch
from against_stock import assert_equal, assert_same, assert_served, inputs, make, pair, results
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from models import UNETS

import rftcore


def traces(model):
    """Modules whose forward is not their class's."""
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def attributes(model):
    """What every module holds, without tensors."""
    return {
        name: {key: value for key, value in module.__dict__.items() if not key.startswith("_")}
        for name, module in model.named_modules()
    }


def perturbed(model):
    """The same model with other weights, in place."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


@pytest.mark.parametrize("kind", UNETS)
def test_names_weights_and_modules_stay(kind):
    unet = make(kind)
    names = list(unet.named_modules())
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    parameters = [(name, id(parameter), parameter.requires_grad) for name, parameter in unet.named_parameters()]
    assert rftcore.accelerate(unet) is unet
    results(unet, inputs(kind))
    assert list(unet.named_modules()) == names
    assert parameters == [(name, id(parameter), parameter.requires_grad) for name, parameter in unet.named_parameters()]
    assert list(unet.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in unet.state_dict().items())


@pytest.mark.parametrize("kind", UNETS)
def test_restore_leaves_no_trace(kind):
    unet = make(kind)
    before = attributes(unet)
    rftcore.accelerate(unet)
    results(unet, inputs(kind))
    assert traces(unet)
    assert rftcore.restore(unet) is unet
    assert not traces(unet) and attributes(unet) == before
    assert rftcore.report(unet).recompute is None
    rftcore.restore(unet)
    assert attributes(unet) == before


def test_restore_without_accelerate_changes_nothing():
    unet = make()
    before = attributes(unet)
    assert attributes(rftcore.restore(unet)) == before


def test_restore_keeps_a_forward_that_is_not_ours():
    unet = make()
    resnet = unet.mid_block.resnets[0]
    resnet.forward = own = resnet.forward
    rftcore.restore(rftcore.accelerate(unet))
    assert resnet.__dict__["forward"] is own


def test_restore_of_a_part():
    stock, unet = pair(make())
    rftcore.restore(unet.down_blocks)
    assert not traces(unet.down_blocks) and traces(unet.up_blocks)
    assert_same(unet, stock)


def test_twice_is_once():
    stock, unet = pair(make())
    rftcore.accelerate(unet)
    assert_same(unet, stock)
    assert_served(unet)
    rftcore.restore(unet)
    assert not traces(unet)


def test_levels_are_switched():
    """What a backend computes does not depend on the level either."""
    stock, unet = pair(make("sd2"))
    expected = results(stock)
    for level in ("block", "none", "qkv", "ff", "none"):
        rftcore.accelerate(unet, recompute=level)
        assert rftcore.report(unet).recompute == level
        assert_equal(results(unet), expected)
        assert_served(unet)
    rftcore.accelerate(unet, recompute="auto", memory_budget="1MiB")
    assert rftcore.report(unet).recompute == "auto"
    assert_equal(results(unet), expected)
    rftcore.restore(unet)
    assert not traces(unet)
    assert_equal(results(unet), expected, bound=0)


def test_the_level_of_a_graph_is_its_forwards():
    """Switching or restoring between forward and backward leaves the graph that is there alone."""
    stock, unet = pair(make())

    def switch_then_backward(output):
        rftcore.accelerate(unet, recompute="block")
        rftcore.restore(unet)
        output.sum().backward()

    expected = results(stock, differentiate=lambda output: output.sum().backward())
    assert_equal(results(unet, differentiate=switch_then_backward), expected)


def saved_and_loaded(model, tmp_path):
    torch.save(model, tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt", weights_only=False)


COPIES = {
    "deepcopy": lambda model, tmp_path: copy.deepcopy(model),
    "pickle": lambda model, tmp_path: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("options", [{}, {"recompute": "auto", "memory_budget": "1MiB"}], ids=["none", "auto"])
def test_a_copy_computes_with_its_own_weights(how, options, tmp_path):
    stock, unet = pair(make(), **options)
    expected = results(stock)
    assert_equal(results(unet), expected)
    other = COPIES[how](unet, tmp_path)
    assert not {id(p) for p in unet.parameters()} & {id(p) for p in other.parameters()}
    assert_served(other)
    assert_same(perturbed(other), perturbed(copy.deepcopy(stock)))
    assert_equal(results(unet), expected)

    rftcore.restore(other)
    assert not traces(other)
    assert_served(unet)
    assert_equal(results(unet), expected)


def test_a_copys_copy_and_a_restored_original():
    stock, unet = pair(make())
    other = copy.deepcopy(copy.deepcopy(unet))
    rftcore.restore(unet)
    assert_served(other)
    assert_same(perturbed(other), perturbed(copy.deepcopy(stock)))


def test_ema_swaps_weights():
    stock, unet = pair(make(lora=False))
    average = EMAModel(perturbed(copy.deepcopy(stock)).parameters())
    before = results(unet)
    average.store(unet.parameters())
    average.copy_to(unet.parameters())
    assert_same(unet, perturbed(copy.deepcopy(stock)))
    average.restore(unet.parameters())
    assert_equal(results(unet), before, bound=0)
    average.step(unet.parameters())
    assert_equal(results(unet), results(stock))


def test_save_pretrained_and_back(tmp_path):
    stock, unet = pair(make(lora=False))
    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert not traces(loaded)
    assert_same(rftcore.accelerate(loaded), stock)


def test_load_state_dict_and_data_are_looked_at_on_every_call():
    stock, unet = pair(make())
    results(unet)
    other = perturbed(copy.deepcopy(stock))
    unet.load_state_dict(other.state_dict())
    assert_same(unet, other)
    for mine, theirs in zip(unet.parameters(), stock.parameters(), strict=True):
        mine.data = theirs.detach().clone()
    assert_same(unet, stock)


def test_to_another_dtype_and_back():
    stock, unet = pair(make())
    for dtype in (torch.float32, torch.float64):
        stock.to(dtype), unet.to(dtype)
    assert_same(unet, stock)
    assert_served(unet)
