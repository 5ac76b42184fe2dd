"""A checkpoint that is one file: what it holds, told by its keys, and the pipeline that is made of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import SafetensorError, safe_open

from rftcore.errors import UsageError
from rftcore.training.config import ModelConfig

SUFFIXES = (".safetensors", ".ckpt")
# How many times the weights may be held under "state_dict"; a training script's checkpoint does it once.
_WRAPPED = 3
_UNET, _VAE = "model.diffusion_model.", "first_stage_model."
_FIRST, _LAST = f"{_UNET}input_blocks.0.0.weight", f"{_UNET}out.2.weight"


class Kind(NamedTuple):
    """What is made of a file.

    Attributes:
        configs: the pipeline on the hub whose configs and tokenizers fit; None where the keys do not tell which do.
    """

    name: str
    pipeline: type[StableDiffusionPipeline] | type[StableDiffusionXLPipeline]
    configs: str | None


SD1 = Kind("Stable Diffusion 1", StableDiffusionPipeline, "stable-diffusion-v1-5/stable-diffusion-v1-5")
SD2 = Kind("Stable Diffusion 2", StableDiffusionPipeline, None)
SDXL = Kind("SDXL", StableDiffusionXLPipeline, "stabilityai/stable-diffusion-xl-base-1.0")

# Ending of a text encoder's prefix -> what is told by it.
_TEXT_ENCODERS = {
    "conditioner.embedders.1.": SDXL,
    "cond_stage_model.model.": SD2,
    "cond_stage_model.transformer.": SD1,
}
# A part of a key -> what a file with such a key is, and what to do.
_NOT_SERVED = {
    "joint_blocks.": "is Stable Diffusion 3, a transformer, which is not served; give an SD or SDXL checkpoint",
    "double_blocks.": "is Flux, or a transformer like it, which is not served; give an SD or SDXL checkpoint",
    "control_model.": "is a ControlNet; fine-tune the text-to-image model that it steers",
    "edm_": "is a model of EDM's noise (Playground 2.5, CosXL), which is not served; give SDXL",
    "lora_": "is a LoRA; give the model that it is for, and the LoRA as model.fuse_lora",
}


def load(path: Path, config: ModelConfig, dtype: torch.dtype, vae: AutoencoderKL | None) -> DiffusionPipeline:
    """The pipeline of a file in the original layout, all of its models in `dtype`, with averaged weights where it has both.

    Args:
        vae: in place of the file's own.

    Raises:
        UsageError: for a file that is not served or not readable, and where its configs cannot be had or do not fit.
    """
    shapes = _shapes(path)
    kind = _kind(shapes, path)
    if vae is None and not any(key.startswith(_VAE) for key in shapes):
        raise UsageError(f"{path} holds no VAE ({_VAE}...); set model.vae to the one that goes with it")
    configs = _configs(kind, config, path)
    no_checker = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}
    try:
        pipe = kind.pipeline.from_single_file(
            str(path),
            config=configs,
            torch_dtype=dtype,
            extract_ema=True,
            **({} if vae is None else {"vae": vae}),
            **(no_checker if kind.pipeline is StableDiffusionPipeline else {}),
        )
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, SafetensorError) as error:
        # What diffusers says of a UNet or VAE whose weights are not all there.
        if "meta tensor" in str(error):
            raise UsageError(_lacking("weights", path, configs)) from error
        raise UsageError(f"{path} is {kind.name} and does not load with the configs of {configs}: {error}") from error
    _check_whole(pipe, path, configs)
    _check_prediction(pipe, shapes, path, configs)
    return pipe


def configs_name(path: Path, config: ModelConfig) -> str:
    """The pipeline whose configs a file is built with: a hub name or a folder. Raises: UsageError as `load`."""
    return _configs(_kind(_shapes(path), path), config, path)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Key -> shape, without reading a safetensors file's weights."""
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path} is no checkpoint that is read; one file must be {' or '.join(SUFFIXES)}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} is no readable safetensors file: {error}; fetch it again") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    # What is no pickle, or half of one, makes errors of every kind.
    except Exception as error:
        # What torch says of it is how to load it all the same.
        raise UsageError(
            f"{path} does not load as tensors alone ({type(error).__name__}): a pickle of anything else may run code and "
            "is not opened, and a file that is not whole cannot be; give the same model as .safetensors, or fetch it again"
        ) from error
    # A pickle can hold itself.
    for _ in range(_WRAPPED):
        if isinstance(state, Mapping) and "state_dict" in state:
            state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise UsageError(f"{path} holds a {type(state).__name__}, no weights by their names")
    return {
        key: tuple(value.shape)
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor)
    }


