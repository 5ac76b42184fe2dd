"""Pipelines of the published shapes, on disk in fp16 with random weights, through the command line on a CPU.

python -m benchmarks.real_models [sd15] [sdxl]

One optimizer step of DRaFT-1 and one of DDPO each, at a small resolution. What is seen: the exit status, seconds, the
process's largest resident memory, that the LoRA learnt something finite, and that a fresh pipeline takes it and then
computes something else. Random weights say nothing about images. A model that is not asked for keeps its rows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from benchmarks import harness
from rftcore import published

VOCABULARY, START, END = 49408, "<|startoftext|>", "<|endoftext|>"
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
# CLIP ViT-L/14's text encoder, and OpenCLIP ViT-bigG/14's.
LARGE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
BIG = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
PIXELS = {"sd15": 256, "sdxl": 128}
COMMON = {
    "mixed_precision": "bf16",
    "model.variant": "fp16",
    "prompts": "[a cat, a dog]",
    "eval.validation_prompts": "[a bird]",
    "eval.num_validation_images": 1,
    "eval.lora_scales": "[]",
    "sampling.num_inference_steps": 2,
    "train.max_train_steps": 1,
    "lora.rank": 4,
    "reward.function": "brightness",
}
RUNS = {
    "draft": {"train.backprop_steps": 1, "train.batch_size": 1, "sampling.guidance_scale": 7.5},
    "ddpo": {
        "train.batch_size": 2,
        "train.samples_per_epoch": 2,
        "train.gradient_accumulation_steps": 2,
        "train.per_prompt_statistics": "false",
        "sampling.eta": 1.0,
        "sampling.guidance_scale": 5.0,
    },
}


def write(kind: str, folder: Path) -> None:
    """Saves a pipeline of the shapes of "sd15" or "sdxl" in fp16, as variant fp16."""
    tokenizer = _tokenizer(folder / "made")
    large = {"vocab_size": VOCABULARY, "projection_dim": 768, "hidden_act": "quick_gelu", **LARGE, **_ends()}
    vae = _random(AutoencoderKL.from_config, {**published.AUTOENCODER, "scaling_factor": _SCALING[kind]})
    unet = _random(UNet2DConditionModel.from_config, dict(published.UNETS[kind]))
    if kind == "sd15":
        pipe = StableDiffusionPipeline(
            vae=vae,
            text_encoder=_random(CLIPTextModel, CLIPTextConfig(**large)),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    else:
        big = {"vocab_size": VOCABULARY, "projection_dim": 1280, "hidden_act": "gelu", **BIG, **_ends()}
        pipe = StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=_random(CLIPTextModel, CLIPTextConfig(**large)),
            text_encoder_2=_random(CLIPTextModelWithProjection, CLIPTextConfig(**big)),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=unet,
            scheduler=EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
            force_zeros_for_empty_prompt=True,
        )
    pipe.save_pretrained(folder, variant="fp16")


_SCALING = {"sd15": 0.18215, "sdxl": 0.13025}


def _ends() -> dict[str, int]:
    return {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1, "pad_token_id": VOCABULARY - 1}


def _random(kind: Any, config: Any) -> nn.Module:
    """The model in fp16, its weights drawn as PyTorch draws a linear layer's: uniform, of variance 1 / (3 inputs)."""
    with torch.device("meta"):
        model = kind(config)
    model = model.half().to_empty(device="cpu").requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            inputs = weight[0].numel()
            weight.copy_(torch.empty(weight.shape).uniform_(-1, 1, generator=generator) * inputs**-0.5)
        else:
            # Norms' weights are the only vectors of this name.
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
    for name, buffer in model.named_buffers():
        # to_empty left them as it found them.
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]))
    return model


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """A tokenizer of CLIP's size: all bytes, and pairs of them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    tokens = [*characters, *(f"{character}</w>" for character in characters)]
    pairs = [(a, b) for a in characters for b in characters][: VOCABULARY - 2 - len(tokens)]
    words = [*tokens, *(f"{a}{b}" for a, b in pairs), START, END]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in pairs)]) + "\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    assert len(tokenizer) == VOCABULARY, len(tokenizer)
    return tokenizer


def train(algorithm: str, model: Path, output: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Runs `rftcore train` to its end: exit status, seconds and GiB of the process."""
    flags = {**COMMON, **RUNS[algorithm], **options, "model.pretrained_model_name_or_path": model, "output_dir": output}
    command = [
        sys.executable,
        "-m",
        "rftcore",
        "train",
        algorithm,
        *(f"--{key}={value}" for key, value in flags.items()),
    ]
    start = time.perf_counter()
    with (output.parent / f"{output.name}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "exit status": process.returncode,
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_gib": usage.ru_maxrss / 2**20,
    }


def seen(model: Path, output: Path) -> dict[str, Any]:
    """What the run's LoRA is, and what it does to a fresh pipeline's UNet."""
    lora = load_file(output / "pytorch_lora_weights.safetensors")
    ups = [tensor for name, tensor in lora.items() if ".lora_B." in name or ".lora.up." in name]
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    times = {
        name.removeprefix("time/").removesuffix("_s"): value
        for line in steps
        for name, value in line.items()
        if name.startswith("time/") and name.endswith("_s")
    }
    pipe = DiffusionPipeline.from_pretrained(model, variant="fp16", torch_dtype=torch.bfloat16, text_encoder=None,
                                             text_encoder_2=None, vae=None, tokenizer=None, tokenizer_2=None)  # fmt: skip
    unet = pipe.unet.eval()
    given = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(unet.dtype)
        for name, tensor in published.conditioning(unet, 1).items()
    }
    prompt = given.pop("prompt_embeds")
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)).to(unet.dtype)
    with torch.no_grad():
        before, after = (
            (change() or unet)(x, 500, prompt, added_cond_kwargs=given, return_dict=False)[0].float()
            for change in (lambda: None, lambda: pipe.load_lora_weights(output))
        )
    return {
        "finite": all(bool(tensor.isfinite().all()) for tensor in lora.values()) and bool(after.isfinite().all()),
        "lora_tensors": len(lora),
        "lora_up_norm": float(torch.stack([up.float().norm() for up in ups]).norm()),
        "changed": float((after - before).norm() / before.norm()),
        **{f"{name}_s": value for name, value in times.items()},
    }


def _recorded() -> list[dict[str, Any]]:
    path = harness.RESULTS / "real_models.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def main() -> None:
    rows = []
    for kind in sys.argv[1:] or list(PIXELS):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            start = time.perf_counter()
            write(kind, folder / kind)
            size = sum(file.stat().st_size for file in (folder / kind).rglob("*") if file.is_file())
            print(f"{kind}: {size / 2**30:.2f} GiB written in {time.perf_counter() - start:.0f} s", flush=True)
            for algorithm in RUNS:
                output = folder / f"{kind}_{algorithm}"
                row = train(algorithm, folder / kind, output, {"sampling.resolution": PIXELS[kind]})
                if row["exit status"]:
                    print((folder / f"{output.name}.log").read_text()[-3000:], flush=True)
                else:
                    row |= seen(folder / kind, output)
                rows.append({"model": kind, "pixels": PIXELS[kind], "algorithm": algorithm,
                             "on_disk_gib": size / 2**30, **row})  # fmt: skip
                print(rows[-1], flush=True)
    settings = {name: str(value) for name, value in COMMON.items()}
    rows = [row for row in _recorded() if row["model"] not in {row["model"] for row in rows}] + rows
    harness.report("real_models", rows, {**settings, "dtype_on_disk": "fp16"})


if __name__ == "__main__":
    main()
