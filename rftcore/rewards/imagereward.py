"""ImageReward: how well people would like an image for its prompt, by BLIP trained on their rankings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import BertTokenizer

from rftcore.rewards import blip, checkpoints
from rftcore.rewards.preprocessing import CLIP_MEAN, CLIP_STD, normalise, resize_shortest
from rftcore.rewards.reward import declare
from rftcore.rewards.towers import checkpoint_layers, freeze

NAME = "imagereward"
HUB, TOKENIZER = "THUDM/ImageReward", "google-bert/bert-base-uncased"
# Tokens of a prompt, with its start and end; the rest is cut off.
LENGTH = 35
# Of the scores on the original's training images: a reward is so many deviations above their mean.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
# The linear layers among the head's; the others are dropout.
_LINEAR = (0, 2, 4, 6, 7)


@declare(
    differentiable=True,
    unit="standard deviations",
    downloads=(f"{HUB} (1.8 GB)", f"{TOKENIZER} (its tokenizer, 1 MB)"),
    licence="Apache-2.0",
)
class ImageReward(nn.Module):
    """(mlp(first token of the text tower that looks at the image) - 0.16717) / 1.03334.

    Images go through the original's resize of the shortest edge and centre crop to 224 px; a prompt has 35 tokens.

    Args:
        model: a hub name, a folder with ImageReward.pt or ImageReward.safetensors, or such a file.
        tokenizer: BERT's uncased one, a hub name or a folder.
        checkpointing: both towers' layers are computed again in the backward.

    Raises: RewardSpecError where a file is not found or is not ImageReward's.

    Source: Xu et al., ImageReward (2304.05977).
    """

    def __init__(self, model: str = HUB, tokenizer: str = TOKENIZER, checkpointing: bool = True) -> None:
        super().__init__()
        path = checkpoints.file(NAME, "model", model, "ImageReward.safetensors", "ImageReward.pt")
        source = blip.Source(checkpoints.tensors(path, NAME, "model"), NAME, path)
        self.vision, self.text = freeze(blip.vision_tower(source)), freeze(blip.text_tower(source))
        weight, bias = _folded(source)
        self.register_buffer("head_weight", weight, persistent=False)
        self.register_buffer("head_bias", bias, persistent=False)
        self.tokenizer = checkpoints.load(BertTokenizer, NAME, "tokenizer", tokenizer)
        if checkpointing:
            checkpoint_layers(self.vision.encoder.layers)
            checkpoint_layers(self.text.encoder.layer)

    def forward(self, images: Tensor, prompts: Sequence[str], metadata=None) -> Tensor:
        """(B,) of images (B, 3, H, W) in [0, 1] and their prompts."""
        side = self.vision.config.image_size
        text = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            pixels = normalise(_cropped(resize_shortest(images, side), side), CLIP_MEAN, CLIP_STD)
            seen = self.vision(pixels.to(self.head_weight.dtype)).last_hidden_state
            read = self.text(text.input_ids, text.attention_mask, encoder_hidden_states=seen).last_hidden_state
            return read[:, 0] @ self.head_weight + self.head_bias


def _cropped(images: Tensor, side: int) -> Tensor:
    """The middle as torchvision cuts it: half a pixel goes to the even neighbour, where CLIP's processor rounds down."""
    top, left = (round((edge - side) / 2) for edge in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def _folded(source: blip.Source) -> tuple[Tensor, Tensor]:
    """The head and its normalisation as one affine map, weight (C,) and bias (): linear layers, and dropout between."""
    weight, bias = torch.eye(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for layer in reversed(_LINEAR):
        bias = weight @ source[f"mlp.layers.{layer}.bias"].double() + bias
        weight = weight @ source[f"mlp.layers.{layer}.weight"].double()
    return (weight[0] / STD).float(), ((bias[0] - MEAN) / STD).float()
