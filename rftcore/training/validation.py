"""Measuring the model on fixed prompts and fixed noise: scores by every judge, and a grid to look at."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from PIL import Image, ImageDraw
from torch import Tensor

from rftcore.rewards import Reward
from rftcore.sampling import CheckpointedSampler, decode, score
from rftcore.training.batches import generator
from rftcore.training.engine import Engine, Samples

GRID_PROMPTS, GRID_IMAGES = 8, 4
_CAPTION_WIDTH = 132


@dataclass(frozen=True)
class Mean:
    """A mean over n images with its standard error (s / sqrt(n), 0 for one image)."""

    mean: float
    standard_error: float

    @classmethod
    def of(cls, scores: Sequence[float]) -> Mean:
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        return cls(statistics.fmean(scores), spread / math.sqrt(len(scores)))


class Validation:
    """The run's evaluation: the same prompts and noise every time, so that two evaluations compare image by image."""

    def __init__(self, engine: Engine, sampler: CheckpointedSampler, prompts: Sequence[str], judges: Sequence[Reward]):
        self.engine = engine
        self.sampler = sampler
        self.judges = list(judges)
        # Image j shows prompt j mod P, so that any leading part of the images covers the prompts evenly.
        self.prompts = [*prompts] * engine.config.eval.num_validation_images
        self.distinct = len(prompts)

    @torch.no_grad()
    def __call__(self) -> tuple[dict[str, list[float]], Image.Image]:
        """Each judge's score of every image, and the grid of the first prompts' images. The same on every process."""
        model, accelerator = self.engine.model, self.engine.accelerator
        was_training = model.training
        model.eval()
        mine = range(len(self.prompts))[accelerator.process_index :: accelerator.num_processes]
        size = self.engine.config.eval.batch_size
        results = [row for start in range(0, len(mine), size) for row in self._evaluate(mine[start : start + size])]
        model.train(was_training)
        rows = sorted(gather_object(results), key=lambda row: row[0])
        scores = {judge.name: [row[1][number] for row in rows] for number, judge in enumerate(self.judges)}
        return scores, self._grid({index: image for index, _, image in rows if image is not None})

    def _evaluate(self, indices: Sequence[int]) -> list[tuple[int, list[float], Image.Image | None]]:
        prompts = [self.prompts[index] for index in indices]
        noise = [generator(self.engine.config.eval.seed, "validation", index) for index in indices]
        latents = self.engine.sample(self.sampler, Samples(indices, prompts, noise)).latents
        images = torch.cat([decode(self.engine.vae, latent) for latent in latents.split(1)])  # (b, 3, H, W)
        # Scored as the output of a pixel-space model: decoded once for all judges.
        scores = [score(None, images * 2 - 1, judge, prompts, images_per_call=len(prompts)) for judge in self.judges]
        per_image = torch.stack(scores, dim=1).double().tolist()  # (b, judges)
        return [
            (index, per_image[row], _to_image(images[row]) if self._place(index) is not None else None)
            for row, index in enumerate(indices)
        ]

    def _place(self, index: int) -> tuple[int, int] | None:
        """Column and row of an image in the grid; None for one that is not shown."""
        column, row = divmod(index, self.distinct)
        return (column, row) if row < GRID_PROMPTS and column < GRID_IMAGES else None

    def _grid(self, images: dict[int, Image.Image]) -> Image.Image:
        side = max(next(iter(images.values())).width, 96)
        places = {index: self._place(index) for index in images}
        columns, rows = (1 + max(place[axis] for place in places.values()) for axis in (0, 1))
        grid = Image.new("RGB", (_CAPTION_WIDTH + columns * side, rows * side), "white")
        draw = ImageDraw.Draw(grid)
        for row in range(rows):
            draw.multiline_text((6, row * side + 8), textwrap.fill(self.prompts[row], 20), fill="black")
        for index, (column, row) in places.items():
            resized = images[index].resize((side, side), Image.Resampling.NEAREST)
            grid.paste(resized, (_CAPTION_WIDTH + column * side, row * side))
        return grid


def before_after(before: Image.Image, after: Image.Image) -> Image.Image:
    """Two grids side by side, titled."""
    title, gap = 24, 16
    joined = Image.new("RGB", (before.width + gap + after.width, title + max(before.height, after.height)), "white")
    draw = ImageDraw.Draw(joined)
    for text, grid, left in (("before", before, 0), ("after", after, before.width + gap)):
        draw.text((left + _CAPTION_WIDTH, 6), text, fill="black")
        joined.paste(grid, (left, title))
    return joined


def _to_image(image: Tensor) -> Image.Image:
    pixels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)  # (3, H, W)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
