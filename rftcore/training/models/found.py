"""What a user has set on a pipeline before it was given to a trainer: respected, or refused with the way to undo it."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import nn

from rftcore.blocks.served import served
from rftcore.errors import UsageError

_MODELS = ("unet", "vae", "text_encoder", "text_encoder_2")


def check(pipe: DiffusionPipeline) -> None:
    """Raises UsageError with everything set on the pipeline, or done to its models, that training cannot respect.

    Respected are: attention processors, xformers' and attention slicing among them, and FreeU, whose blocks run their
    own forwards; VAE slicing and tiling; channels_last; gradient checkpointing; tokens of textual inversion; adapters
    of text encoders. A safety checker is not run: rewards see every image.
    """
    models = {name: model for name in _MODELS if isinstance(model := getattr(pipe, name, None), nn.Module)}
    found = _placed(pipe, models)
    for name, model in models.items():
        if name in ("unet", "vae"):
            found += _replaced(name, model)
    if found:
        raise UsageError("the pipeline cannot be trained as it is set: " + "; ".join(found))


def _placed(pipe: DiffusionPipeline, models: dict[str, nn.Module]) -> list[str]:
    """Weights that are moved about, where training has each in its place."""
    if getattr(pipe, "hf_device_map", None) is not None:
        return [
            f"it was loaded with device_map={pipe.hf_device_map}, and each process trains on one device; call "
            "pipeline.reset_device_map()"
        ]
    for name, model in models.items():
        hooks = {type(module._hf_hook).__name__ for module in model.modules() if hasattr(module, "_hf_hook")}
        if hooks:
            return [
                f"{name} is offloaded ({', '.join(sorted(hooks))}), and a chain needs the UNet at every step; call "
                "pipeline.remove_all_hooks(): the text encoders leave the device by themselves, and memory.budget bounds "
                "the rest"
            ]
        if any(parameter.is_meta for parameter in model.parameters()):
            return [f"{name} has weights on the meta device, which have no values; load it whole"]
    return []


def _replaced(name: str, model: nn.Module) -> list[str]:
    """Why gradients would not be those of the model's own weights and forward."""
    found = []
    if getattr(model, "_orig_mod", None) is not None:
        return [f"{name} is compiled; give its _orig_mod, and set memory.compile and memory.accelerate=false"]
    hooks = sorted(
        {hook for module in model.modules() for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {})}
    )
    if hooks:
        found.append(
            f"{name} has diffusers' hooks ({', '.join(hooks)}), which move, cast or skip what its gradient needs; load it "
            "without group offloading, layerwise casting and caches"
        )
    if _has_another_forward(model):
        found.append(f"{name}.forward was replaced (by DeepCache or its like), which its gradient would not know of")
    if (what := _quantised(model)) and not hooks:
        found.append(
            f"{name} is quantised ({what}), and its gradient needs weights in floating point; load it in bf16 or fp16 "
            "without a quantization_config"
        )
    if name == "unet":
        if getattr(model, "encoder_hid_proj", None) is not None or model.config.get("encoder_hid_dim_type") is not None:
            found.append(
                "the UNet has an IP-Adapter or another projection of its conditioning, and prompts are its only one here; "
                "call pipeline.unload_ip_adapter()"
            )
        # Unfused, a module keeps its mark, and not its processor.
        if any(type(getattr(module, "processor", None)).__name__.startswith("Fused") for module in model.modules()):
            found.append(
                "the UNet's attention projections are fused, so that an adapter on to_q, to_k and to_v would do nothing; "
                "call pipeline.unfuse_qkv_projections()"
            )
    return found


def _has_another_forward(model: nn.Module) -> bool:
    forward = model.__dict__.get("forward")
    # accelerate leaves the model's own as an attribute when it takes its hooks away, and keeps it where it casts.
    own = getattr(forward, "__func__", None) is type(model).forward
    return not (forward is None or own or served(model) is not None or "_original_forward" in model.__dict__)


def _quantised(model: nn.Module) -> str | None:
    for key, parameter in model.named_parameters():
        # A subclass of tensors keeps its values in another form.
        if type(parameter.data) is not torch.Tensor:
            return f"{key} is a {type(parameter.data).__name__}"
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            return f"{key} is {parameter.dtype}"
    return None
