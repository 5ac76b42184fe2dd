"""The trained adapter at several scales between none and all of it: how much of it is worth having.

Interpolating with the pretrained model trades reward against drift (DRaFT, arXiv 2309.17400, "LoRA scaling").
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from peft.tuners.lora import LoraLayer
from PIL import Image
from torch import nn

from rftcore.errors import UsageError
from rftcore.training import weights
from rftcore.training.config import EvalConfig
from rftcore.training.evaluation.validation import Evaluation


@dataclass(frozen=True)
class Sweep:
    """Each scale's measures, as `Evaluation.measures` gives them, and its grid, where it was made here; seconds."""

    measures: dict[float, Mapping[str, Sequence[float]]]
    grids: dict[float, Image.Image]
    seconds: float


def check(config: EvalConfig) -> None:
    """Raises UsageError for scales that are no part of the adapter."""
    if not all(0 <= scale <= 1 for scale in config.lora_scales):
        raise UsageError(
            f"eval.lora_scales={config.lora_scales} must lie between 0 (the model without its adapter) and 1 (all of it)"
        )


def sweep(
    unet: nn.Module,
    scales: Sequence[float],
    known: Mapping[float, Mapping[str, Sequence[float]]],
    evaluate: Callable[[], Evaluation],
    measure: Callable[[Evaluation], Mapping[str, Sequence[float]]],
) -> Sweep:
    """Evaluates at each scale, but for those whose measures are known."""
    started = time.perf_counter()
    measures, grids = {}, {}
    for scale in sorted(set(scales)):
        if scale in known:
            measures[scale] = known[scale]
        else:
            with lora_scale(unet, scale):
                evaluation = evaluate()
            measures[scale], grids[scale] = measure(evaluation), evaluation.grid
    return Sweep(measures, grids, time.perf_counter() - started)


@contextmanager
def lora_scale(unet: nn.Module, scale: float) -> Iterator[None]:
    """The adapter counts `scale` times in the block, and afterwards exactly as before.

    On the layers themselves, as a UNet2DModel takes no cross_attention_kwargs.
    """
    layers = [module for module in unet.modules() if isinstance(module, LoraLayer)]
    before = [layer.scaling[weights.ADAPTER] for layer in layers]
    try:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling[weights.ADAPTER] = scaling * scale
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling[weights.ADAPTER] = scaling
