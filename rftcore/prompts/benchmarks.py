"""Prompts of published benchmarks, read from the files that their authors give out, by category."""

from __future__ import annotations

import difflib
import os.path
from pathlib import Path

from rftcore.prompts import files
from rftcore.prompts.errors import PromptsError

HPDV2_STYLES = ("anime", "concept-art", "paintings", "photo")


def hpdv2(folder: Path) -> dict[str, list[str]]:
    """HPDv2's benchmark prompts by style, from the folder that holds anime.json, concept-art.json and so on.

    Raises: PromptsError.

    Source: Wu et al. 2023; datasets/ymhao/HPDv2 on the hub, folder benchmark.
    """
    return {style: files.read(folder / f"{style}.json") for style in HPDV2_STYLES}


def by_category(path: Path) -> dict[str, list[str]]:
    """The prompts of a table by its column "Category": DrawBench's .csv, PartiPrompts' .tsv. Raises: PromptsError.

    Source: Saharia et al. 2022 (Imagen), DrawBench; Yu et al. 2022 (Parti), github.com/google-research/parti.
    """
    header, rows = files.table(path)
    category = files.column_like(path, header, ("category",))
    found: dict[str, list[str]] = {}
    for row, prompt in files.filled(path, rows, files.column_like(path, header, ("prompt", "prompts"))):
        found.setdefault(row[category], []).append(prompt)
    return found


READERS = {"drawbench": by_category, "hpdv2": hpdv2, "partiprompts": by_category}


def load(source: str) -> list[str]:
    """The prompts of "drawbench:FILE", "partiprompts:FILE" or "hpdv2:FOLDER", or with ":CATEGORY" after it only those.

    Raises: PromptsError.
    """
    name, _, rest = source.partition(":")
    path, category = Path(rest), None
    if not os.path.exists(path) and ":" in rest:
        file, _, category = rest.rpartition(":")
        path = Path(file)
    groups = READERS[name](path)
    if category is None:
        return [prompt for prompts in groups.values() for prompt in prompts]
    if category not in groups:
        close = difflib.get_close_matches(category, groups, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise PromptsError(f"prompts {source!r}: no category {category!r}; {hint}known: {', '.join(groups)}")
    return groups[category]
