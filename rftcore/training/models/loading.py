"""The pipeline that a config names: from a hub, a folder or one file, with its VAE and LoRAs, sound in every weight."""

from __future__ import annotations

import os.path
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from rftcore import digits
from rftcore.errors import UsageError
from rftcore.training.config import ModelConfig
from rftcore.training.models import finite, fusing, served, single_file, whole

_NAME = "model.pretrained_model_name_or_path"
# What a folder of broken or unfitting files raises.
_BROKEN = (OSError, ValueError, RuntimeError, KeyError, AttributeError, SafetensorError)
# Of a VAE: which latents it reads.
_LATENTS = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")


def load(config: ModelConfig, dtype: torch.dtype, unet_dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """The pipeline of a hub name, a folder, a checkpoint file, or the embedded digits, of the class that it was saved as.

    Args:
        dtype: of all its models.
        unet_dtype: of its UNet, where that is another.

    Raises:
        UsageError: where it cannot be loaded, is of a kind that is not served, which is asked before its weights are
            read or fetched, or holds weights that are NaN or inf; for a VAE of other latents, and a LoRA of another base.
    """
    dtypes = {"unet": unet_dtype or dtype, "default": dtype}
    name = config.pretrained_model_name_or_path
    path = Path(name)
    # os.path, and not pathlib, says no of names that no file can have.
    if os.path.isfile(path):
        pipe = _of_file(path, config, dtypes)
    else:
        if config.original_config is not None:
            raise UsageError(
                f"model.original_config={config.original_config!r} is for a checkpoint that is one file, and {_NAME}="
                f"{name!r} is none; leave it null: a pipeline brings its own configs"
            )
        pipe = _of_pipeline(name, config, dtypes)
    served.check(pipe)
    check_finite(pipe, name)
    fusing.fuse(pipe, config.fuse_lora)
    return pipe


def check_finite(pipe: DiffusionPipeline, source: str) -> None:
    """Raises UsageError where a weight of any of the pipeline's models is NaN or inf."""
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, name, None)
        if isinstance(model, torch.nn.Module):
            finite.check(model, name, source)


def _of_file(path: Path, config: ModelConfig, dtypes: Mapping[str, torch.dtype]) -> DiffusionPipeline:
    if config.variant is not None or config.revision is not None:
        raise UsageError(
            f"model.variant={config.variant!r} and model.revision={config.revision!r} are a pipeline's, and {path} is one "
            "file; leave both null, and give the file that you want"
        )
    vae = None
    if config.vae is not None:
        vae = _load_vae(config, single_file.configs_name(path, config), None, dtypes["default"])
    # One precision is loaded: the wider, from which the other is rounded as it would be from the file.
    wide = torch.promote_types(dtypes["unet"], dtypes["default"])
    pipe = single_file.load(path, config, wide, vae)
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            component.to(dtypes.get(name, dtypes["default"]))
    return pipe


def _of_pipeline(name: str, config: ModelConfig, dtypes: dict[str, torch.dtype]) -> DiffusionPipeline:
    source = str(digits.path()) if name == "rftcore.digits" else name
    given: dict[str, Any] = {}
    try:
        kind = DiffusionPipeline.load_config(source, revision=config.revision).get("_class_name")
        if kind not in served.SERVED:
            raise UsageError(served.not_served(f"{_NAME}={name!r} is a {kind}"))
        if kind == StableDiffusionPipeline.__name__:
            # Other classes do not know a safety checker.
            given |= {"safety_checker": None, "requires_safety_checker": False}
        if config.vae is not None:
            if kind in [unconditional.__name__ for unconditional in served.UNCONDITIONAL]:
                raise UsageError(f"model.vae={config.vae!r}, and the {kind} makes pixels, without a VAE; leave it null")
            given["vae"] = _load_vae(config, source, config.revision, dtypes["default"])
        pipe = DiffusionPipeline.from_pretrained(
            source, revision=config.revision, variant=config.variant, torch_dtype=dtypes, **given
        )
    except UsageError:
        raise
    except _BROKEN as error:
        raise UsageError(f"{_NAME}={name!r} does not load: {_why(name, config, error)}") from error
    if os.path.isdir(source):
        whole.check(pipe, Path(source), config.variant, without=given)
    return pipe


