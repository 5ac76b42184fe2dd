"""CLIP as rewards look through it: features of images with gradient, features of prompts computed once."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from rftcore.rewards import checkpoints
from rftcore.rewards.preprocessing import clip_input
from rftcore.rewards.reward import check_prompts
from rftcore.rewards.towers import checkpoint_layers, freeze, looked_at

# Prompts whose features are kept: a few MiB of them.
_KEPT_PROMPTS = 4096


class Clip(nn.Module):
    """A frozen CLIP model with its tokenizer.

    A caller's autocast does not change its values. Prompts are encoded one by one, whichever come together, such that
    a run that goes on from a checkpoint, whose cache is empty, sees the same bits.

    Args:
        model: transformers' CLIPModel, or its CLIPVisionModelWithProjection, which has no text.
        tokenizer: None where there is no text.
        checkpointing: the vision tower's layers are computed again in the backward.
    """

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, checkpointing: bool = True) -> None:
        super().__init__()
        self.model = freeze(model)
        self.tokenizer = tokenizer
        self._texts: collections.OrderedDict[str, Tensor] = collections.OrderedDict()
        if checkpointing:
            checkpoint_layers(self.model.vision_model.encoder.layers)

    @property
    def image_size(self) -> int:
        """Of the squares that `image_features` takes, in pixels."""
        config: Any = self.model.config
        return getattr(config, "vision_config", config).image_size

    @property
    def logit_scale(self) -> Tensor:
        """exp of the model's, what it multiplies cosines by: a number in fp32."""
        return self.model.logit_scale.detach().float().exp()

    def image_features(self, images: Tensor) -> Tensor:
        """Features (B, D) of length 1, in fp32, of images (B, 3, H, W) in [0, 1], as CLIP's processor prepares them."""
        return self.pixel_features(clip_input(images, self.image_size))

    def pixel_features(self, pixels: Tensor) -> Tensor:
        """As `image_features`, of what has been prepared, (B, 3, size, size)."""
        return F.normalize(looked_at(self._features, pixels, self.model.dtype), dim=-1)

    def _features(self, pixels: Tensor) -> Tensor:
        if isinstance(self.model, CLIPVisionModelWithProjection):
            return self.model(pixel_values=pixels).image_embeds
        return pooled(self.model.get_image_features(pixel_values=pixels))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Features (B, D) of length 1, in fp32, of prompts, cut off where CLIP's text ends; they have no gradient."""
        return torch.stack([self._text(prompt) for prompt in prompts])

    def similarity(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines (B,) of each image's and its own prompt's features."""
        return self.cosines(self.image_features(images), prompts)

    def cosines(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """As `similarity`, of the images' features (B, D). Raises: RewardSpecError unless there are B prompts."""
        check_prompts(features, prompts)
        return (features * self.text_features(prompts)).sum(-1)

    def _text(self, prompt: str) -> Tensor:
        if prompt not in self._texts:
            self._texts[prompt] = self._encoded(prompt)
            if len(self._texts) > _KEPT_PROMPTS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(prompt)
        return self._texts[prompt]

    # What was made in inference mode could not be part of a graph later.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _encoded(self, prompt: str) -> Tensor:
        device = self.model.device
        # The text tower is causal and takes the end token's output: what comes behind it, padding, does not matter.
        ids = self.tokenizer(
            prompt,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )["input_ids"].to(device)
        with torch.autocast(device.type, enabled=False):
            return F.normalize(_widened(pooled(self.model.get_text_features(input_ids=ids))), dim=-1)[0]

    def _apply(self, *args: Any, **kwargs: Any) -> Clip:
        # Moved, or cast: the features are of another device, or of another model.
        self._texts.clear()
        return super()._apply(*args, **kwargs)


def load_clip(
    reward: str,
    model: str | Path,
    *,
    option: str = "model",
    tokenizer: str | Path | None = None,
    checkpointing: bool = True,
    dtype: str = "fp32",
    revision: str | None = None,
) -> Clip:
    """CLIP by hub name or folder.

    Args:
        reward, option: who asks, for the errors.
        tokenizer: where it is elsewhere than the model.

    Raises: RewardSpecError, as `checkpoints.load`, or for an unknown dtype.
    """
    found = checkpoints.load(
        CLIPModel, reward, option, model, revision=revision, dtype=checkpoints.named_dtype(reward, dtype)
    )
    where, place = ("tokenizer", tokenizer) if tokenizer is not None else (option, model)
    words = checkpoints.load(CLIPTokenizer, reward, where, place, revision=revision if tokenizer is None else None)
    return Clip(found, words, checkpointing=checkpointing)


def pooled(output: Any) -> Tensor:
    """Features (B, D) of what CLIP's `get_..._features` return: themselves in transformers 4, among others in 5."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _widened(features: Tensor) -> Tensor:
    return features.to(torch.promote_types(features.dtype, torch.float32))
