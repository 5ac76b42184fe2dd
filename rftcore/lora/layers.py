"""A LoRA as its layers, by the names that diffusers gives them, whatever file it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Layer:
    """The change of one layer's weight, dW = alpha / rank * up @ down.

    Attributes:
        down: (rank, inputs), or a convolution's (rank, inputs, kernel height, kernel width).
        up: (outputs, rank), or (outputs, rank, 1, 1).
        alpha: as PEFT's `lora_alpha` without rslora.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What up @ down is multiplied by."""
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the weight that is changed: outputs, inputs, and a convolution's kernel."""
        return (self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class Lora:
    """A LoRA.

    Attributes:
        layers: component and module, such as "unet.mid_block.attentions.0.proj_in" -> its change. A text encoder's
            names begin with "text_model.", as transformers 4 and most files have them.
        layout: of the file: diffusers, diffusers-old, peft or kohya.
        configs: component -> the PEFT config that the file had for it.
        metadata: what else the file says, such as a trainer's settings.
    """

    layers: Mapping[str, Layer]
    layout: str = "diffusers"
    configs: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def components(self) -> list[str]:
        """Those that have layers."""
        found = {split(name)[0] for name in self.layers}
        return [name for name in COMPONENTS if name in found]

    def of(self, component: str) -> dict[str, Layer]:
        """The layers of one component, by the module's name alone."""
        return {
            module: layer for name, layer in self.layers.items() for part, module in [split(name)] if part == component
        }


def split(name: str) -> tuple[str, str]:
    """Component and module of a layer's name."""
    component, _, module = name.partition(".")
    return component, module


def block(name: str) -> str:
    """The part of the model that a layer belongs to: unet.down_blocks.0, unet.mid_block, text_encoder, ..."""
    component, module = split(name)
    if component != "unet":
        return component
    parts = module.split(".")
    return f"unet.{'.'.join(parts[:2]) if parts[0] in ('down_blocks', 'up_blocks') else parts[0]}"


def ending(name: str) -> str:
    """What a module is, without where: to_q, to_out.0, ff.net.0.proj, conv1."""
    parts = name.split(".")
    if "ff" in parts:
        return ".".join(parts[parts.index("ff") :])
    return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:])


def base(lora: Lora) -> str | None:
    """The kind of model that a LoRA is of, "sd1", "sd2", "sdxl" or "pixels", as far as its layers tell; else None.

    A cross-attention's inputs are the text's width. Where that is none of the published ones, the blocks tell SDXL from
    the others.
    """
    if "text_encoder_2" in lora.components:
        return "sdxl"
    layers = lora.of("unet")
    for name, layer in layers.items():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            known = {768: "sd1", 1024: "sd2", 2048: "sdxl"}.get(layer.down.shape[1])
            if known:
                return known
    if any(name.startswith("add_embedding") or "transformer_blocks.1." in name for name in layers):
        return "sdxl"
    # Of the published ones SDXL alone has attention in the first block up, and none in the first block down.
    up, down = (any(name.startswith(f"{side}_blocks.0.attentions") for name in layers) for side in ("up", "down"))
    if up and not down and any("transformer_blocks" in name for name in layers):
        return "sdxl"
    if any("attentions" in name and "transformer_blocks" not in name and ".to_" in name for name in layers):
        return "pixels"
    return None
