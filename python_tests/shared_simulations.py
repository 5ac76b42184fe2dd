"""UNets of one structure share a simulation: a test whose subject is no plan does not wait for its own.

What a simulation counted it remembers; with thousands of tiny chains, counting would be most of what the tests do.
"""

import functools

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from rftcore.blocks.serving import servings
from rftcore.commands import plan as plan_command
from rftcore.sampling import plans
from rftcore.sampling.ambient import Ambient
from rftcore.sampling.simulation import Simulation, _autocast, unpredictable_reasons

_made = {}


def share(monkeypatch):
    """Until it is undone, plans are made by what was counted for other UNets of the same structure, too."""
    for module in (plans, plan_command):
        monkeypatch.setattr(module, "Simulation", simulation)


@functools.wraps(Simulation)
def simulation(denoiser, conditioning, height, width, *, guided):
    make = functools.partial(Simulation, denoiser, conditioning, height, width, guided=guided)
    if unpredictable_reasons(denoiser.module) or any(one.recompute == "auto" for one in servings(denoiser.module)):
        return make()
    key = (tuple(_structure(denoiser)), tuple((n, t.shape[1:], t.dtype) for n, t in conditioning.items()))
    key += (height, width, guided, Ambient.capture(torch.device("cpu")))
    if key not in _made:
        _made[key] = make()
    return _made[key]


def _structure(denoiser):
    """All that decides what an evaluation computes and keeps."""
    module = denoiser.module
    yield type(denoiser.model), repr(module), repr(denoiser.config), repr(denoiser.extra)
    yield _autocast(module, denoiser.model)
    for child in module.modules():
        attributes = child.__dict__
        yield type(child), child.training, attributes.get("gradient_checkpointing"), type(attributes.get("processor"))
        yield "forward" in attributes
        if isinstance(child, BaseTunerLayer):
            yield child.disable_adapters, tuple(child.active_adapters), tuple(child.merged_adapters)
    for name, parameter in module.named_parameters():
        yield name, type(parameter), parameter.shape, parameter.dtype, parameter.requires_grad, parameter.stride()
    for serving in servings(module):
        yield serving.recompute, repr(serving.backends), repr(serving.drops)
