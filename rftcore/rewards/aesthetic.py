"""LAION's aesthetic predictor: how much people would like an image, whatever its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from rftcore.rewards import checkpoints
from rftcore.rewards.clip import Clip, named_dtype
from rftcore.rewards.reward import declare

NAME = "aesthetic"
MODEL = "openai/clip-vit-large-patch14"
HEAD = "trl-lib/ddpo-aesthetic-predictor"
# As LAION and as the hub's repository call it.
HEAD_FILES = (
    "sac+logos+ava1-l14-linearMSE.safetensors",
    "sac+logos+ava1-l14-linearMSE.pth",
    "aesthetic-model.pth",
)
# The linear layers of its sequence; between them is dropout alone.
_LAYERS = (0, 2, 4, 6, 7)


@declare(
    differentiable=True,
    unit="aesthetic score",
    range=(1.0, 10.0),
    downloads=(f"{MODEL} (1.7 GB)", f"{HEAD} (4 MB)"),
    licence="MIT (openai/CLIP), Apache-2.0 (improved-aesthetic-predictor)",
)
class Aesthetic(nn.Module):
    """A score that was fitted to people's, from 1 to 10; images of Stable Diffusion have about 5.4.

    The predictor has five linear layers and nothing between them: it is one affine map of CLIP's features, and computed
    so. The features are of length 1; without that, scores beyond 20 are seen.

    Args:
        model: CLIP ViT-L/14 by hub name or folder; its text is not loaded.
        head: the predictor: a file (.safetensors, .pth), a folder with one, or a hub name. LAION's is
            sac+logos+ava1-l14-linearMSE.pth in github.com/christophschuhmann/improved-aesthetic-predictor.
        checkpointing: the tower's layers are computed again in the backward, which keeps their memory small.
        dtype: of the tower, "fp32", "fp16" or "bf16"; the score is fp32.
        revision: of the model's repository.

    Raises: RewardSpecError where one of them does not load, or they do not belong together.

    Source: Schuhmann 2022, github.com/christophschuhmann/improved-aesthetic-predictor.
    """

    slope: Tensor
    offset: Tensor

    def __init__(
        self,
        model: str = MODEL,
        head: str = HEAD,
        *,
        checkpointing: bool = True,
        dtype: str = "fp32",
        revision: str | None = None,
    ) -> None:
        super().__init__()
        tower = checkpoints.load(
            CLIPVisionModelWithProjection, NAME, "model", model, revision=revision, dtype=named_dtype(NAME, dtype)
        )
        path = checkpoints.file(NAME, "head", head, *HEAD_FILES)
        tensors = checkpoints.tensors(path, NAME, "head")
        try:
            slope, offset = folded(tensors)
        except (KeyError, RuntimeError, ValueError) as error:
            raise checkpoints.refuse(NAME, "head", path, f"it is no aesthetic predictor's: {error}") from error
        if slope.numel() != tower.config.projection_dim:
            raise checkpoints.refuse(
                NAME,
                "head",
                path,
                f"it takes {slope.numel()} features, and the model {model!r} gives {tower.config.projection_dim}",
            )
        self.clip = Clip(tower, checkpointing=checkpointing)
        self.register_buffer("slope", slope.float())
        self.register_buffer("offset", offset.float())

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict] | None = None) -> Tensor:
        """Rewards (B,) of images (B, 3, H, W) in [0, 1]."""
        return (self.clip.image_features(images) * self.slope).sum(-1) + self.offset


def folded(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The affine map that the predictor's layers are together: w (D,) and b () of w x + b, in fp64.

    Raises: KeyError for a layer that is missing, ValueError for one too many or more outputs than one, RuntimeError for
        layers that do not follow each other.
    """
    names = [f"layers.{layer}.{kind}" for layer in _LAYERS for kind in ("weight", "bias")]
    if missing := [name for name in names if name not in tensors]:
        raise KeyError(f"{missing[0]} is missing")
    if others := sorted(set(tensors) - set(names)):
        raise ValueError(f"it has {others[0]}, too")
    slope, offset = torch.eye(tensors[names[0]].shape[1], dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for layer in _LAYERS:
        weight, bias = (tensors[f"layers.{layer}.{kind}"].double() for kind in ("weight", "bias"))
        slope, offset = weight @ slope, (weight @ offset if offset.ndim else 0) + bias
    if slope.shape[0] != 1:
        raise ValueError(f"it gives {slope.shape[0]} numbers, not one")
    return slope[0], offset[0]
