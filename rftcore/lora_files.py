"""LoRA files in diffusers' layout: found, checked against the model they are for, and loaded in full or not at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rftcore.training.errors import UsageError
from rftcore.training.weights import FILE

_COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


class LoraFile(NamedTuple):
    """A LoRA and how much of it is wanted."""

    path: Path
    scale: float


def parse(argument: str) -> LoraFile:
    """The file that `PATH` or `PATH:scale` stands for; a folder stands for the file that training leaves in it.

    Raises: UsageError where there is none, or the scale is no number.
    """
    name, colon, scale = argument.rpartition(":")
    path, factor = Path(argument), 1.0
    if colon and not path.exists():
        try:
            path, factor = Path(name), float(scale)
        except ValueError:
            if Path(name).exists():
                raise UsageError(f"--lora {argument}: the scale {scale!r} is no number; write {name}:0.7") from None
    if not math.isfinite(factor):
        raise UsageError(f"--lora {argument}: the scale must be a finite number")
    if path.is_dir():
        path = path / FILE
        if not path.is_file():
            raise UsageError(f"--lora {argument}: {path.parent} holds no {FILE}; give the .safetensors file itself")
    elif not path.is_file():
        raise UsageError(f"--lora {argument}: there is no file or folder {path}")
    elif path.suffix != ".safetensors":
        raise UsageError(f"--lora {argument}: {path.name} is no .safetensors file, the one kind that is read")
    return LoraFile(path, factor)


def load(pipe: DiffusionPipeline, loras: Sequence[LoraFile]) -> None:
    """Adds the LoRAs to a pipeline, all active, each with its scale; the UNet's keep the precision of their file.

    Raises: UsageError for a file that is of another base model, of another layout, or broken; it names the first key
        that does not fit.
    """
    for number, lora in enumerate(loras):
        name = f"lora_{number}"
        weights = _checked(pipe, lora.path)
        try:
            pipe.load_lora_weights(str(lora.path.parent), weight_name=lora.path.name, adapter_name=name)
        except (ValueError, RuntimeError, KeyError) as error:
            raise UsageError(f"--lora {lora.path} does not load: {error}") from error
        _widen(pipe.unet, name, weights)
    if loras:
        names = [f"lora_{number}" for number in range(len(loras))]
        pipe.set_adapters(names, [lora.scale for lora in loras])


def _checked(pipe: DiffusionPipeline, path: Path) -> dict[str, Tensor]:
    """The UNet's LoRA weights of a file by PEFT's names, each of which fits the UNet."""
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UsageError(f"--lora {path} is no readable safetensors file: {error}") from error
    # diffusers would drop DoRA's magnitudes with a warning, and give other images.
    for key in keys:
        if "dora_scale" in key or "lora_magnitude_vector" in key:
            raise UsageError(f"--lora {path} is a DoRA ({key}), which diffusers cannot load; train a plain LoRA")
    state, *_ = pipe.lora_state_dict(str(path.parent), weight_name=path.name, unet_config=pipe.unet.config)
    for key in state:
        component = key.split(".")[0]
        if component not in _COMPONENTS or not hasattr(pipe, component):
            parts = ", ".join(f"{name}." for name in _COMPONENTS if hasattr(pipe, name))
            raise UsageError(
                f"--lora {path}: {key} belongs to no part of a {type(pipe).__name__}; in diffusers' layout "
                f"(save_lora_weights) every key begins with one of {parts}"
            )
    weights = {key.removeprefix("unet."): value for key, value in state.items() if key.startswith("unet.")}
    if weights and not any("lora_A" in key for key in weights):
        weights = convert_unet_state_dict_to_peft(weights)
    if not weights and not keys:
        raise UsageError(f"--lora {path} holds no weights")
    _check_fits(pipe.unet, weights, path)
    return weights


def _check_fits(unet: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    modules = {name.replace(".base_layer", ""): module for name, module in unet.named_modules()}
    for key, value in weights.items():
        name, _, part = key.partition(".lora_")
        if part not in ("A.weight", "B.weight"):
            continue
        module = modules.get(name)
        weight = getattr(module, "weight", None)
        if weight is None:
            raise UsageError(
                f"--lora {path} is of another base model: it adapts {name}, and this UNet has no such layer"
            )
        axis, side = (1, "inputs") if part == "A.weight" else (0, "outputs")
        if value.shape[axis] != weight.shape[axis]:
            raise UsageError(
                f"--lora {path} is of another base model: {key} is {tuple(value.shape)}, and {name} of this UNet has "
                f"{weight.shape[axis]} {side}, not {value.shape[axis]}"
            )


def _widen(unet: nn.Module, adapter: str, weights: Mapping[str, Tensor]) -> None:
    """Takes back the rounding to a low-precision UNet's dtype: adapters are trained in fp32."""
    parameters = dict(unet.named_parameters())
    for key, value in weights.items():
        name, _, part = key.rpartition(".")
        parameter = parameters.get(f"{name}.{adapter}.{part}")
        if parameter is not None and torch.promote_types(parameter.dtype, value.dtype) != parameter.dtype:
            parameter.data = value.to(parameter.device, torch.promote_types(parameter.dtype, value.dtype))
