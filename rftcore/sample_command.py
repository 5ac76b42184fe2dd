"""`rftcore sample`: prompts to images on disk, each a function of the seed and its place alone."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import rftcore
from rftcore import digits, lora_files
from rftcore import prompts as prompt_sources
from rftcore.sample_options import SCHEDULERS, SampleOptions
from rftcore.sampling import CheckpointedSampler, decode
from rftcore.training import environment
from rftcore.training.batches import derived_seed
from rftcore.training.errors import RunError, UsageError

METADATA, GRID = "metadata.json", "grid.png"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_GRID_ROWS, _GRID_COLUMNS, _CAPTION_WIDTH = 16, 8, 160
# Sides of the grid's images, in pixels.
_SMALLEST, _GRID_SIDE = 96, 256


class _Item(NamedTuple):
    """One image to sample: image `image` of prompt `prompt`, both from 0."""

    prompt: int
    image: int
    text: str
    seed: int

    @property
    def file(self) -> str:
        return f"{self.prompt:05d}-{self.image:03d}.png"


def sample(options: SampleOptions) -> Path:
    """Samples every prompt's images into `options.output_dir`; returns that folder.

    It gets a PNG for each image, grid.png with the first of them, and metadata.json with each image's file, prompt and
    the seed of the CPU generator that its noise is drawn from, and all settings. An image does not depend on the batch
    that it is sampled in, but for the rounding of matrix products of another size.

    Raises:
        UsageError, rftcore.prompts.PromptsError: when the request cannot work. Nothing has been written by then.
        RunError: when the device's memory does not suffice.
    """
    options.validate()
    prompts = prompt_sources.load(options.prompt if options.prompts is None else options.prompts)
    folder = Path(options.output_dir)
    _check_free(folder)
    loras = [lora_files.parse(argument) for argument in options.lora or ()]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipe = _load(options).to(device)
    lora_files.load(pipe, loras)
    sampler, size = _sampler(pipe, options), _sample_size(pipe, options)
    encoded = _Encoded.of(pipe, prompts, options.negative_prompt)
    rftcore.accelerate(pipe.unet)
    rftcore.accelerate(pipe.vae)
    items = [
        _Item(p, i, text, derived_seed(options.seed, "sample", p, i))
        for p, text in enumerate(prompts)
        for i in range(options.images_per_prompt)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    thumbnails: dict[tuple[int, int], Image.Image] = {}
    try:
        for item, image in _images(pipe, sampler, encoded, size, items, options):
            image.save(folder / item.file)
            if item.prompt < _GRID_ROWS and item.image < _GRID_COLUMNS:
                thumbnails[item.prompt, item.image] = image
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"{device} ran out of memory with --batch_size {options.batch_size}; lower it, or --resolution, or give "
            f"--dtype bf16 ({error})"
        ) from error
    _grid(thumbnails, prompts).save(folder / GRID)
    record = {
        "settings": _settings(options, sampler),
        "environment": environment.describe(processes=1),
        "images": [_described(item) for item in items],
    }
    (folder / METADATA).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return folder


@torch.no_grad()
def _images(
    pipe: DiffusionPipeline,
    sampler: CheckpointedSampler,
    encoded: _Encoded,
    size: tuple[int, int],
    items: Sequence[_Item],
    options: SampleOptions,
) -> Iterator[tuple[_Item, Image.Image]]:
    with tqdm(total=len(items), unit="image", disable=None) as bar:
        for start in range(0, len(items), options.batch_size):
            batch = items[start : start + options.batch_size]
            noise = [torch.Generator().manual_seed(item.seed) for item in batch]
            arguments = encoded.arguments([item.text for item in batch], size, pipe.vae_scale_factor, pipe.unet.device)
            latents = sampler(**arguments, sample_size=size, generator=noise, merged=options.merge_lora).latents
            for item, latent in zip(batch, latents.split(1), strict=True):
                yield item, _to_image(decode(pipe.vae, latent)[0])
            bar.update(len(batch))


def _check_free(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output_dir {folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"--output_dir {folder} is not empty; give a new or an empty folder")


def _load(options: SampleOptions) -> DiffusionPipeline:
    try:
        pipe = DiffusionPipeline.from_pretrained(
            digits.path() if options.model == "rftcore.digits" else options.model,
            revision=options.revision,
            variant=options.variant,
            torch_dtype=_DTYPES[options.dtype],
            safety_checker=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"--model {options.model} does not load as a diffusers pipeline: {error}") from error
    if not isinstance(pipe, StableDiffusionPipeline | StableDiffusionXLPipeline):
        raise UsageError(
            f"--model {options.model} is a {type(pipe).__name__}; StableDiffusionPipeline and "
            "StableDiffusionXLPipeline are served"
        )
    pipe.unet.requires_grad_(False).eval()
    return pipe


def _sampler(pipe: DiffusionPipeline, options: SampleOptions) -> CheckpointedSampler:
    scheduler = pipe.scheduler
    if options.scheduler is not None:
        name, extra = SCHEDULERS[options.scheduler]
        scheduler = getattr(diffusers, name).from_config(scheduler.config, **extra)
    try:
        return CheckpointedSampler(
            pipe.unet,
            scheduler,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            eta=options.eta,
            backprop_steps=0,
        )
    except (TypeError, ValueError) as error:
        source = "its own scheduler" if options.scheduler is None else f"--scheduler {options.scheduler}"
        raise UsageError(
            f"--model {options.model} cannot be sampled with {source}: {error} (--scheduler takes "
            f"{', '.join(SCHEDULERS)})"
        ) from error


def _sample_size(pipe: DiffusionPipeline, options: SampleOptions) -> tuple[int, int]:
    """Height and width of the latents."""
    if options.resolution is None:
        size = pipe.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)
    factor = pipe.vae_scale_factor
    if options.resolution % factor:
        nearest = max(1, round(options.resolution / factor)) * factor
        raise UsageError(
            f"--resolution {options.resolution} must be a multiple of {factor}, the VAE's scale; the nearest is {nearest}"
        )
    return (options.resolution // factor,) * 2


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """Prompts as the UNet takes them, on the CPU: of a prompt, its tensors by name, each without a batch dimension."""

    positive: dict[str, dict[str, Tensor]]
    negative: dict[str, Tensor]

    @classmethod
    @torch.no_grad()
    def of(cls, pipe: DiffusionPipeline, prompts: Sequence[str], negative_prompt: str | None) -> _Encoded:
        """Encodes each distinct prompt once, then drops the text encoders: sampling needs their memory."""
        empty, device = negative_prompt or "", pipe.unet.device
        distinct, encoded = [*dict.fromkeys([empty, *prompts])], {}
        for start in range(0, len(distinct), 32):
            chunk = distinct[start : start + 32]
            output = pipe.encode_prompt(
                prompt=chunk, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            # SDXL: embeddings, negative ones, pooled ones, negative pooled ones.
            named = {"prompt_embeds": output[0]} | ({"text_embeds": output[2]} if len(output) == 4 else {})
            for row, text in enumerate(chunk):
                encoded[text] = {name: tensor[row].cpu() for name, tensor in named.items()}
        negative = encoded[empty]
        # As SDXL was trained: no prompt is zeros there, not the embedding of an empty text.
        if negative_prompt is None and getattr(pipe.config, "force_zeros_for_empty_prompt", False):
            negative = {name: torch.zeros_like(tensor) for name, tensor in negative.items()}
        for name in ("text_encoder", "text_encoder_2"):
            if hasattr(pipe, name):
                setattr(pipe, name, None)
        return cls(encoded, negative)

    def arguments(
        self, prompts: Sequence[str], size: tuple[int, int], scale: int, device: torch.device
    ) -> dict[str, Any]:
        """What the sampler is called with for a batch; `size` of the latents times `scale` is the image's."""
        positive = {
            name: torch.stack([self.positive[prompt][name] for prompt in prompts]).to(device) for name in self.negative
        }
        negative = {name: tensor.to(device).expand_as(positive[name]) for name, tensor in self.negative.items()}
        given: dict[str, Any] = {
            "prompt_embeds": positive.pop("prompt_embeds"),
            "negative_prompt_embeds": negative.pop("prompt_embeds"),
        }
        if positive:
            height, width = (side * scale for side in size)
            # Original size, crop's corner, target size.
            ids = torch.tensor([[height, width, 0, 0, height, width]], device=device).expand(len(prompts), -1)
            given["added_cond_kwargs"] = {**positive, "time_ids": ids.to(given["prompt_embeds"].dtype)}
            given["negative_added_cond_kwargs"] = negative
        return given


