"""What is trained: a LoRA or every weight of the UNet. Attached, saved as a user loads it, proven by reloading."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from rftcore.errors import RunError, UsageError, nearest
from rftcore.lora.files import FILE, PEFT_FILE
from rftcore.training.batches import derived_seed, generator
from rftcore.training.config import LoraConfig, RunConfig

# The subfolder of a whole UNet, as in a pipeline's own folder.
FOLDER = "unet"
ADAPTER = "default"
_PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Of the latents, or pixels, that a reloaded model is asked about.
_PROBED_SIDE = 32
_LOST = "The weights are in the checkpoint; please report this"
UNet: TypeAlias = UNet2DConditionModel | UNet2DModel


def master_dtype(config: RunConfig) -> torch.dtype:
    """What the UNet is loaded in: fp32 where its own weights are trained, else the run's precision.

    Small updates would be lost in low precision. The run's arithmetic is accelerate's autocast then.
    """
    return torch.float32 if config.train.weights == "full" else _PRECISIONS[config.mixed_precision]


def attach(pipe_or_unet: DiffusionPipeline | UNet, config: RunConfig, seed: int) -> None:
    """Makes what `config.train.weights` names trainable, and nothing else of the UNet.

    "lora" adds an adapter, the same for every process and run of this seed. Masters are fp32, or the UNet's dtype where
    that is wider.

    Raises:
        UsageError: when a name in lora.target_modules is no module's, or the UNet has adapters already.
    """
    unet: UNet = getattr(pipe_or_unet, "unet", pipe_or_unet)
    if any(isinstance(module, BaseTunerLayer) for module in unet.modules()):
        raise UsageError(
            "the UNet has an adapter already; make it part of the weights with pipeline.fuse_lora() and "
            "pipeline.unload_lora_weights(), or give a pipeline without"
        )
    if config.train.weights == "full":
        unet.requires_grad_(True)
    else:
        unet.requires_grad_(False)
        _add_lora(unet, config.lora, seed)
    for parameter in trainable(unet).values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def _add_lora(unet: UNet, config: LoraConfig, seed: int) -> None:
    for target in config.target_modules:
        _check_target(unet, target)
    lora = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,
        target_modules=list(config.target_modules),
        init_lora_weights=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(derived_seed(seed, "lora"))
        try:
            if _loads_by_pipeline(unet):
                unet.add_adapter(lora, adapter_name=ADAPTER)
            else:
                inject_adapter_in_model(lora, unet, adapter_name=ADAPTER)
        except ValueError as error:
            raise UsageError(f"lora.target_modules={config.target_modules}: {error}") from error


def _check_target(unet: UNet, target: str) -> None:
    """PEFT passes over a name that matches nothing as long as another one does, and prints a matching block whole."""
    modules = dict(unet.named_modules())
    layers = {_ending(name) for name, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)}
    found = [name for name in modules if f".{name}".endswith(f".{target}")]
    if not found:
        raise UsageError(
            f"lora.target_modules={target!r} is no module of the {type(unet).__name__}; {nearest(target, layers)}"
        )
    if blocks := [name for name in found if not isinstance(modules[name], nn.Linear | nn.Conv2d)]:
        raise UsageError(
            f"lora.target_modules={target!r} is {blocks[0]}, a {type(modules[blocks[0]]).__name__}, and an adapter "
            f"goes on a Linear or Conv2d layer; {nearest(target, layers)}"
        )


def _ending(name: str) -> str:
    """down_blocks.0.attentions.0.to_out.0 -> to_out.0"""
    parts = name.split(".")
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def _loads_by_pipeline(unet: UNet) -> bool:
    """Whether a diffusers pipeline loads this UNet's LoRA; UNet2DModel has no loader, and no add_adapter."""
    return isinstance(unet, UNet2DConditionModel)


def is_lora(unet: nn.Module) -> bool:
    """Whether what is trained is an adapter."""
    return ADAPTER in getattr(unet, "peft_config", {})


def trainable(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}


