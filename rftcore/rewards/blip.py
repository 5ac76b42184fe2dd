"""BLIP's two towers as ImageReward has them, in transformers' classes, from the original's tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from rftcore.rewards import checkpoints
from rftcore.rewards.reward import RewardSpecError

# BLIP of every size has heads of this width; the tensors do not tell.
HEAD = 64
VISION, TEXT = "blip.visual_encoder.", "blip.text_encoder."
# Names of a layer of the original's vision tower, and what transformers calls them.
_LAYER = {
    "norm1": "layer_norm1",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_AROUND = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}


@dataclass(frozen=True)
class Source:
    """The original's tensors by their names, with the reward and the place they are of for the errors."""

    tensors: Mapping[str, Tensor]
    reward: str
    place: str | Path

    def __getitem__(self, name: str) -> Tensor:
        """Raises: RewardSpecError where there is none of the name."""
        if name not in self.tensors:
            raise self.refused(f"it has no {name!r}")
        return self.tensors[name]

    def layers(self, prefix: str) -> int:
        """How many layers there are with names of that prefix and a number; at least one, for its absence to show."""
        numbers = {name[len(prefix) :].split(".")[0] for name in self.tensors if name.startswith(prefix)}
        return max(1, len(numbers))

    def refused(self, reason: str) -> RewardSpecError:
        """The error to raise where the tensors do not fit."""
        return checkpoints.refuse(self.reward, "model", self.place, f"{reason}; it must be ImageReward's checkpoint")


def vision_tower(source: Source) -> BlipVisionModel:
    """The vision tower, as large as the tensors are; its image side in pixels is `config.image_size`.

    Raises: RewardSpecError where one is missing, or has another shape than the others ask for.
    """
    layers = source.layers(f"{VISION}blocks.")
    names = {ours: f"{VISION}{original}" for original, ours in _AROUND.items()}
    for layer in range(layers):
        for original, ours in _LAYER.items():
            for part in ("weight", "bias"):
                names[f"encoder.layers.{layer}.{ours}.{part}"] = f"{VISION}blocks.{layer}.{original}.{part}"
    _, positions, width = source[f"{VISION}pos_embed"].shape
    patch = source[f"{VISION}patch_embed.proj.weight"].shape[-1]
    config = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(source[f"{VISION}blocks.0.mlp.fc1.bias"]),
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD,
        # One of the positions is the class token's.
        image_size=patch * math.isqrt(positions - 1),
        patch_size=patch,
        # The original's, where transformers' default is 1e-5.
        layer_norm_eps=1e-6,
    )
    return _filled(BlipVisionModel, config, source, names)


def text_tower(source: Source) -> BlipTextModel:
    """The text tower: its layers look at an image's tokens, `encoder_hidden_states`, after they looked at the text.

    Raises: RewardSpecError, as `vision_tower`.
    """
    vocabulary, width = source[f"{TEXT}embeddings.word_embeddings.weight"].shape
    config = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=source[f"{TEXT}encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=len(source[f"{TEXT}encoder.layer.0.intermediate.dense.bias"]),
        num_hidden_layers=source.layers(f"{TEXT}encoder.layer."),
        num_attention_heads=width // HEAD,
        max_position_embeddings=len(source[f"{TEXT}embeddings.position_embeddings.weight"]),
        layer_norm_eps=1e-12,
        # Gives the layers their cross attention. Whether a token sees what follows it is for a call to say: it does
        # unless `is_decoder` is given there, too.
        is_decoder=True,
    )
    tower = _filled(BlipTextModel, config, source, None, add_pooling_layer=False)
    # The one buffer, which was made without memory, and which today's checkpoints do not have.
    tower.embeddings.position_ids = torch.arange(config.max_position_embeddings)[None]
    return tower


def _filled(kind: Any, config: Any, source: Source, names: Mapping[str, str] | None, **settings: Any) -> nn.Module:
    """A model whose parameters are the source's, in fp32: nothing is drawn at random first, or held twice.

    Args:
        names: the original's of each; None where it has them under "blip.text_encoder.".
    """
    with torch.device("meta"):
        model = kind(config, **settings)
    filling = {}
    for ours, parameter in model.state_dict().items():
        name = names[ours] if names else TEXT + ours
        if source[name].shape != parameter.shape:
            shapes = f"{tuple(source[name].shape)}, where its other tensors ask for {tuple(parameter.shape)}"
            raise source.refused(f"its {name!r} is {shapes}")
        filling[ours] = source[name].float()
    model.load_state_dict(filling, assign=True)
    return model