def _load_vae(config: ModelConfig, configs: str, revision: str | None, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE of `config.vae`, once it is known to read the model's latents.

    Args:
        configs: the pipeline of the model itself, at this revision.
    """
    name = config.vae or ""
    try:
        if os.path.isfile(name):
            vae = AutoencoderKL.from_single_file(name, config=configs, subfolder="vae", torch_dtype=dtype)
        else:
            vae = AutoencoderKL.from_pretrained(name, torch_dtype=dtype, **_vae_folder(name))
    except _BROKEN as error:
        raise UsageError(
            f"model.vae={name!r} does not load as an AutoencoderKL: {_first_line(error)}. Give a folder with config.json "
            f"and diffusion_pytorch_model.safetensors, a pipeline's folder, or a .safetensors file; without network: `hf "
            "download NAME --local-dir FOLDER` on a machine with one, and copy FOLDER here"
        ) from error
    folder = Path(name, *_vae_folder(name).values())
    if os.path.isdir(folder):
        whole.check_model(vae, folder, None)
    own = AutoencoderKL.load_config(configs, subfolder="vae", revision=revision)
    for key in _LATENTS:
        if key in own and own[key] != vae.config.get(key):
            raise UsageError(
                f"model.vae={name!r} reads other latents than the model's own VAE: its {key} is {vae.config.get(key)}, the "
                f"model's {own[key]}; give a VAE that was made for this model"
            )
    return vae


def _vae_folder(name: str) -> dict[str, str]:
    """A pipeline has its VAE in a subfolder."""
    return {"subfolder": "vae"} if os.path.isfile(Path(name) / "model_index.json") else {}


def _why(name: str, config: ModelConfig, error: Exception) -> str:
    """What is wrong with a place that no pipeline came from, and what to do."""
    path = Path(name)
    if os.path.isdir(path):
        if (path / "model_index.json").is_file():
            return _wrong_variant(path, config.variant) or str(error)
        return (
            "the folder holds no model_index.json, so it is no pipeline; give one that pipeline.save_pretrained(folder)"
            f" wrote{_single_model(path)}"
        )
    if not _is_hub_name(name):
        return "there is no such folder or file"
    # diffusers says of a hub that it cannot reach that the repository lacks the file.
    unreachable = isinstance(error.__context__, LocalEntryNotFoundError)
    reason = "the hub cannot be reached, and its cache does not hold it" if unreachable else _first_line(error)
    revision = f" --revision {config.revision}" if config.revision else ""
    return (
        f"there is no such folder here, and it did not come from the hub ({reason}). Without network: run "
        f"`hf download {name}{revision} --local-dir FOLDER` on a machine with one, copy FOLDER here and set "
        f"{_NAME} to it"
    )


def _single_model(folder: Path) -> str:
    if not any(folder.glob("*.safetensors")):
        return ""
    return " (this one is a single model, or a LoRA; a checkpoint that is one file is given by the file's own path)"


def _wrong_variant(folder: Path, variant: str | None) -> str | None:
    """What to set model.variant to, where the folder has the weights in other variants alone."""
    there = {variant for part in folder.iterdir() for variant in whole.variants(part)}
    if variant in there or not there:
        return None
    wanted = "without a variant" if variant is None else f"of the variant {variant!r}"
    named = sorted(variant for variant in there if variant is not None)
    known = " or ".join([*named, *(["null"] if None in there else [])])
    return f"the folder holds no weights {wanted}; set model.variant to {known}, which it has"


def _is_hub_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].strip()
