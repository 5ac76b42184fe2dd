"""Stock layers adapted by PEFT, and their adapters as our ops take them."""

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from rftcore.ops import Adapter


def adapt(model, ranks=(3,), dtype=None, **options):
    """Adds an adapter of each rank to all linear layers and convolutions; every A and B is random, and trained."""
    names = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    adapters = [f"adapter{i}" for i in range(len(ranks))]
    for adapter, rank in zip(adapters, ranks, strict=True):
        inject_adapter_in_model(
            LoraConfig(r=rank, lora_alpha=2, target_modules=names, **options), model, adapter_name=adapter
        )
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter(adapters)
            for weights in (layer.lora_A, layer.lora_B):
                for adapter in adapters:
                    weights[adapter].to(dtype)
                    torch.nn.init.normal_(weights[adapter].weight)
    return model


def adapters_of(layer):
    """The active adapters of a PEFT layer."""
    return tuple(
        Adapter(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
        for name in layer.active_adapters
    )


def results(function, model, x, grads):
    """Outputs of `function(x)`, then gradients of x, if it wants one, and of the model's trained parameters."""
    outputs = function(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [t for t in (x, *model.parameters()) if t.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]
