"""Queries, keys and values of one input, by PEFT's layers behind a LayerNorm and by lora_linears."""

import torch
from adapted import adapt, adapters_of
from checks import laid_out
from torch import nn

from rftcore.ops import Norm, Projection, lora_linears


class Projections(nn.Module):
    """Queries, keys and values of one input, of sizes of their own; one has a bias."""

    def __init__(self, width=10, norm=True):
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else None
        self.to_q, self.to_k, self.to_v = nn.Linear(width, 8), nn.Linear(width, 8, bias=False), nn.Linear(width, 14)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x):
        n = x if self.norm is None else self.norm(x)
        return self.to_q(n), self.to_k(n), self.to_v(n)


def make_model(ranks=(3, 2), width=10, norm=True, trained=(), dtype=torch.float64, lora=None, **options):
    """Projections of this dtype, with adapters; of the others, those parameters train whose name contains one given."""
    model = Projections(width, norm).to(dtype).requires_grad_(False)
    adapt(model, ranks, lora or dtype, **options)
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.requires_grad_(any(part in name for part in trained))
    return model


def arguments(model):
    """The norm and the projections of a model, as our op takes them."""
    projections = []
    for layer in (model.to_q, model.to_k, model.to_v):
        adapted = hasattr(layer, "base_layer")
        base = layer.base_layer if adapted else layer
        projections.append(Projection(base.weight, base.bias, adapters_of(layer) if adapted else ()))
    norm = model.norm
    return projections, None if norm is None else Norm(norm.weight, norm.bias, norm.eps)


def ours(model, backend="torch"):
    return lambda x: lora_linears(x, *arguments(model), backend=backend)


def make_input(shape=(2, 5, 10), dtype=torch.float64, layout="contiguous"):
    return laid_out(torch.randn(shape, dtype=torch.float64) * 2 + 1, layout).to(dtype).requires_grad_()


def make_grads(model, x):
    return [torch.randn_like(y) for y in model(x)]
