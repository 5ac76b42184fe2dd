"""An accelerated model beside a stock one: called alike, and compared in outputs and every gradient."""

import copy

import torch
from checks import relative_error
from models import UNETS, add_lora, randomise_norms

import rftcore

BOUND = 1e-11


def make(kind="sd1", lora=True, **options):
    """A UNet in fp64 with adapters on its attention, or without any and trained in full."""
    unet = randomise_norms(UNETS[kind](**options).double().eval())
    return add_lora(unet) if lora else unet


def pair(unet, **options):
    """A stock copy, and the model itself, accelerated."""
    stock = copy.deepcopy(unet)
    return stock, rftcore.accelerate(unet, **options)


def randomise_adapters(unet):
    """Adapters as after some training: B = 0 would hide every error in A's gradient."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in unet.named_parameters():
        if "lora_" in name or "hada" in name or "lokr" in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(0.2 * noise + (1 if "magnitude" in name else 0))
    return unet


def inputs(kind="sd1", batch=2, size=(8, 8), dtype=torch.float64, leaves=("sample", "encoder_hidden_states")):
    """A call's arguments, the same each time; those named in `leaves` require a gradient."""
    generator = torch.Generator().manual_seed(3)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    made = {"sample": randn(batch, 4, *size), "timestep": torch.arange(batch) * 37 + 5}
    if kind != "unconditional":
        made["encoder_hidden_states"] = randn(batch, 5, 12)
    if kind == "sdxl":
        ids = torch.randint(0, 9, (batch, 6), generator=generator).to(dtype)
        made["added_cond_kwargs"] = {"text_embeds": randn(batch, 10), "time_ids": ids}
    for name in leaves:
        if name in made:
            made[name].requires_grad_()
    return made


def tensors(value):
    """All tensors in nested lists, tuples and dicts, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [t for v in values for t in tensors(v)]


def weights(output):
    """A gradient of the output, the same each time."""
    generator = torch.Generator().manual_seed(11)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)


def backward(output):
    """Backward with a gradient that is the same each time."""
    output.backward(weights(output))


def results(model, arguments=None, differentiate=backward):
    """The output, and the gradients of all inputs and parameters by name; None where there is none."""
    arguments = inputs() if arguments is None else arguments
    leaves = [t for t in tensors(arguments) if t.requires_grad]
    for leaf in (*leaves, *model.parameters()):
        leaf.grad = None
    output = model(**arguments, return_dict=False)[0]
    found = {"output": output.detach()}
    if output.requires_grad:
        differentiate(output)
    found |= {f"input {i}": t.grad for i, t in enumerate(leaves)}
    found |= {f"{i}: {name}": p.grad for i, (name, p) in enumerate(model.named_parameters())}
    return found


def assert_equal(ours, stock, bound=BOUND):
    """Names may have prefixes of wrappers; the order is the same.

    Some gradients are 0 but for rounding, as that of a bias that shifts all logits of a softmax: both are, then.
    """
    assert len(ours) == len(stock)
    zero = 1e-13 * max(t.double().norm().item() for t in stock.values() if t is not None)
    for (name, mine), expected in zip(ours.items(), stock.values(), strict=True):
        assert (mine is None) == (expected is None), f"{name}: {mine} in place of {expected}"
        if expected is not None:
            assert mine.shape == expected.shape and mine.dtype == expected.dtype, name
            error = relative_error(mine, expected)
            both_zero = bound > 0 and max(mine.norm().item(), expected.norm().item()) <= zero
            assert error <= bound or both_zero, f"{name} is off by {error:.1e}, of {expected.norm():.1e}"


def assert_same(ours, stock, arguments=inputs, gradients=4):
    """Both give the same, with gradients for at least so many tensors. `arguments` makes a call's arguments."""
    expected = results(stock, arguments())
    assert sum(gradient is not None for gradient in expected.values()) > gradients
    assert_equal(results(ours, arguments()), expected)


def assert_served(model):
    """Every block is, as it stands and in the last call."""
    report = rftcore.report(model)
    assert report.served and not report.stock, str(report)
