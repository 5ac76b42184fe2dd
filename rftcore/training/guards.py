"""Step 1's proof that everything learns: a gradient that is quietly zero trains nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import nn

from rftcore.errors import RunError
from rftcore.training import weights


def check_everything_learns(unet: nn.Module, run_forward: Callable[[], object]) -> None:
    """After the first backward: each trained module that ran has a non-zero gradient on one of its parameters.

    On one, not on all: LoRA's B starts at zero, which makes A's first gradient exactly zero, and a key's bias never has
    one. `run_forward` samples once without gradient; it is called only where a gradient is missing, to tell a module
    that is broken from one that never runs (which is only warned about).
    Raises: RunError naming the broken modules.
    """
    silent = weights.silent(unet)
    if not silent:
        return
    kind = "adapted" if weights.is_lora(unet) else "trained"
    ran = _modules_that_run(unet, silent, run_forward)
    idle = [name for name in silent if name not in ran]
    if idle:
        warnings.warn(f"{len(idle)} {kind} module(s) never run and are not trained: {_listed(idle)}", stacklevel=2)
    broken, modules = [name for name in silent if name in ran], len(weights.trained_modules(unet))
    if broken and len(broken) == modules - len(idle):
        raise RunError(
            f"step 1: no {kind} module received a gradient; the reward's gradient is zero for every sample. Is the "
            "reward flat there, or is every pixel clamped at black or white (train/saturated in metrics.jsonl)?"
        )
    if broken:
        lora = weights.is_lora(unet)
        raise RunError(
            f"step 1: {len(broken)} of {modules} {kind} modules ran but received no gradient on "
            f"{'LoRA A or B' if lora else 'any of their weights'}: {_listed(broken)}. Something cuts the graph there (a "
            "detach, a no_grad, an in-place copy of the weights, a replaced forward); repair it"
            f"{', or leave them out of lora.target_modules' if lora else ''}"
        )


def _modules_that_run(unet: nn.Module, names: Iterable[str], run_forward: Callable[[], object]) -> set[str]:
    ran: set[str] = set()
    hooks = [unet.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.add(name)) for name in names]
    try:
        with torch.no_grad():
            run_forward()
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
