"""The UNet with its PEFT adapters switched off, for a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper


@contextlib.contextmanager
def adapters_off(unet: torch.nn.Module) -> Iterator[None]:
    """Runs the block on the base model: the pretrained reference of a KL term.

    PEFT's own switch changes what requires grad (and makes frozen adapters trainable when it turns them on again);
    this one leaves every `requires_grad` as it is.

    Raises:
        ValueError: when the UNet has no adapter, one that is merged into the base weights, or trained weights that
            belong to none.
    """
    layers = [module for module in unet.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    if not any(isinstance(layer, BaseTunerLayer) for layer in layers):
        raise ValueError(
            "the reference is the UNet with its adapters off, and this UNet has no PEFT adapter; "
            "add one with unet.add_adapter(LoraConfig(...))."
        )
    if any(layer.merged for layer in layers if isinstance(layer, BaseTunerLayer)):
        raise ValueError(
            "an adapter is merged into the base weights, so there is no base model to refer to; unmerge it."
        )
    owned = {id(parameter) for layer in layers for parameter in _own_parameters(layer)}
    trained = [name for name, p in unet.named_parameters() if p.requires_grad and id(p) not in owned]
    if trained:
        raise ValueError(
            f"{trained[0]!r} and {len(trained) - 1} more trainable parameters are not an adapter's, so switching the "
            "adapters off does not give the pretrained model back; freeze them, or do without a reference."
        )
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled


def _own_parameters(layer: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that are not used when the layer's adapters are off."""
    if isinstance(layer, AuxiliaryTrainingWrapper):
        original = {id(parameter) for parameter in layer.original_module.parameters()}
        return [parameter for parameter in layer.parameters() if id(parameter) not in original]
    holders = [getattr(layer, name) for name in layer.adapter_layer_names]
    return [parameter for holder in holders for parameter in holder.parameters()]
