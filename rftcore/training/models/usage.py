"""The lines of Python by which a user makes the pipeline that a config names, without rftcore."""

from __future__ import annotations

import shlex
from pathlib import Path

from diffusers import DiffusionPipeline

from rftcore.lora import files
from rftcore.training.config import ModelConfig
from rftcore.training.models import single_file


def lines(config: ModelConfig, pipeline_class: type[DiffusionPipeline]) -> str:
    """Lines that leave the pipeline as `loading.load` gives it, in fp32, in the variable `pipeline`."""
    name, kind = config.pretrained_model_name_or_path, pipeline_class.__name__
    imports, embedded = [kind], name == "rftcore.digits"
    base = "rftcore.digits.path()" if embedded else repr(name)
    options = {key: value for key in ("revision", "variant") if (value := getattr(config, key)) is not None}
    loader = "from_pretrained"
    if Path(name).is_file():
        loader, options = "from_single_file", {"config": single_file.configs_name(Path(name), config)}
    found = []
    if config.vae is not None:
        imports.insert(0, "AutoencoderKL")
        found.append(f"vae = AutoencoderKL.{_vae(config)}")
    given = [base, *(f"{key}={value!r}" for key, value in options.items()), *(["vae=vae"] if found else [])]
    found.append(f"pipeline = {kind}.{loader}({', '.join(given)})")
    by_peft = not hasattr(pipeline_class, "load_lora_weights")
    for number, argument in enumerate(config.fuse_lora):
        lora = files.parse(argument, "model.fuse_lora")
        if by_peft:
            found += _fused_by_peft(lora, f"fused_{number}")
            continue
        source = str(lora.path)
        if not _is_read_by_diffusers(lora.path):
            source = f"fused_{number}.safetensors"
            found.append(f"# After: rftcore lora convert {shlex.quote(str(lora.path))} --to diffusers -o {source}")
        found += [
            f"pipeline.load_lora_weights({source!r})",
            f"pipeline.fuse_lora(lora_scale={lora.scale:g})",
            "pipeline.unload_lora_weights()",
        ]
    head = "import rftcore\n" if embedded else ""
    head += "from peft import PeftModel\n" if by_peft and config.fuse_lora else ""
    return f"{head}from diffusers import {', '.join(imports)}\n\n" + "\n".join(found)


def _fused_by_peft(lora: files.LoraFile, name: str) -> list[str]:
    scaled = f"rftcore lora scale {shlex.quote(str(lora.path))} {lora.scale:g} -o {name}.safetensors"
    return [
        f"# After: {scaled} && rftcore lora convert {name}.safetensors --to peft -o {name}",
        f"pipeline.unet = PeftModel.from_pretrained(pipeline.unet, {name!r}).merge_and_unload()",
    ]


def _is_read_by_diffusers(path: Path) -> bool:
    """It loads nothing of PEFT's layout, and of kohya's alphas, which it takes for all layers', one."""
    lora = files.read(path)
    one = len({layer.alpha for layer in lora.layers.values()}) == 1
    return lora.layout == "diffusers" or (lora.layout != "peft" and one)


def _vae(config: ModelConfig) -> str:
    path = Path(config.vae or "")
    if path.is_file():
        name = config.pretrained_model_name_or_path
        configs = single_file.configs_name(Path(name), config) if Path(name).is_file() else name
        return f"from_single_file({config.vae!r}, config={configs!r}, subfolder='vae')"
    subfolder = ", subfolder='vae'" if (path / "model_index.json").is_file() else ""
    return f"from_pretrained({config.vae!r}{subfolder})"
