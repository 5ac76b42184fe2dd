"""LoRAs in a pipeline: checked against its models, added in full or not at all, and scaled."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from rftcore.errors import UsageError
from rftcore.lora import files
from rftcore.lora.files import LoraFile
from rftcore.lora.layers import COMPONENTS, Layer


def load(pipe: DiffusionPipeline, loras: Sequence[LoraFile]) -> list[str]:
    """Adds LoRAs of any layout to a pipeline, all active, each with its scale; returns the components that they change.

    Adapters keep the precision of their file where the model's is lower. They are named lora_0, lora_1, ...

    Raises: UsageError for a file that is of another base model or broken; it names the first key that does not fit.
    """
    found: dict[str, list[str]] = {}
    read = [(f"lora_{number}", lora.path, files.read(lora.path)) for number, lora in enumerate(loras)]
    for name, path, lora in read:
        for component in lora.components:
            model = getattr(pipe, component, None)
            if model is None:
                key = next(iter(lora.of(component)))
                raise UsageError(
                    f"{path} is of another base model: it adapts {component}.{key}, and this {type(pipe).__name__} has "
                    f"no {component}"
                )
            _check_fits(component, model, _named_as(model, lora.of(component)), path)
            found.setdefault(component, []).append(name)
    for name, _, lora in read:
        for component in lora.components:
            model = getattr(pipe, component)
            _add(model, name, _named_as(model, lora.of(component)))
    for component, names in found.items():
        for module in getattr(pipe, component).modules():
            if isinstance(module, BaseTunerLayer):
                module.set_adapter([name for name in names if name in module.scaling])
                for key, parameter in module.named_parameters():
                    # Active ones are made trainable by PEFT.
                    parameter.requires_grad_(parameter.requires_grad and "lora_" not in key)
    set_scales(pipe, [lora.scale for lora in loras])
    return [component for component in COMPONENTS if component in found]


def set_scales(pipe: DiffusionPipeline, scales: Sequence[float]) -> None:
    """Gives every LoRA that `load` added its scale, in the models that the pipeline still has."""
    names = [f"lora_{number}" for number in range(len(scales))]
    for component in COMPONENTS:
        model = getattr(pipe, component, None)
        for module in () if model is None else model.modules():
            if isinstance(module, BaseTunerLayer):
                for name, scale in zip(names, scales, strict=True):
                    module.set_scale(name, scale)


def _named_as(model: nn.Module, layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """The layers by the model's names: transformers 5 has no "text_model." in a CLIPTextModel."""
    if isinstance(getattr(model, "text_model", None), nn.Module):
        return dict(layers)
    return {name.removeprefix("text_model."): layer for name, layer in layers.items()}


def _check_fits(component: str, model: nn.Module, layers: Mapping[str, Layer], path: object) -> None:
    kind = "UNet" if component == "unet" else component
    modules = {name.replace(".base_layer", ""): module for name, module in model.named_modules()}
    for name, layer in layers.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear | nn.Conv2d):
            found = "no such layer" if module is None else f"a {type(module).__name__} there, which takes no LoRA"
            raise UsageError(f"{path} is of another base model: it adapts {name}, and this {kind} has {found}")
        weight = module.weight
        for part, tensor, axis, side in (("lora_A", layer.down, 1, "inputs"), ("lora_B", layer.up, 0, "outputs")):
            if tensor.shape[axis] != weight.shape[axis]:
                raise UsageError(
                    f"{path} is of another base model: {component}.{name}.{part}.weight is {tuple(tensor.shape)}, and "
                    f"{name} of this {kind} has {weight.shape[axis]} {side}, not {tensor.shape[axis]}"
                )
        if layer.weight_shape != tuple(weight.shape):
            raise UsageError(
                f"{path} is of another base model: {component}.{name} changes a weight of {layer.weight_shape}, and "
                f"this {kind}'s is {tuple(weight.shape)}"
            )


def _add(model: nn.Module, adapter: str, layers: Mapping[str, Layer]) -> None:
    first = next(iter(layers.values()))
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,
        # Anchored: proj_in would be the end of other names, too.
        rank_pattern={f"^{name}": layer.rank for name, layer in layers.items()},
        alpha_pattern={f"^{name}": layer.alpha for name, layer in layers.items()},
        target_modules=list(layers),
    )
    with warnings.catch_warnings():
        # Several adapters are what was asked for.
        warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)
        inject_adapter_in_model(config, model, adapter_name=adapter)
    # As diffusers and transformers mark a model that they have loaded an adapter into.
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = True  # type: ignore[assignment]  # torch's stubs know tensors and modules alone
    for name, layer in layers.items():
        module = model.get_submodule(name)
        for parameter, value in (
            (module.lora_A[adapter].weight, layer.down),
            (module.lora_B[adapter].weight, layer.up),
        ):
            # Adapters are trained in fp32: a low-precision model's dtype would round them.
            wide = torch.promote_types(parameter.dtype, value.dtype)
            parameter.data = value.to(parameter.device, wide)
