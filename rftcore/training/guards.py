"""Step 1's proof that every adapter learns: a gradient that is quietly zero trains nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from rftcore.training.errors import RunError


def check_adapters_learn(unet: nn.Module, run_forward: Callable[[], object]) -> None:
    """After the first backward: each adapted module that ran has a non-zero gradient on its LoRA A or B.

    B starts at zero, which makes A's first gradient exactly zero: so one of the two must be non-zero, not both.
    `run_forward` samples once without gradient; it is called only where a gradient is missing, to tell a module that
    is broken from one that never runs (which is only warned about).
    Raises: RunError naming the broken modules.
    """
    layers = trainable_lora_layers(unet)
    silent = [name for name, layer in layers.items() if not _has_gradient(layer)]
    if not silent:
        return
    ran = _modules_that_run({name: layers[name] for name in silent}, run_forward)
    idle = [name for name in silent if name not in ran]
    if idle:
        warnings.warn(f"{len(idle)} adapted module(s) never run and are not trained: {_listed(idle)}", stacklevel=2)
    broken = [name for name in silent if name in ran]
    if broken and len(broken) == len(layers) - len(idle):
        raise RunError(
            "step 1: no adapted module received a gradient; the reward's gradient is zero for every sample. Is the "
            "reward flat there, or is every pixel clamped at black or white (train/saturated in metrics.jsonl)?"
        )
    if broken:
        raise RunError(
            f"step 1: {len(broken)} of {len(layers)} adapted modules ran but received no gradient on LoRA A or B: "
            f"{_listed(broken)}. Something cuts the graph there (a detach, a no_grad, an in-place copy of the weights, "
            "a replaced forward); repair it, or leave them out of lora.target_modules"
        )


def trainable_lora_layers(unet: nn.Module) -> dict[str, LoraLayer]:
    """The adapted modules, by name, that have a trainable LoRA parameter."""
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, LoraLayer) and any(True for _ in _lora_parameters(module))
    }


def _lora_parameters(layer: LoraLayer) -> Iterable[nn.Parameter]:
    for part in (layer.lora_A, layer.lora_B):
        yield from (parameter for parameter in part.parameters() if parameter.requires_grad)


def _has_gradient(layer: LoraLayer) -> bool:
    gradients = [parameter.grad for parameter in _lora_parameters(layer)]
    return any(gradient is not None and bool(torch.any(gradient != 0)) for gradient in gradients)


def _modules_that_run(layers: dict[str, LoraLayer], run_forward: Callable[[], object]) -> set[str]:
    ran: set[str] = set()
    hooks = [layer.register_forward_hook(lambda *_, name=name: ran.add(name)) for name, layer in layers.items()]
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
