"""The shipped recipes: YAML files found by name, or any file found by path."""

from __future__ import annotations

import os.path
import shutil
from pathlib import Path

from rftcore.errors import UsageError, nearest
from rftcore.training.algorithm_configs import ALGORITHMS

RECIPES = Path(__file__).parent.parent / "configs"


def names() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def algorithm(name: str) -> str:
    """Whose recipe it is, by its name: digits_draft_lv is draft_lv's, draft_k_sd15 and draft_sd15 are draft's."""
    stem = f"{name.removeprefix('digits_')}_"
    return max((known for known in ALGORITHMS if stem.startswith(f"{known}_")), key=len)


def description(name: str) -> str:
    """A recipe's first comment line: what it does."""
    first_line = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    return first_line.removeprefix("#").strip()


def find(name_or_path: str) -> Path:
    """The file that a recipe's name, or a path, stands for. Raises: UsageError when there is none."""
    path = Path(name_or_path)
    # Of a name that no file can have, pathlib raises.
    if os.path.isfile(path):
        return path
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise UsageError(f"--config {name_or_path}: there is no such file")
    if name_or_path not in names():
        raise UsageError(
            f"--config {name_or_path}: neither a file nor a recipe; {nearest(name_or_path, names())} "
            "(rftcore configs ls lists the recipes)"
        )
    return RECIPES / f"{name_or_path}.yaml"


def copy(name: str, target: str | None) -> Path:
    """Copies a recipe to `target` (a file or folder; default: here), to be edited. Raises: UsageError."""
    if name not in names():
        raise UsageError(f"there is no recipe {name!r}; {nearest(name, names())}")
    path = Path(target) if target else Path(f"{name}.yaml")
    if os.path.isdir(path):
        path = path / f"{name}.yaml"
    if os.path.lexists(path):
        raise UsageError(f"{path} exists already; name another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(RECIPES / f"{name}.yaml", path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be written ({error}); name another file") from error
    return path
