"""ImageReward: how well people would like an image for its prompt, by BLIP trained on their rankings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import BertTokenizer

from rftcore.rewards import blip, checkpoints
from rftcore.rewards.affine_head import folded
from rftcore.rewards.preprocessing import CLIP_MEAN, CLIP_STD, normalise, resize_shortest
from rftcore.rewards.reward import check_prompts, declare
from rftcore.rewards.towers import checkpoint_layers, freeze, looked_at

NAME = "imagereward"
HUB, TOKENIZER = "THUDM/ImageReward", "google-bert/bert-base-uncased"
FILES = ("ImageReward.safetensors", "ImageReward.pt")
# Tokens of a prompt, with its start and end; the rest is cut off.
LENGTH = 35
# Of the scores on the original's training images: a reward is so many deviations above their mean.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
_HEAD = "mlp."


@declare(
    differentiable=True,
    unit="standard deviations",
    downloads=(f"{HUB} (about 1.8 GB)", f"{TOKENIZER} (its tokenizer, about 1 MB)"),
    licence="Apache-2.0",
)
class ImageReward(nn.Module):
    """How well an image suits its prompt, by BLIP trained on people's rankings: deviations above the mean.

    It is (mlp(first token of the text tower that looks at the image) - 0.16717) / 1.03334. Images go through the
    original's resize of the shortest edge and centre crop to 224 px; a prompt has 35 tokens.

    Args:
        model: a hub name, a folder with ImageReward.safetensors or ImageReward.pt, or such a file.
        tokenizer: BERT's uncased one, a hub name or a folder.
        checkpointing: both towers' layers are computed again in the backward, which keeps their memory small.
        dtype: of the towers, "fp32", "fp16" or "bf16"; the score is fp32.
        revision: of the model's repository.

    Raises: RewardSpecError where a file is not found or is not ImageReward's.

    Source: Xu et al., ImageReward (2304.05977).
    """

    slope: Tensor
    offset: Tensor

    def __init__(
        self,
        model: str = HUB,
        tokenizer: str = TOKENIZER,
        *,
        checkpointing: bool = True,
        dtype: str = "fp32",
        revision: str | None = None,
    ) -> None:
        super().__init__()
        lower = checkpoints.named_dtype(NAME, dtype)
        path = checkpoints.file(NAME, "model", model, *FILES, revision=revision)
        source = blip.Source(checkpoints.tensors(path, NAME, "model"), NAME, path)
        self.vision, self.text = (freeze(tower(source)).to(lower) for tower in (blip.vision_tower, blip.text_tower))
        slope, offset = _head(source, self.text.config.hidden_size)
        self.register_buffer("slope", slope)
        self.register_buffer("offset", offset)
        self.tokenizer = checkpoints.load(BertTokenizer, NAME, "tokenizer", tokenizer)
        if checkpointing:
            checkpoint_layers(self.vision.encoder.layers)
            checkpoint_layers(self.text.encoder.layer)

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict] | None = None) -> Tensor:
        """Rewards (B,) of images (B, 3, H, W) in [0, 1] and their prompts."""
        check_prompts(images, prompts)
        side = self.vision.config.image_size
        text = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(images.device)
        pixels = normalise(_cropped(resize_shortest(images, side), side), CLIP_MEAN, CLIP_STD)

        def first_token(pixels: Tensor) -> Tensor:
            seen = self.vision(pixels.to(self.vision.dtype)).last_hidden_state
            return self.text(text.input_ids, text.attention_mask, encoder_hidden_states=seen).last_hidden_state[:, 0]

        return looked_at(first_token, pixels, self.vision.dtype).mul(self.slope).sum(-1) + self.offset


def _cropped(images: Tensor, side: int) -> Tensor:
    """The middle as torchvision cuts it: half a pixel goes to the even neighbour, where CLIP's processor rounds down."""
    top, left = (round((edge - side) / 2) for edge in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def _head(source: blip.Source, width: int) -> tuple[Tensor, Tensor]:
    """The head, whose layers are the aesthetic predictor's, and its normalisation: w (C,) and b () of w x + b."""
    layers = {name[len(_HEAD) :]: value for name, value in source.tensors.items() if name.startswith(_HEAD)}
    try:
        slope, offset = folded(layers)
    except (KeyError, RuntimeError, ValueError) as error:
        raise source.refused(f"its head, the names under {_HEAD!r}, is another: {error}") from error
    if slope.numel() != width:
        raise source.refused(f"its head takes {slope.numel()} numbers, and its text tower gives {width}")
    return (slope / STD).float(), ((offset - MEAN) / STD).float()
