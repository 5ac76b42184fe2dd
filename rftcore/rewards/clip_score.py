"""CLIPScore: how well an image fits its prompt, to CLIP."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rftcore.rewards.clip import load_clip
from rftcore.rewards.reward import declare

NAME = "clip_score"
MODEL = "openai/clip-vit-large-patch14"


@declare(
    differentiable=True,
    unit="100 cos",
    range=(-100.0, 100.0),
    downloads=(f"{MODEL} (about 1.7 GB)",),
    licence="MIT (openai/CLIP)",
)
class ClipScore(nn.Module):
    """How well an image fits its prompt, to CLIP: 100 cos(image, prompt), about 15 to 35 for what people draw.

    Args:
        model: a CLIP model's hub name or folder.
        checkpointing: the vision tower's layers are computed again in the backward, which keeps their memory small.
        dtype: of the model, "fp32", "fp16" or "bf16"; the score is fp32.
        revision: of the hub's repository.

    Raises: RewardSpecError where the model does not load.

    Source: Hessel et al. 2021 (arXiv:2104.08718), whose CLIP-S is max(0, 2.5 cos); 100 cos, the model's own logit, is
        what is reported of generated images, and has a gradient below 0.
    """

    def __init__(
        self, model: str = MODEL, *, checkpointing: bool = True, dtype: str = "fp32", revision: str | None = None
    ) -> None:
        super().__init__()
        self.clip = load_clip(NAME, model, checkpointing=checkpointing, dtype=dtype, revision=revision)

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict] | None = None) -> Tensor:
        """Rewards (B,) of images (B, 3, H, W) in [0, 1]."""
        return 100 * self.clip.similarity(images, prompts)
