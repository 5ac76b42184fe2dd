"""The adapter's part of `rftcore.training.weights`, by its earlier names."""

from __future__ import annotations

from types import SimpleNamespace

from rftcore.training import weights
from rftcore.training.config import LoraConfig
from rftcore.training.weights import ADAPTER, FILE, UNet, save, trainable, verify_reload

__all__ = ["ADAPTER", "FILE", "attach", "save", "trainable", "verify_reload"]


def attach(unet: UNet, config: LoraConfig, seed: int) -> None:
    """`weights.attach` with `train.weights: lora`."""
    weights.attach(unet, SimpleNamespace(lora=config, train=SimpleNamespace(weights="lora")), seed)
