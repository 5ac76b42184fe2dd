"""Weights that a folder lacks: diffusers and transformers make them up at random and only warn."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import nn

from rftcore.errors import UsageError

_WEIGHTS = re.compile(
    r"(?:pytorch_model|diffusion_pytorch_model|model)"
    r"(?:\.(?P<variant>(?!safetensors|bin)[^.-]+))?(?:-\d+-of-\d+)?(?:\.(?P<legacy>(?!safetensors|bin)[^.]+))?"
    r"\.(?P<suffix>safetensors|bin)"
)
# Names that are other ones now, and are read as those: transformers before 5.6, diffusers before 0.12.
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def variants(folder: Path) -> dict[str | None, list[Path]]:
    """The files of weights in a model's folder, by variant; None for those without."""
    found: dict[str | None, list[Path]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := _WEIGHTS.fullmatch(file.name):
            found.setdefault(match["variant"] or match["legacy"], []).append(file)
    return found


def check(pipe: DiffusionPipeline, folder: Path, variant: str | None, *, without: Collection[str] = ()) -> None:
    """Raises UsageError where the folder of a pipeline lacks weights of its models, but for those `without`."""
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, name, None)
        if isinstance(model, nn.Module) and name not in without:
            # Early repositories have their UNet at the root.
            check_model(model, folder / name if (folder / name).is_dir() else folder, variant)


def check_model(model: nn.Module, folder: Path, variant: str | None) -> None:
    """Raises UsageError where the safetensors files of one model's folder lack some of its weights."""
    there = variants(folder)
    # A part without this variant is read without one.
    files = [file for file in there.get(variant) or there.get(None, []) if file.suffix == ".safetensors"]
    if not files:
        return
    keys = set()
    for file in files:
        with safe_open(file, framework="pt") as weights:
            keys |= {_name(key) for key in weights.keys()}  # noqa: SIM118
    missing = [key for key in model.state_dict() if _name(key) not in keys and not key.endswith("position_ids")]
    if missing:
        raise UsageError(
            f"{folder} lacks {len(missing)} weights of its {type(model).__name__}, {missing[0]} first, which would be made "
            "up at random; fetch it again, or save the whole pipeline by save_pretrained"
        )


def _name(key: str) -> str:
    parts = key.removeprefix("text_model.").split(".")
    return ".".join(_RENAMED.get(part, part) if "attentions" in parts else part for part in parts)
