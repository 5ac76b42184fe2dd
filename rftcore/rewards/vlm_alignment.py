"""Alignment as a vision-language model sees it: what it says of the image, compared with the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from rftcore.rewards import text_similarity
from rftcore.rewards.reward import RewardSpecError, check_prompts, declare
from rftcore.rewards.text_similarity import TextSimilarity
from rftcore.rewards.vlm import Describer
from rftcore.rewards.vlm_client import ChatServer

NAME = "vlm_alignment"
MODEL = "llava-hf/llava-1.5-7b-hf"
QUESTION = "what is going on in this image?"


@declare(
    differentiable=False,
    unit="BERTScore recall",
    range=(-1.0, 1.0),
    downloads=(f"{MODEL} (about 14 GB)", f"{text_similarity.MODEL} (about 3 GB)"),
    licence="Llama 2 Community License (LLaVA), MIT (DeBERTa)",
)
class VlmAlignment(nn.Module):
    """BERTScore recall of the prompt in a vision-language model's answer to a question about the image.

    The model runs in this process, or behind a server (see `rftcore.rewards.vlm_client`). DDPO's released code asks
    "Answer concisely: what is going on in this image?" and compares the answer with "The image contains {prompt}":
    give these as `question` and `reference`. Scores of different models, questions or references are not comparable.

    Args:
        model: an image-text-to-text model of transformers, hub name or folder, None LLaVA 1.5; with `url` the server's
            name for it, None the first that the server lists.
        url: of a server's OpenAI-compatible API, such as http://localhost:8000/v1; None: the model runs here.
        question: what the model is asked about each image.
        reference: text with {} for the prompt, which the answer is compared with.
        max_new_tokens: of an answer.
        images_at_once: that go through the model together, or questions that the server is asked together. No more than
            the reward is called with (`reward.images_per_call`).
        dtype: of the model's weights in this process: fp32, fp16 or bf16.
        similarity: the text encoder, hub name or folder; it computes in fp32.
        similarity_layer: of the encoder; None: bert-score's choice for it.
        timeout_s: seconds that the server may be silent.
        retries: how often the server is asked again.
        key_variable: environment variable with the server's API key.

    Raises:
        RewardSpecError: for a model that cannot be loaded, or arguments that do not fit; when called, for a server that
            cannot be asked or that gives no answer.

    Source: Black et al., DDPO (2305.13301), section 5.2; Zhang et al., BERTScore (1904.09675).
    """

    def __init__(
        self,
        model: str | None = None,
        url: str | None = None,
        question: str = QUESTION,
        reference: str = "{}",
        max_new_tokens: int = 64,
        images_at_once: int = 4,
        dtype: str = "bf16",
        similarity: str = text_similarity.MODEL,
        similarity_layer: int | None = None,
        timeout_s: float = 120.0,
        retries: int = 5,
        key_variable: str | None = None,
    ) -> None:
        super().__init__()
        if reference.count("{}") != 1:
            raise RewardSpecError(f"reward {NAME!r}: reference={reference!r} needs exactly one {{}} for the prompt")
        if min(max_new_tokens, images_at_once) < 1:
            raise RewardSpecError(
                f"reward {NAME!r}: max_new_tokens={max_new_tokens} and images_at_once={images_at_once}; both must be "
                "at least 1"
            )
        self.question, self.reference = question, reference
        self.max_new_tokens, self.images_at_once = max_new_tokens, images_at_once
        if url is not None:
            self.vlm: ChatServer | Describer = ChatServer(
                url, model, timeout_s=timeout_s, retries=retries, key_variable=key_variable
            )
        else:
            self.vlm = Describer(MODEL if model is None else model, dtype, reward=NAME)
        self.similarity = TextSimilarity(similarity, similarity_layer, reward=NAME, option="similarity")

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Any = None) -> Tensor:
        """(B,) fp32 of images (B, 3, H, W) in [0, 1] and B prompts; NaN for an image that holds NaN or inf."""
        check_prompts(images, prompts)
        answers = self.vlm.describe(pictures(images), self.question, self.max_new_tokens, self.images_at_once)
        references = [self.reference.replace("{}", prompt) for prompt in prompts]
        scores = self.similarity.recall(answers, references).to(images.device)
        # What is said of a picture that was made of it is about that picture alone.
        return scores.masked_fill(~images.detach().flatten(1).isfinite().all(1), torch.nan)


def pictures(images: Tensor) -> list[Image.Image]:
    """Images (B, 3, H, W) in [0, 1] as 8-bit pictures."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]