def _kind(shapes: Mapping[str, tuple[int, ...]], path: Path) -> Kind:
    for part, what in _NOT_SERVED.items():
        if any(key.startswith(part) or f".{part}" in key for key in shapes):
            raise UsageError(f"{path} {what}")
    if len(shapes.get(_FIRST, ())) < 2 or not shapes.get(_LAST):
        raise UsageError(f"{path} is no checkpoint of a whole model: {_what_else(shapes)}")
    takes, gives = shapes[_FIRST][1], shapes[_LAST][0]
    if takes != gives:
        raise UsageError(
            f"{path}: its UNet takes {takes} channels and gives {gives}, so it is an inpainting, editing, depth or "
            "upscaling model, which is not served; give the text-to-image model that it was made from"
        )
    for prefix, kind in _TEXT_ENCODERS.items():
        if any(key.startswith(prefix) for key in shapes):
            return kind
    if any(key.startswith("conditioner.embedders.0.model.") for key in shapes):
        raise UsageError(
            f"{path} is SDXL's refiner, which is not served: fine-tune the base model, and refine its images afterwards"
        )
    raise UsageError(f"{path} holds a UNet and no text encoder that is known; give a checkpoint of the whole model")


def _what_else(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if "conv_in.weight" in shapes and any(key.startswith("down_blocks.") for key in shapes):
        return "it is one UNet in diffusers' layout; give the pipeline's folder"
    if any(key.startswith("decoder.") for key in shapes):
        return "it is a VAE alone; give it as model.vae"
    first = ", ".join(sorted(shapes)[:3])
    return f"it has no {_FIRST}, its keys are {first}, ..." if shapes else "it is empty"


def _configs(kind: Kind, config: ModelConfig, path: Path) -> str:
    """Where the configs come from, once they are known to be there and of the right kind."""
    name = config.original_config or kind.configs
    if name is None:
        raise UsageError(
            f"{path} is {kind.name}, whose weights do not tell noise from v-prediction; set model.original_config to the "
            "pipeline that it goes with (hub name or folder): stabilityai/stable-diffusion-2-1 predicts v at 768 px, "
            "stabilityai/stable-diffusion-2-1-base the noise at 512 px"
        )
    try:
        found = DiffusionPipeline.load_config(name, revision=None).get("_class_name")
    except (OSError, ValueError) as error:
        whose = (
            f"model.original_config={name!r}" if config.original_config else f"{name}, whose configs {kind.name} has,"
        )
        raise UsageError(
            f"{path} is {kind.name}, and its configs and tokenizers are not in the file: {whose} holds no "
            f"model_index.json here and did not come from the hub. Without network: run `hf download {name} --include "
            "'*.json' '*.txt' --local-dir FOLDER` on a machine with one, copy FOLDER here and set model.original_config "
            "to it"
        ) from error
    if found != kind.pipeline.__name__:
        raise UsageError(
            f"{path} is {kind.name}, and model.original_config={name!r} is of a {found}; give that of a "
            f"{kind.pipeline.__name__}"
        )
    return name


def _check_whole(pipe: DiffusionPipeline, path: Path, configs: str) -> None:
    """A weight that the file lacks stays without values."""
    for name, model in pipe.components.items():
        missing = [key for key, value in model.state_dict().items() if value.is_meta] if _is_model(model) else []
        if missing:
            raise UsageError(_lacking(f"{len(missing)} weights of its {name}, {missing[0]} first,", path, configs))


def _lacking(what: str, path: Path, configs: str) -> str:
    return (
        f"{path} lacks {what} that the configs of {configs} ask for: the file is broken, or model.original_config is of "
        "another model"
    )


def _is_model(component: object) -> bool:
    return isinstance(component, torch.nn.Module)


def _check_prediction(pipe: DiffusionPipeline, shapes: Mapping[str, object], path: Path, configs: str) -> None:
    """SDXL models of v-prediction are marked by an empty key."""
    kind = pipe.scheduler.config.prediction_type
    if "v_pred" in shapes and kind != "v_prediction":
        raise UsageError(
            f"{path} is marked as a model of v-prediction, and the configs of {configs} say {kind}; set "
            "model.original_config to a pipeline whose scheduler_config.json has prediction_type v_prediction"
        )
