"""The UNet with its PEFT adapters switched off, for a block."""

from __future__ import annotations

import contextlib

import torch
from peft.tuners.tuners_utils import BaseTunerLayer


@contextlib.contextmanager
def adapters_off(unet: torch.nn.Module):
    """Runs the block on the base model: the pretrained reference of a KL term.

    PEFT's own switch changes what requires grad (and makes frozen adapters trainable when it turns them on again);
    this one leaves every `requires_grad` as it is.

    Raises:
        ValueError: when the UNet has no adapter, or one that is merged into the base weights.
    """
    layers = [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]
    if not layers:
        raise ValueError(
            "the reference is the UNet with its adapters off, and this UNet has no PEFT adapter; "
            "add one with unet.add_adapter(LoraConfig(...))."
        )
    if any(layer.merged for layer in layers):
        raise ValueError("an adapter is merged into the base weights, so there is no base model to refer to; unmerge it.")
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in zip(layers, before, strict=True):
            layer._disable_adapters = disabled