def _to_image(image: Tensor) -> Image.Image:
    pixels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)  # (3, H, W)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _grid(images: dict[tuple[int, int], Image.Image], prompts: Sequence[str]) -> Image.Image:
    """The images of the first prompts, a row a prompt, captioned."""
    width, height = next(iter(images.values())).size
    factor = min(_GRID_SIDE, max(_SMALLEST, width, height)) / max(width, height)
    width, height = round(width * factor), round(height * factor)
    rows, columns = (1 + max(place[axis] for place in images) for axis in (0, 1))
    grid = Image.new("RGB", (_CAPTION_WIDTH + columns * width, rows * height), "white")
    draw = ImageDraw.Draw(grid)
    for row in range(rows):
        draw.multiline_text((6, row * height + 6), textwrap.fill(prompts[row], 24), fill="black")
    # Pixels of tiny images stay squares.
    kind = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
    for (row, column), image in images.items():
        grid.paste(image.resize((width, height), kind), (_CAPTION_WIDTH + column * width, row * height))
    return grid


def _described(item: _Item) -> dict[str, Any]:
    return {
        "file": item.file,
        "prompt": item.text,
        "prompt_index": item.prompt,
        "image_index": item.image,
        "noise_seed": item.seed,
    }


def _settings(options: SampleOptions, sampler: CheckpointedSampler) -> dict[str, Any]:
    given = {key: value for key, value in dataclasses.asdict(options).items() if key != "prompt"}
    return {**given, "sampler": sampler.settings}
