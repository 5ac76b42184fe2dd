"""Models that are only looked through: nothing of them is trained, and little of what they compute is kept."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Module = TypeVar("Module", bound=nn.Module)


def freeze(module: Module) -> Module:
    """The module itself, in evaluation mode, none of whose parameters has a gradient."""
    return module.requires_grad_(False).eval()


def checkpoint_layers(layers: Iterable[nn.Module]) -> None:
    """Lets each layer keep its input alone, and compute the rest again in the backward.

    Names, parameters and values stay as they are; without grad mode nothing changes. Layers that draw random numbers
    are not served.
    """
    for layer in layers:
        layer.forward = functools.partial(_recomputed, layer)


def _recomputed(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = functools.partial(type(layer).forward, layer)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
