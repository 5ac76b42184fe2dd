"""LoRA files and folders: found, read whole or not at all, and written without losing what was there."""

from __future__ import annotations

import math
import os.path
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rftcore import documents
from rftcore.errors import UsageError
from rftcore.lora import layouts
from rftcore.lora.layers import COMPONENTS, Layer, Lora

# As diffusers and as PEFT call them.
FILE, PEFT_FILE, CONFIG_FILE = "pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"


class LoraFile(NamedTuple):
    """A LoRA and how much of it is wanted."""

    path: Path
    scale: float


def parse(argument: str, flag: str = "--lora") -> LoraFile:
    """What `PATH` or `PATH:scale` stands for: a .safetensors file, or a folder as training or PEFT leaves it.

    Raises: UsageError where there is none, or the scale is no number.
    """
    name, colon, scale = argument.rpartition(":")
    path, factor = Path(argument), 1.0
    # Of a name that no file can have, pathlib raises.
    if colon and not os.path.exists(path):
        try:
            path, factor = Path(name), float(scale)
        except ValueError:
            if os.path.exists(name):
                raise UsageError(f"{flag} {argument}: the scale {scale!r} is no number; write {name}:0.7") from None
    if not math.isfinite(factor):
        raise UsageError(f"{flag} {argument}: the scale must be a finite number")
    if os.path.isdir(path):
        if not (path / FILE).is_file() and not _peft_folders(path):
            raise UsageError(
                f"{flag} {argument}: {path} holds no {FILE} and no {CONFIG_FILE}; give the .safetensors file itself"
            )
        path = path / FILE if (path / FILE).is_file() else path
    elif not os.path.isfile(path):
        raise UsageError(f"{flag} {argument}: there is no file or folder {path}")
    elif path.suffix != ".safetensors":
        raise UsageError(f"{flag} {argument}: {path.name} is no .safetensors file, the one kind that is read")
    return LoraFile(path, factor)


def read(path: Path) -> Lora:
    """The LoRA of a file, or of a folder in PEFT's layout, which may have a subfolder for each part of a pipeline.

    Raises: UsageError for a file that is none, is broken, or is of a kind that is not served.
    """
    if path.is_file():
        config = None
        if path.name == PEFT_FILE and (path.parent / CONFIG_FILE).is_file():
            config = _read_config(path.parent / CONFIG_FILE)
        return _of_file(path, config)
    layers: dict[str, Layer] = {}
    configs: dict[str, dict[str, Any]] = {}
    metadata: dict[str, str] = {}
    for component, folder in _peft_folders(path).items():
        file = folder / PEFT_FILE
        if not file.is_file():
            raise UsageError(f"{folder} holds {CONFIG_FILE} and no {PEFT_FILE}; save the adapter as safetensors")
        part = _of_file(file, _read_config(folder / CONFIG_FILE), component)
        layers |= part.layers
        configs |= part.configs
        metadata |= part.metadata
    return Lora(layers, "peft", configs, metadata)


def write(lora: Lora, path: Path, layout: str = "diffusers", force: bool = False) -> Path:
    """Writes a LoRA in "diffusers", "peft" or "kohya" layout; returns the path. PEFT's is a folder.

    Raises: UsageError where something is there and `force` is not given, the layout does not know a layer, or the
        place cannot be written to.
    """
    check_free(path, layout, force)
    try:
        if layout == "peft":
            _write_folder(lora, path)
        else:
            state, metadata = layouts.to_kohya(lora, path) if layout == "kohya" else layouts.to_diffusers(lora)
            _write_file(state, path, metadata)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"-o {path} cannot be written ({error}); give another place") from error
    return path


def check_free(path: Path, layout: str, force: bool) -> None:
    """Raises UsageError where writing would replace something, or the name does not suit the layout."""
    if layout == "peft":
        if path.suffix == ".safetensors" or path.is_file():
            raise UsageError(f"-o {path}: PEFT's layout is a folder; give one")
        if path.is_dir() and any(path.iterdir()) and not force:
            raise UsageError(f"-o {path} is not empty; give another folder, or --force to write into it")
        if (path / FILE).exists():
            raise UsageError(f"-o {path} holds {FILE}, which would be read in place of what is written; give another")
        return
    if path.suffix != ".safetensors" or path.is_dir():
        raise UsageError(f"-o {path}: the result is one file; give a name that ends in .safetensors")
    if path.exists() and not force:
        raise UsageError(f"-o {path} is there already; give another name, or --force to replace it")


def _of_file(path: Path, config: Mapping[str, Any] | None, component: str | None = None) -> Lora:
    try:
        with safe_open(path, framework="pt") as file:
            keys, metadata = list(file.keys()), file.metadata() or {}
            state = {key: file.get_tensor(key) for key in keys}
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is no readable safetensors file: {error}") from error
    lora = layouts.read(state, metadata, path, config, component)
    if lora.layout == "peft" and config is None:
        raise UsageError(
            f"{path} is in PEFT's layout, whose alpha is in {CONFIG_FILE}, and there is none beside {PEFT_FILE}; give "
            "the folder that save_pretrained wrote"
        )
    return lora


def _peft_folders(path: Path) -> dict[str | None, Path]:
    """Component -> folder with PEFT's config; None for one whose keys must tell what it is of."""
    if (path / CONFIG_FILE).is_file():
        return {None: path}
    return {name: path / name for name in COMPONENTS if (path / name / CONFIG_FILE).is_file()}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = documents.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UsageError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise UsageError(f"{path} is no JSON object of settings")
    return config


def _write_folder(lora: Lora, path: Path) -> None:
    # One component needs no subfolder, unless it is one that its keys do not tell.
    first = lora.components[0]
    alone = len(lora.components) == 1 and all(layouts.tells_component(first, module) for module in lora.of(first))
    folders = {component: path if alone else path / component for component in lora.components}
    for component, folder in folders.items():
        _write_peft(lora, component, folder)
    # Adapters that were there would be read with the new one, or in place of it.
    for folder in (path, *(path / component for component in COMPONENTS)):
        if folder not in folders.values():
            (folder / CONFIG_FILE).unlink(missing_ok=True)
            (folder / PEFT_FILE).unlink(missing_ok=True)


def _write_peft(lora: Lora, component: str, folder: Path) -> None:
    state, config = layouts.to_peft(lora, component)
    _write_file(state, folder / PEFT_FILE, {**lora.metadata, "format": "pt"})
    (folder / CONFIG_FILE).write_text(layouts.config_text(config) + "\n", encoding="utf-8")


def _write_file(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Whole or not at all: written beside, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        save_file({key: value.detach().contiguous() for key, value in state.items()}, temporary, metadata=metadata)
        os.replace(temporary, path)