def trained_modules(unet: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The modules that are trained, each with its trained parameters: adapted ones, or all that have weights."""
    modules: dict[str, list[nn.Parameter]] = {}
    for name, parameter in trainable(unet).items():
        adapted, is_adapter, _ = name.partition(".lora_")
        modules.setdefault(adapted if is_adapter else name.rpartition(".")[0], []).append(parameter)
    return modules


def silent(unet: nn.Module) -> list[str]:
    """After a backward: the trained modules none of whose parameters has a gradient that is not zero.

    By module: before the first update B = 0 makes LoRA A's gradient exactly zero, and a key's bias never has one, as a
    softmax does not see it.
    """
    return [
        name
        for name, parameters in trained_modules(unet).items()
        if not any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in parameters)
    ]


def save(unet: UNet, folder: Path) -> Path:
    """Writes what was trained into `folder` as a user loads it (`usage` says how); returns the file or folder.

    A LoRA in diffusers' layout, with rank and alpha as metadata; that of a UNet2DModel in PEFT's; a whole UNet in the
    subfolder "unet", in its masters' precision. Each replaces what was there once it is written.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        temporary = Path(name)
        if not is_lora(unet):
            unet.save_pretrained(temporary / FOLDER)
            if (folder / FOLDER).exists():
                os.replace(folder / FOLDER, temporary / "replaced")
            os.replace(temporary / FOLDER, folder / FOLDER)
            return folder / FOLDER
        if _loads_by_pipeline(unet):
            _pipeline_class(unet).save_lora_weights(
                temporary,
                unet_lora_layers=get_peft_model_state_dict(unet, adapter_name=ADAPTER),
                unet_lora_adapter_metadata=unet.peft_config[ADAPTER].to_dict(),
            )
        else:
            _save_by_peft(unet, temporary)
        for file in sorted(temporary.iterdir()):
            os.replace(file, folder / file.name)
    return folder / (FILE if _loads_by_pipeline(unet) else PEFT_FILE)


def _save_by_peft(unet: UNet2DModel, folder: Path) -> None:
    unet.peft_config[ADAPTER].save_pretrained(folder)
    state = get_peft_model_state_dict(unet, adapter_name=ADAPTER)
    # The names that they have inside a PeftModel.
    state = {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(state, folder / PEFT_FILE, metadata={"format": "pt"})


def usage(unet: UNet, base: str, folder: str) -> str:
    """The lines of Python that load what `save` wrote.

    Args:
        base: the lines that make the model that was fine-tuned, in `pipeline`.
        folder: an expression for the folder that was saved into.
    """
    if not is_lora(unet):
        model = type(unet).__name__
        return (
            f"{base}\n\nfrom diffusers import {model}\n\n"
            f"pipeline.unet = {model}.from_pretrained({folder}, subfolder={FOLDER!r})"
        )
    if _loads_by_pipeline(unet):
        return f"{base}\npipeline.load_lora_weights({folder})"
    return (
        f"from peft import PeftModel\n{base}\n"
        f"PeftModel.from_pretrained(pipeline.unet, {folder})  # adds the LoRA to pipeline.unet, in place"
    )


@torch.no_grad()
def verify_reload(unet: UNet, folder: Path) -> float:
    """Loads what was saved into a fresh model as a user would and compares its output with the trained UNet's.

    Returns the difference for one random input: of a LoRA relative to its own effect, of a whole UNet to the output.
    Raises: RunError when what was reloaded does something else than what was trained.
    """
    was_training = unet.training
    unet.eval()
    try:
        return _verify_lora(unet, folder) if is_lora(unet) else _verify_full(unet, folder)
    finally:
        unet.train(was_training)


def _verify_lora(unet: UNet, folder: Path) -> float:
    fresh = _base(unet)
    trained, base = _probe(unet), _probe(fresh)
    if _loads_by_pipeline(unet):
        _bare_pipeline(fresh).load_lora_weights(folder)
        path = folder / FILE
    else:
        PeftModel.from_pretrained(fresh, folder)
        path = folder / PEFT_FILE
    _check_same(path, _adapter(unet), _adapter(fresh))
    reloaded = _probe(fresh)
    effect, difference = torch.linalg.norm(trained - base), torch.linalg.norm(trained - reloaded)
    low_precision = unet.dtype in (torch.bfloat16, torch.float16)
    # The reloaded adapter is rounded to a low-precision UNet's dtype, the trained one is not.
    tolerance = (5e-2 if low_precision else 1e-4) * effect + torch.finfo(unet.dtype).eps * torch.linalg.norm(base) * 8
    if not difference <= tolerance:
        raise RunError(
            f"{path} does not reload: its output differs from the trained UNet's by {difference:.3g}, the "
            f"adapter's own effect being {effect:.3g}. {_LOST}"
        )
    return float(difference / effect) if effect > 0 else 0.0


def _verify_full(unet: UNet, folder: Path) -> float:
    path = folder / FOLDER
    fresh = type(unet).from_pretrained(path, torch_dtype=unet.dtype).to(unet.device).eval()
    _check_same(path, unet.state_dict(), fresh.state_dict())
    trained, again = _probe(unet), _probe(fresh)
    size, difference = torch.linalg.norm(trained), torch.linalg.norm(trained - again)
    if not difference <= 1e3 * torch.finfo(unet.dtype).eps * size:
        raise RunError(
            f"{path} does not reload: its output differs from the trained UNet's by {difference:.3g}, the output's "
            f"norm being {size:.3g}. {_LOST}"
        )
    return float(difference / size) if size > 0 else 0.0


def _check_same(path: Path, trained: Mapping[str, Tensor], reloaded: Mapping[str, Tensor]) -> None:
    """The weights themselves: an output hardly moves by a few updates, in low precision by less than its rounding."""
    for name, value in trained.items():
        if name not in reloaded or not torch.equal(reloaded[name], value.to(reloaded[name])):
            raise RunError(f"{path} does not reload: {name} is not what was trained. {_LOST}")


def _adapter(unet: UNet) -> dict[str, Tensor]:
    """The tensors of the one adapter, whatever it is called, and each layer's scale, alpha / rank."""
    found = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, LoraLayer):
            ((adapter, scale),) = layer.scaling.items()
            found[f"{name}.scale"] = torch.tensor(scale)
            found |= {f"{name}.lora_A": layer.lora_A[adapter].weight, f"{name}.lora_B": layer.lora_B[adapter].weight}
    return found


def _base(unet: UNet) -> UNet:
    """A fresh model of the same class over the UNet's own weights, without its adapter."""
    with torch.device("meta"):
        base = type(unet).from_config(unet.config).eval()
    weights = {
        name.replace(".base_layer.", "."): value for name, value in unet.state_dict().items() if ".lora_" not in name
    }
    # The very tensors: there may be no room for a second UNet beside the first.
    base.load_state_dict(weights, assign=True)
    # Those that are made, not saved.
    for module_name, module in base.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = unet.get_submodule(module_name).get_buffer(name)
    return base


def _pipeline_class(unet: UNet2DConditionModel) -> type[StableDiffusionPipeline] | type[StableDiffusionXLPipeline]:
    is_xl = unet.config.addition_embed_type == "text_time"
    return StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline


def _bare_pipeline(unet: UNet2DConditionModel) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """A pipeline with nothing but the UNet."""
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "scheduler"))
    if _pipeline_class(unet) is StableDiffusionXLPipeline:
        return StableDiffusionXLPipeline(
            **nothing, unet=unet, text_encoder_2=None, tokenizer_2=None, add_watermarker=False
        )
    return StableDiffusionPipeline(
        **nothing, unet=unet, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _probe(unet: UNet) -> Tensor:
    """The output for one random input, in fp32 or wider, without an autocast that was wrapped around the forward."""
    config = unet.config
    sides = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size or (64, 64)
    # What is asked is whether the weights arrived, which small latents tell as well.
    sides = tuple(min(side, _PROBED_SIDE) for side in sides)
    source = generator("lora probe")

    def noise(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=source).to(unet.device, unet.dtype)

    sample = noise(config.in_channels, *sides)
    conditioning: dict[str, Any] = {}
    if isinstance(unet, UNet2DConditionModel):
        conditioning["encoder_hidden_states"] = noise(8, config.cross_attention_dim)
        if config.addition_embed_type == "text_time":
            width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            conditioning["added_cond_kwargs"] = {"text_embeds": noise(width), "time_ids": noise(6)}
    output = type(unet).forward(unet, sample, 500, **conditioning, return_dict=False)[0]
    return output.to(torch.promote_types(output.dtype, torch.float32))
