"""`rftcore lora`: mix, scale, info, convert and diff, from the command line's words to what is printed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from rftcore.commands.lora_options import DTYPES, LAYOUTS
from rftcore.errors import UsageError, nearest
from rftcore.lora import diff, files, info
from rftcore.lora.mix import Mixture, mix

_DTYPES = dict(zip(DTYPES, (torch.float32, torch.bfloat16, torch.float16), strict=True))


def run(action: str, given: Mapping[str, Any]) -> str:
    """Does one action with its options, as `options.add_options` names them; returns what is to be printed.

    Raises: UsageError for a request that cannot work. Nothing has been written by then.
    """
    return _ACTIONS[action](**given)


def _mix(loras: list[str], rank: int | None, dtype: str, output: str | None, force: bool) -> str:
    if rank is not None and rank < 1:
        raise UsageError(f"--rank {rank} must be at least 1; leave it out for the exact mixture")
    _check_dtype(dtype)
    target = _target(output, "diffusers", force)
    parsed = [files.parse(argument, "lora mix") for argument in loras]
    mixture = mix([(str(path), files.read(path), weight) for path, weight in parsed], rank, _DTYPES[dtype])
    files.write(mixture.lora, target, force=force)
    return f"{_described(mixture)}\nwritten to {target}"


def _scale(lora: str, factor: float, dtype: str, output: str | None, force: bool) -> str:
    if not math.isfinite(factor) or factor == 0:
        raise UsageError(f"lora scale: the factor {factor} must be a finite number and not 0")
    _check_dtype(dtype)
    target = _target(output, "diffusers", force)
    path = _path(lora, "lora scale")
    mixture = mix([(str(path), files.read(path), factor)], dtype=_DTYPES[dtype])
    files.write(mixture.lora, target, force=force)
    return f"written to {target}"


def _info(lora: str) -> str:
    path = _path(lora, "lora info")
    return info.describe(files.read(path), path)


def _convert(lora: str, to: str | None, output: str | None, force: bool) -> str:
    if to not in LAYOUTS:
        problem = "is missing" if to is None else f"{to} is unknown"
        raise UsageError(f"--to {problem}; {nearest(to or '', LAYOUTS)}")
    target = _target(output, to, force)
    path = _path(lora, "lora convert")
    return f"written to {files.write(files.read(path), target, to, force)}"


def _diff(first: str, second: str | None) -> str:
    one = files.read(_path(first, "lora diff"))
    other = None if second is None else files.read(_path(second, "lora diff"))
    return diff.describe(diff.diff(one, other), against_nothing=other is None)


_ACTIONS: dict[str, Callable[..., str]] = {
    "mix": _mix,
    "scale": _scale,
    "info": _info,
    "convert": _convert,
    "diff": _diff,
}


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is unknown; {nearest(dtype, DTYPES)}")


def _target(output: str | None, layout: str, force: bool) -> Path:
    if output is None:
        raise UsageError("-o is missing; give the file to write, or for PEFT's layout the folder")
    files.check_free(Path(output), layout, force)
    return Path(output)


def _path(argument: str, flag: str) -> Path:
    path, scale = files.parse(argument, flag)
    if scale != 1.0:
        raise UsageError(f"{flag} {argument}: takes no scale; write {path}")
    return path


def _described(mixture: Mixture) -> str:
    ranks = [layer.rank for layer in mixture.lora.layers.values()]
    spread = f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    return (
        f"{len(ranks)} layers of {spread}; off the exact mixture by {mixture.error:.3g} of its norm, at worst by "
        f"{mixture.worst_error:.3g} ({mixture.worst_layer})"
    )
