"""The way from an op to its Triton kernels: why they may be closed, and a launch on a tensor's device."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import os
import shutil
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from rftcore.ops import backends, measured
from rftcore.ops.measured import Winner

if TYPE_CHECKING:
    from rftcore.kernels.launch import Launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)  # of the architectures that the kernels are compiled for in the tests


@functools.cache
def kernels(name: str) -> ModuleType:
    """The module `rftcore.kernels.<name>`, imported when it is first used: Triton is not imported without need."""
    return importlib.import_module(f"rftcore.kernels.{name}")


def rows(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous (..., C) as a matrix (M, C)."""
    return tensor.view(math.prod(tensor.shape[:-1]), tensor.shape[-1])


def config(name: str, winner: Winner | None) -> Any:
    """The tile sizes that won; None, for the heuristic's, where none did.

    Args:
        name: "<module>.<class>" in `rftcore.kernels`, and behind a colon which launch of several that have this class.
    """
    sizes = measured.tile_sizes(name, winner)
    if sizes is None:
        return None
    module, _, kind = name.partition(".")
    return getattr(kernels(module), kind.partition(":")[0])(**sizes)


@functools.cache
def capability(device: torch.device) -> int:
    """Such as 90, for kernels' heuristics; that of the oldest GPU that is served where the interpreter runs."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else _OLDEST
    return 10 * major + minor


def run(device: torch.device, *launches: Launch) -> None:
    """Queues the launches, in this order, on the current stream of `device`; in the interpreter they run at once."""
    if device.type != "cuda":
        for launch in launches:
            launch.run()
        return
    with torch.cuda.device(device):
        for launch in launches:
            launch.run()


def reasons(argument: str) -> Callable[..., list[str]]:
    """`not_supported_reasons` of Triton kernels; `argument` names the op's first input, which it looks at."""

    def not_supported_reasons(first: torch.Tensor, *others) -> list[str]:
        found = backends.transform_reasons()
        if first.dtype not in DTYPES:
            found.append(f"it serves fp32, bf16 and fp16, {argument} is {first.dtype}")
        if (missing := _why_missing()) is not None:
            return [*found, missing]
        if first.device.type == "cuda":
            if (refusal := _why_not_on(first.device)) is not None:
                found.append(refusal)
        elif first.device.type != "cpu" or not _interpreted():
            found.append(f"it serves cuda tensors, {argument} is on {first.device}")
        elif first.dtype == torch.bfloat16:
            found.append("Triton's interpreter computes bf16 wrongly")
        return found

    return not_supported_reasons


def _interpreted() -> bool:
    """Whether Triton's interpreter stands in for a GPU: the tests switch it on."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _why_missing() -> str | None:
    """Why no Triton kernel can run in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return 'Triton is not installed; `pip install "rftcore[triton]"` does'
    if not _interpreted() and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler, which it needs for launches; install gcc, or name one in CC"
    return None


@functools.cache
def _why_not_on(device: torch.device) -> str | None:
    """Why no Triton kernel can run on this GPU, or None."""
    if torch.version.hip is not None or not torch.cuda.is_available():
        return f"it is for NVIDIA GPUs with a driver that works, and {device} is none here"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        return f"it is for compute capability 8.0 and later, {device} has {capability[0]}.{capability[1]}"
    return None
