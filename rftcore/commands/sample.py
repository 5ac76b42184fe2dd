"""`rftcore sample`: prompts to images on disk, each a function of the seed and its place alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import rftcore
from rftcore import prompts as prompt_sources
from rftcore.commands import sample_grid
from rftcore.commands.sample_grid import Column, Item, Sheet
from rftcore.commands.sample_options import SampleOptions
from rftcore.errors import RunError, UsageError
from rftcore.lora import files, loading
from rftcore.sampling import CheckpointedSampler, decode
from rftcore.training import environment, pipeline, schedulers
from rftcore.training.config import ModelConfig, SamplingConfig
from rftcore.training.prompt_inputs import PromptInputs

METADATA, GRID = "metadata.json", "grid.png"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_GUIDANCE = 7.5
# Of a config's key in a message, this command's flag, where its name is another.
_FLAGS = {"pretrained_model_name_or_path": "model", "fuse_lora": "lora"}
_KEY = re.compile(r"\b(?:model|sampling)\.(\w+)(=?)")


def sample(options: SampleOptions) -> Path:
    """Samples every prompt's images into `options.output_dir`; returns that folder.

    It gets a PNG for each image, grid.png with the first of them, and metadata.json with each image's file, prompt, the
    LoRAs' scales and the seed of the CPU generator that its noise is drawn from, and all settings. An image does not
    depend on the batch that it is sampled in, but for the rounding of matrix products of another size. Its noise is the
    same whatever the LoRAs' scales.

    Raises:
        UsageError, rftcore.prompts.PromptsError: when the request cannot work. Nothing has been written by then.
        RunError: when the device's memory does not suffice.
    """
    options.validate()
    folder = Path(cast(str, options.output_dir))  # validate() has seen to it
    _check_free(folder)
    loras = [files.parse(argument) for argument in options.lora or ()]
    columns = sample_grid.columns(options, loras)
    given = options.prompt if options.prompts is None else options.prompts
    prompts = None if given is None else prompt_sources.load(given)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = _load(options).to(device)
    _check_prompts(pipe, prompts)
    sheet = Sheet(prompts or [""], columns, options)
    config = _sampling(pipe, options)
    changed = loading.load(pipe, loras)
    with _told_as_flags():
        pipeline.check_sampling(pipe, config)
        size = pipeline.sample_size(pipe, config)
        # Only a text encoder's LoRA makes of one prompt another for each column.
        encoded = _encode(pipe, sheet.prompts, config, size, columns if set(changed) - {"unet"} else columns[:1])
    sampler = _sampler(pipe, options, config)
    rftcore.accelerate(pipe.unet)
    if pipeline.vae(pipe) is not None:
        rftcore.accelerate(pipe.vae)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir {folder} cannot be made ({error}); give another") from error
    try:
        shown = _write_images(pipe, sampler, encoded, size, sheet, folder)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"{device} ran out of memory with --batch_size {options.batch_size}; lower it, or --resolution, or give "
            f"--dtype bf16 ({error})"
        ) from error
    sheet.grid(shown).save(folder / GRID)
    record = {
        "settings": _settings(options, sampler),
        "environment": environment.describe(processes=1),
        "images": [sheet.described(item) for item in sheet.items],
    }
    (folder / METADATA).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


def _write_images(
    pipe: DiffusionPipeline,
    sampler: CheckpointedSampler,
    encoded: Sequence[PromptInputs],
    size: int | tuple[int, int],
    sheet: Sheet,
    folder: Path,
) -> dict[tuple[int, int], Image.Image]:
    """Saves every image as it is done; returns those of the grid, by their place."""
    items, shown = sheet.items, {}
    with tqdm(total=len(items), unit="image", disable=None) as bar:
        for number, column in enumerate(sheet.columns):
            loading.set_scales(pipe, column.scales)
            inputs = encoded[number if len(encoded) > 1 else 0]
            of_column = [item for item in items if item.column == number]
            for item, image in _images(pipe, sampler, inputs, size, of_column, sheet.options):
                image.save(folder / item.file)
                if (place := sheet.place(item)) is not None:
                    shown[place] = image
                bar.update()
    return shown


@torch.no_grad()
def _images(
    pipe: DiffusionPipeline,
    sampler: CheckpointedSampler,
    inputs: PromptInputs,
    size: int | tuple[int, int],
    items: Sequence[Item],
    options: SampleOptions,
) -> Iterator[tuple[Item, Image.Image]]:
    for start in range(0, len(items), options.batch_size):
        batch = items[start : start + options.batch_size]
        noise = [torch.Generator().manual_seed(item.seed) for item in batch]
        arguments = inputs.batch([item.text for item in batch]) or {"batch_size": len(batch)}
        latents = sampler(**arguments, sample_size=size, generator=noise, merged=options.merge_lora).latents
        for item, latent in zip(batch, latents.split(1), strict=True):
            yield item, _to_image(decode(pipeline.vae(pipe), latent)[0])


def _encode(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    config: SamplingConfig,
    size: int | tuple[int, int],
    columns: Sequence[Column],
) -> list[PromptInputs]:
    """The prompts for each column: the scales of a text encoder's LoRA change them."""
    encoders = {name: getattr(pipe, name) for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)}
    encoded = []
    for column in columns:
        # Encoding drops them.
        for name, encoder in encoders.items():
            setattr(pipe, name, encoder)
        loading.set_scales(pipe, column.scales)
        encoded.append(
            pipeline.encode_prompts(
                pipe, prompts, config.negative_prompt, pipe.unet.device, size, clip_skip=config.clip_skip
            )
        )
    return encoded


