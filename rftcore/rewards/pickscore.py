"""PickScore: CLIP, trained on which of two images people pick for a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rftcore.rewards.clip import load_clip
from rftcore.rewards.reward import declare

NAME = "pickscore"
MODEL = "yuvalkirstain/PickScore_v1"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@declare(
    differentiable=True,
    unit="logit of a pick",
    range=(18.0, 24.0),
    downloads=(f"{MODEL} (about 3.9 GB)", f"{TOKENIZER} (the tokenizer alone, about 3 MB)"),
    licence="MIT (yuvalkirstain/PickScore)",
)
class PickScore(nn.Module):
    """How gladly people would pick an image for its prompt: exp(logit_scale) cos(image, prompt), about 18 to 24.

    Each image is scored against its own prompt. The softmax of two images' scores is the probability that people pick
    one of them.

    Args:
        model: hub name, or folder.
        tokenizer: likewise; None: the model's own folder.
        checkpointing: the vision tower's layers are computed again in the backward, which keeps their memory small.
        dtype: of the model, "fp32", "fp16" or "bf16"; the score is fp32.
        revision: of the model's repository.

    Raises: RewardSpecError where one of them does not load.

    Source: Kirstain et al. 2023 (arXiv:2305.01569), Eq. 1.
    """

    def __init__(
        self,
        model: str = MODEL,
        tokenizer: str | None = TOKENIZER,
        *,
        checkpointing: bool = True,
        dtype: str = "fp32",
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.clip = load_clip(
            NAME, model, tokenizer=tokenizer, checkpointing=checkpointing, dtype=dtype, revision=revision
        )

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict] | None = None) -> Tensor:
        """Rewards (B,) of images (B, 3, H, W) in [0, 1]."""
        return self.clip.logit_scale * self.clip.similarity(images, prompts)
