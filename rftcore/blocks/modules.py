"""Reads the layers inside a block: their tensors as ops take them, or in words why only the layer itself can run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D, CrossAttnDownBlock2D, CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as globals_of_modules

from rftcore.blocks.served import served
from rftcore.ops import Adapter, Geometry, Projection
from rftcore.ops.compiled import DTYPES

# What weights and inputs may be: a subclass has operations of its own.
TENSORS = (Tensor, nn.Parameter, FakeTensor)
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)

# The forwards of the classes that we stand for, as they are when this is imported.
_FORWARDS: dict[type, Callable] = {
    kind: kind.forward
    for kind in (
        *(nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.SiLU, nn.Dropout, nn.Identity),
        *(lora.Linear, lora.Conv2d),
        *(ResnetBlock2D, Downsample2D, Upsample2D, Transformer2DModel, BasicTransformerBlock),
        *(Attention, FeedForward, GEGLU, UpBlock2D, AttnUpBlock2D, CrossAttnUpBlock2D, CrossAttnDownBlock2D),
    )
}


class Unserved(Exception):
    """Why a block has to run its own forward."""


def check_own(block: nn.Module, *kinds: type) -> None:
    """Raises: Unserved where the block is no longer of a class that we know, or that class was changed."""
    if type(block) not in kinds:
        raise Unserved(f"it was made a {_kind(block)}")
    _check_class(type(block))


def check_hooks(module: nn.Module, own: bool = False) -> None:
    """Raises: Unserved where calling `module` does more than its class's forward.

    Args:
        own: whether a forward of ours may be in its place.
    """
    # Run for every layer on every call: no generators and no attributes looked up the long way.
    attributes = module.__dict__
    if (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
    ):
        raise Unserved(f"{_kind(module)} has hooks")
    if "_conv_forward" in attributes or ("forward" in attributes and not (own and served(module))):
        raise Unserved(f"{_kind(module)} has a forward of its own")
    _check_class(type(module))


def _check_class(kind: type[nn.Module]) -> None:
    if kind.forward is not _FORWARDS.get(kind):
        raise Unserved(f"{kind.__name__}.forward was replaced")


def check_global_hooks() -> None:
    """Raises: Unserved where hooks for all modules are registered."""
    if any(getattr(globals_of_modules, name) for name in _GLOBAL_HOOKS):
        raise Unserved("hooks for all modules are registered (torch.nn.modules.module)")


def base_of(layer: nn.Module) -> nn.Module:
    """The layer that PEFT wrapped, or the layer itself."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def expect(module: nn.Module | None, *kinds: type, own: bool = False) -> Any:
    """The module, which must be exactly of one of these classes and unhooked; `own` as in `check_hooks`.

    Raises: Unserved.
    """
    if module is None or type(module) not in kinds:
        raise Unserved(f"{_kind(module)} in place of {' or '.join(kind.__name__ for kind in kinds)}")
    check_hooks(module, own)
    return module