def _check_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output_dir {folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"--output_dir {folder} is not empty; give a new or an empty folder")


def _load(options: SampleOptions) -> DiffusionPipeline:
    config = ModelConfig(
        pretrained_model_name_or_path=options.model,
        revision=options.revision,
        variant=options.variant,
        original_config=options.original_config,
        vae=options.vae,
    )
    with _told_as_flags():
        pipe = pipeline.load(config, _DTYPES[options.dtype])
    pipe.unet.requires_grad_(False).eval()
    return pipe


def _check_prompts(pipe: DiffusionPipeline, prompts: Sequence[str] | None) -> None:
    if prompts is None and not pipeline.unconditional(pipe):
        raise UsageError('there are no prompts; give --prompt "a text" or --prompts file.txt')
    if prompts is not None and pipeline.unconditional(pipe):
        raise UsageError(f"the {type(pipe).__name__} takes no prompt; leave --prompt and --prompts out")


@contextlib.contextmanager
def _told_as_flags() -> Iterator[None]:
    """Messages about a run's config are told in the words of this command: model.vae is --vae."""
    try:
        yield
    except UsageError as error:
        raise UsageError(_KEY.sub(_flag, str(error))) from error


def _flag(match: re.Match[str]) -> str:
    return f"--{_FLAGS.get(match[1], match[1])}{' ' if match[2] else ''}"


def _sampling(pipe: DiffusionPipeline, options: SampleOptions) -> SamplingConfig:
    own = 1.0 if pipeline.unconditional(pipe) else _GUIDANCE
    return SamplingConfig(
        guidance_scale=own if options.guidance_scale is None else options.guidance_scale,
        negative_prompt=options.negative_prompt or "",
        resolution=options.resolution,
        clip_skip=options.clip_skip,
    )


def _sampler(pipe: DiffusionPipeline, options: SampleOptions, config: SamplingConfig) -> CheckpointedSampler:
    scheduler = pipe.scheduler
    if options.scheduler is not None:
        scheduler = schedulers.make(options.scheduler, scheduler.config)
    try:
        return CheckpointedSampler(
            pipe.unet,
            scheduler,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=config.guidance_scale,
            eta=options.eta,
            backprop_steps=0,
        )
    except (TypeError, ValueError) as error:
        source = "its own scheduler" if options.scheduler is None else f"--scheduler {options.scheduler}"
        raise UsageError(
            f"--model {options.model} cannot be sampled with {source}: {error} (--scheduler takes "
            f"{', '.join(schedulers.SCHEDULERS)})"
        ) from error


def _to_image(image: Tensor) -> Image.Image:
    pixels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)  # (3, H, W)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _settings(options: SampleOptions, sampler: CheckpointedSampler) -> dict[str, Any]:
    given = {key: value for key, value in dataclasses.asdict(options).items() if key != "prompt"}
    return {**given, "sampler": sampler.settings}
