"""Images side by side, to look at: a row for each prompt, the same noise in the same place."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

ROWS, COLUMNS = 8, 4
_CAPTION_WIDTH, _TITLE, _GAP = 132, 24, 16
# Images of digits are enlarged to be seen, SDXL's reduced to be kept at every evaluation.
_SMALLEST, _LARGEST = 96, 512
_LINE = 15


def place(index: int, prompts: int) -> tuple[int, int] | None:
    """Column and row of image `index`, which shows prompt `index` mod `prompts`; None for one that is not shown."""
    column, row = divmod(index, prompts)
    return (column, row) if row < ROWS and column < COLUMNS else None


def columns(images_per_prompt: int) -> int:
    """How many images of a prompt are shown."""
    return min(images_per_prompt, COLUMNS)


def prompt_grid(prompts: Sequence[str], images: Mapping[int, Image.Image]) -> Image.Image:
    """The images by their index, beside their prompts. All are of one size."""
    places = {index: place(index, len(prompts)) for index in images}
    return table(prompts, {at: images[index] for index, at in places.items() if at is not None})


def table(
    captions: Sequence[str], images: Mapping[tuple[int, int], Image.Image], titles: Sequence[str] = ()
) -> Image.Image:
    """The images by their column and row, beside a caption for each row and under a title for each column, if any."""
    cell = _cell(next(iter(images.values())).size)
    width, height = (1 + max(at[axis] for at in images) for axis in (0, 1))
    top = _TITLE if titles else 0
    grid = Image.new("RGB", (_CAPTION_WIDTH + width * cell[0], top + height * cell[1]), "white")
    draw = ImageDraw.Draw(grid)
    for column, title in enumerate(titles):
        draw.text((_CAPTION_WIDTH + column * cell[0] + 6, 6), title, fill="black")
    for row in range(height):
        draw.multiline_text((6, top + row * cell[1] + 8), _caption(captions[row], cell[1] - 8), fill="black")
    for (column, row), image in images.items():
        enlarged = cell[0] >= image.width
        resized = image.resize(cell, Image.Resampling.NEAREST if enlarged else Image.Resampling.BOX)
        grid.paste(resized, (_CAPTION_WIDTH + column * cell[0], top + row * cell[1]))
    return grid


def before_after(before: Image.Image, after: Image.Image) -> Image.Image:
    """Two grids side by side, titled."""
    joined = Image.new("RGB", (before.width + _GAP + after.width, _TITLE + max(before.height, after.height)), "white")
    draw = ImageDraw.Draw(joined)
    for text, grid, left in (("before", before, 0), ("after", after, before.width + _GAP)):
        draw.text((left + _CAPTION_WIDTH, 6), text, fill="black")
        joined.paste(grid, (left, _TITLE))
    return joined


def first_columns(grids: Mapping[str, Image.Image], shown: int) -> Image.Image:
    """The first image of each prompt from each grid, under the grid's title; all grids show `shown` images a prompt."""
    first = next(iter(grids.values()))
    width = (first.width - _CAPTION_WIDTH) // shown
    joined = Image.new("RGB", (_CAPTION_WIDTH + len(grids) * width, _TITLE + first.height), "white")
    joined.paste(first.crop((0, 0, _CAPTION_WIDTH, first.height)), (0, _TITLE))
    draw = ImageDraw.Draw(joined)
    for number, (title, grid) in enumerate(grids.items()):
        left = _CAPTION_WIDTH + number * width
        draw.text((left + 6, 6), title, fill="black")
        joined.paste(grid.crop((_CAPTION_WIDTH, 0, _CAPTION_WIDTH + width, grid.height)), (left, _TITLE))
    return joined


def png(image: Image.Image) -> bytes:
    """An image as a file's content."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _cell(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height in the grid: a whole multiple of a small image's, the same shape where it is reduced."""
    width, height = size
    if width > _LARGEST:
        return _LARGEST, max(1, round(height * _LARGEST / width))
    factor = math.ceil(_SMALLEST / width)
    return width * factor, height * factor


def _caption(prompt: str, height: int) -> str:
    return textwrap.fill(prompt, 20, max_lines=max(1, height // _LINE), placeholder=" ...")