def norm_parameters(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a norm. Raises: Unserved."""
    return _tensor(norm, "weight"), _tensor(norm, "bias")


class Dropped(NamedTuple):
    """An adapter whose input is dropped out with probability p."""

    p: float
    adapter: Adapter


def linear(module: nn.Module) -> tuple[Projection, tuple[Dropped, ...]]:
    """A linear layer, plain or adapted by PEFT. Raises: Unserved."""
    base, adapters, dropped = _base_and_adapters(module, nn.Linear, lora.Linear)
    return Projection(_tensor(base, "weight"), _tensor(base, "bias"), adapters), dropped


def convolution(module: nn.Module, own: bool = False) -> tuple[Projection, Geometry, tuple[Dropped, ...]]:
    """A 2-d convolution, plain or adapted by PEFT; `own` as in `check_hooks`. Raises: Unserved."""
    base, adapters, dropped = _base_and_adapters(module, nn.Conv2d, lora.Conv2d, own)
    if base.padding_mode != "zeros":
        raise Unserved(f"a convolution pads with {base.padding_mode!r}")
    if isinstance(base.padding, str):
        raise Unserved(f"a convolution has padding={base.padding!r}")
    geometry = Geometry(base.stride, base.padding, base.dilation, base.groups)
    if (adapters or dropped) and base.dilation != (1, 1):
        raise Unserved(f"an adapted convolution has dilation={base.dilation}")
    return Projection(_tensor(base, "weight"), _tensor(base, "bias"), adapters), geometry, dropped


def inactive_dropout(module: nn.Module) -> None:
    """Raises: Unserved where `module` is not a dropout, or one that drops."""
    expect(module, nn.Dropout)
    if module.training and module.p > 0:
        raise Unserved(f"dropout p={module.p} is active")


def _kind(module) -> str:
    return type(module).__name__


def _tensor(module: nn.Module, name: str) -> Any:
    """The tensor; None for a bias or a norm's weight that the module does without."""
    # None is not in place of an attribute that holds something else.
    tensor = module._parameters.get(name)
    if tensor is None:
        tensor = getattr(module, name)
        if tensor is None:
            return None
    if type(tensor) not in TENSORS:
        raise Unserved(f"the {name} of a {_kind(module)} is a {type(tensor).__name__}")
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided:
        raise Unserved(f"the {name} of a {_kind(module)} is {tensor.dtype}, {tensor.layout}")
    return tensor


def _base_and_adapters(
    module: nn.Module, plain: type, adapted: type, own: bool = False
) -> tuple[nn.Module, tuple[Adapter, ...], tuple[Dropped, ...]]:
    """The base layer, its active adapters, and those of them that drop out."""
    if type(module) is plain:
        check_hooks(module, own)
        return module, (), ()
    if type(module) is not adapted:
        layer = " (an adapter that is not LoRA's)" if isinstance(module, BaseTunerLayer) else ""
        raise Unserved(f"{_kind(module)}{layer} in place of {plain.__name__}")
    check_hooks(module, own)
    # A layer at the model's end that was served before PEFT wrapped it.
    base = expect(module._modules.get("base_layer"), plain, own=own)
    active = list(active_adapters(module, plain))
    adapters = tuple(adapter for p, adapter in active if p == 0)
    return base, adapters, tuple(dropped for dropped in active if dropped.p > 0)


def active_adapters(layer: BaseTunerLayer, plain: type) -> Iterable[Dropped]:
    """What PEFT's forward adds to the base layer."""
    if layer.disable_adapters:
        if layer.merged:
            raise Unserved("merged adapters are disabled: PEFT's forward unmerges them")
        return
    if layer.merged:
        return
    attributes, children = layer.__dict__, layer._modules
    if attributes.get("fan_in_fan_out"):
        raise Unserved("an adapter has fan_in_fan_out")
    if not attributes.get("cast_input_dtype_enabled", True):
        raise Unserved("an adapter's input cast is switched off")
    variants = attributes.get("lora_variant") or children.get("lora_variant") or {}
    doras = attributes.get("use_dora") or {}
    all_a, all_b, dropouts = (children[name]._modules for name in ("lora_A", "lora_B", "lora_dropout"))
    for name in layer.active_adapters:
        if name not in all_a:
            continue
        if name in variants or doras.get(name):
            raise Unserved(f"adapter {name!r} is not plain LoRA ({type(variants.get(name, 'DoRA')).__name__})")
        a, b = expect(all_a[name], plain), expect(all_b[name], plain)
        if a.bias is not None or b.bias is not None:
            raise Unserved(f"adapter {name!r} has lora_bias")
        dropout = expect(dropouts[name], nn.Identity, nn.Dropout)
        p = dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0
        scale = layer.scaling[name]
        if isinstance(scale, Tensor):
            raise Unserved(f"the scaling of adapter {name!r} is a tensor")
        yield Dropped(p, Adapter(_tensor(a, "weight"), _tensor(b, "weight"), float(scale)))
