"""Which images `rftcore sample` makes, from which noise and LoRA scales, and where each is in the grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from rftcore.commands.sample_options import INTERPOLATION, SampleOptions
from rftcore.lora.files import LoraFile
from rftcore.training.batches import derived_seed
from rftcore.training.evaluation import grids

_ROWS, _COLUMNS, _TITLE = 16, 8, 16
# Names that say nothing of a LoRA.
_LEFT_BY_RUNS = ("pytorch_lora_weights", "adapter_model")


class Column(NamedTuple):
    """What is sampled with one setting of the LoRAs: its title, and each LoRA's scale."""

    title: str
    scales: list[float]


class Item(NamedTuple):
    """One image to sample: image `image` of prompt `prompt` in column `column`, all from 0."""

    prompt: int
    image: int
    column: int
    text: str
    seed: int
    file: str


def columns(options: SampleOptions, loras: Sequence[LoraFile]) -> list[Column]:
    """One with the LoRAs' scales as they are given, or one for each of --lora_scales."""
    scales = [lora.scale for lora in loras]
    if options.interpolate:
        first, second = scales
        shares = options.lora_scales or INTERPOLATION
        ends = {0.0: _name(loras[0].path), 1.0: _name(loras[1].path)}
        return [Column(ends.get(share, f"{share:g}"), [(1 - share) * first, share * second]) for share in shares]
    if options.lora_scales is None:
        return [Column("", list(scales))]
    return [Column(f"LoRA x {factor:g}", [factor * scale for scale in scales]) for factor in options.lora_scales]


def _name(path: Path) -> str:
    """A LoRA's, or that of the run that left it, as short as a column's title."""
    name = path.parent.name if path.stem in _LEFT_BY_RUNS else path.stem
    return name if len(name) <= _TITLE else f"{name[: _TITLE - 3]}..."


@dataclass(frozen=True)
class Sheet:
    """All images of a request. Those of one prompt and place have the same noise in every column."""

    prompts: Sequence[str]
    columns: Sequence[Column]
    options: SampleOptions

    @property
    def items(self) -> list[Item]:
        """Every image, one noise's columns together."""
        return [
            Item(p, i, c, text, derived_seed(self.options.seed, "sample", p, i), self._file(p, i, c))
            for p, text in enumerate(self.prompts)
            for i in range(self.options.images_per_prompt)
            for c in range(len(self.columns))
        ]

    def _file(self, prompt: int, image: int, column: int) -> str:
        ending = f"-{column:02d}" if self.options.columns else ""
        return f"{prompt:05d}-{image:03d}{ending}.png"

    def place(self, item: Item) -> tuple[int, int] | None:
        """Column and row in the grid; None for an image that is not shown.

        With columns of scales a row is one noise of one prompt, and all columns are shown; else a row is a prompt.
        """
        if self.options.columns:
            row = item.prompt * self.options.images_per_prompt + item.image
            return (item.column, row) if row < _ROWS else None
        return (item.image, item.prompt) if item.prompt < _ROWS and item.image < _COLUMNS else None

    def grid(self, images: Mapping[tuple[int, int], Image.Image]) -> Image.Image:
        """The images by their place, captioned with their prompts, and under the columns' titles."""
        if not self.options.columns:
            return grids.table(self.prompts, images)
        captions = [text for text in self.prompts for _ in range(self.options.images_per_prompt)]
        return grids.table(captions, images, [column.title for column in self.columns])

    def described(self, item: Item) -> dict[str, Any]:
        """The item's part of metadata.json."""
        return {
            "file": item.file,
            "prompt": item.text,
            "prompt_index": item.prompt,
            "image_index": item.image,
            "noise_seed": item.seed,
            "lora_scales": self.columns[item.column].scales,
        }
