"""LAION's aesthetic predictor: how much people would like an image, whatever its prompt."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from rftcore.rewards import checkpoints
from rftcore.rewards.affine_head import folded
from rftcore.rewards.clip import Clip
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


@declare(
    differentiable=True,
    unit="aesthetic score",
    range=(1.0, 10.0),
    downloads=(f"{MODEL} (about 1.7 GB)", f"{HEAD} (about 4 MB)"),
    licence="MIT (openai/CLIP), Apache-2.0 (improved-aesthetic-predictor)",
)
class Aesthetic(nn.Module):
    """How much people would like an image, by LAION's predictor: 1 to 10, about 5.4 for Stable Diffusion's.

    It was fitted to people's scores, and looks at no prompt. It has five linear layers and nothing between them: it is
    one affine map of CLIP's features, and computed so. The features are of length 1; without that, scores beyond 20 are
    seen.

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
            CLIPVisionModelWithProjection,
            NAME,
            "model",
            model,
            revision=revision,
            dtype=checkpoints.named_dtype(NAME, dtype),
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
