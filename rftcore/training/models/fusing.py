"""LoRAs that become part of the weights before training, such as the one that makes an LCM of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import recurse_remove_peft_layers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from rftcore.errors import UsageError
from rftcore.lora import files, loading
from rftcore.training.models import finite

_FLAG = "model.fuse_lora"


def fuse(pipe: DiffusionPipeline, loras: Sequence[str]) -> None:
    """Adds LoRAs, each `PATH` or `PATH:scale`, to the weights of the models that they change, and drops them.

    Each sum is rounded once, to the model's precision.

    Raises: UsageError for a file that is none, is broken, is of another base model, or makes weights NaN or inf.
    """
    try:
        for component in loading.load(pipe, [files.parse(argument, _FLAG) for argument in loras]):
            model = getattr(pipe, component)
            _merge(model)
            finite.check(model, component, f"{_FLAG}={loras}")
    except UsageError as error:
        message = str(error)
        raise UsageError(message if message.startswith(_FLAG) else f"{_FLAG}={loras}: {message}") from error


def _merge(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            dtype = layer.get_base_layer().weight.dtype
            # With its adapters: PEFT would round the change, too.
            layer.to(torch.promote_types(dtype, torch.float32))
            layer.merge()
            layer.get_base_layer().to(dtype)
    recurse_remove_peft_layers(model)
    # What is left of an adapter's traces would make the next one a second one.
    if hasattr(model, "peft_config"):
        del model.peft_config
    model._hf_peft_config_loaded = False  # type: ignore[assignment]  # torch's stubs know tensors and modules alone
