"""Objects that shall appear in an image, or be gone from it, as the open-vocabulary detector OWL-ViT sees them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import CLIPTokenizer, OwlViTForObjectDetection

from rftcore.rewards import checkpoints
from rftcore.rewards.preprocessing import CLIP_MEAN, CLIP_STD, normalise, resize
from rftcore.rewards.reward import RewardSpecError, declare
from rftcore.rewards.towers import checkpoint_layers, freeze, looked_at

HUB = "google/owlvit-base-patch32"


class _Detector(nn.Module):
    """The most confident box's logit for each query.

    Args:
        queries: texts to look for, such as "a photo of a dog"; one, or several.
        model: OWL-ViT, a hub name or a folder.
        log: the mean of the log-probabilities in nats instead of that of the probabilities.
        checkpointing: the image tower's layers are computed again in the backward, which keeps their memory small.
        dtype: of the model, "fp32", "fp16" or "bf16"; the score is fp32.
        revision: of its repository.

    Raises: RewardSpecError for no query, one that is longer than the text tower reads, or a model that is not found.
    """

    # What the reward is called in its errors.
    _name: str

    def __init__(
        self,
        queries: str | Sequence[str],
        model: str = HUB,
        *,
        log: bool = False,
        checkpointing: bool = True,
        dtype: str = "fp32",
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.queries = (queries,) if isinstance(queries, str) else tuple(queries)
        if not self.queries or not all(isinstance(query, str) and query.strip() for query in self.queries):
            raise RewardSpecError(
                f"reward {self._name!r} has the queries {queries!r}; give the text of what to look for, or several, as "
                f'in reward.options: {{{self._name}: {{queries: ["a photo of a dog"]}}}}'
            )
        self.log = log
        if log:
            self.unit, self.range = "nats", (-math.inf, 0.0)
        detector = checkpoints.load(
            OwlViTForObjectDetection,
            self._name,
            "model",
            model,
            revision=revision,
            dtype=checkpoints.named_dtype(self._name, dtype),
        )
        tokenizer = checkpoints.load(CLIPTokenizer, self._name, "model", model, revision=revision)
        freeze(detector)
        self.register_buffer("_embedded", self._embed(detector, tokenizer), persistent=False)
        detector.class_head.float()
        # The queries do not change, and nothing asks for boxes: neither needs memory any longer.
        del detector.owlvit.text_model, detector.owlvit.text_projection, detector.box_head
        if checkpointing:
            checkpoint_layers(detector.owlvit.vision_model.encoder.layers)
        self.detector = detector

    @torch.no_grad()
    def _embed(self, detector: OwlViTForObjectDetection, tokenizer: CLIPTokenizer) -> Tensor:
        """(Q, C)."""
        # Padding follows the text's end, from where the embedding is taken, and the text tower looks back only: each
        # query alone is what a padded batch would give.
        rows = []
        longest = detector.config.text_config.max_position_embeddings
        for query in self.queries:
            ids = tokenizer(query, return_tensors="pt").input_ids
            if ids.shape[1] > longest:
                raise RewardSpecError(
                    f"reward {self._name!r}: the query {query!r} is {ids.shape[1]} tokens with its start and end, and "
                    f"OWL-ViT reads {longest}; shorten it, or give its parts as queries"
                )
            with torch.autocast(ids.device.type, enabled=False):
                rows.append(detector.owlvit.text_projection(detector.owlvit.text_model(input_ids=ids).pooler_output))
        embedded = torch.cat(rows).float()
        return embedded / embedded.norm(dim=-1, keepdim=True)

    def logits(self, images: Tensor) -> Tensor:
        """(B, Q) of images (B, 3, H, W) in [0, 1]: of each query's most confident box."""
        side = self.detector.config.vision_config.image_size
        pixels = normalise(resize(images, side, side), CLIP_MEAN, CLIP_STD)
        # The tower casts them to its own dtype; the head, which is small, is fp32.
        tokens = looked_at(self._tokens, pixels, self.detector.owlvit.dtype)
        queries = self._embedded.expand(len(images), -1, -1)
        with torch.autocast(images.device.type, enabled=False):
            return self.detector.class_predictor(tokens.to(queries.dtype), queries)[0].amax(dim=1)

    def _tokens(self, pixels: Tensor) -> Tensor:
        """(B, boxes, C)."""
        return self.detector.image_embedder(pixels)[0].flatten(1, 2)

    def _score(self, logits: Tensor) -> Tensor:
        return (logsigmoid(logits) if self.log else logits.sigmoid()).mean(dim=-1)


@declare(
    differentiable=True,
    unit="probability",
    range=(0.0, 1.0),
    downloads=(f"{HUB} (about 0.6 GB)",),
    licence="Apache-2.0",
)
class Addition(_Detector):
    """How surely the objects of `queries` are somewhere in the image: the mean over queries q of p_q.

    p_q = max over boxes i of sigmoid(l_iq). The maximum, because one box is enough: the small probabilities of the 576
    boxes of an image that shows nothing would add up. Nothing is cut off at a threshold, so that an image without a box
    has a gradient, too. It is p_q (1 - p_q) times the logit's, small for an object that is hardly there: with `log`,
    the mean of log p_q, it is 1 - p_q times the logit's, largest there.

    Images are resized to the model's square without a crop, as its processor does; prompts are not looked at.

    Source: Clark et al., DRaFT (2309.17400), has an OWL-ViT reward; the formula is this project's.
    """

    _name = "owlvit_addition"

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict] | None = None) -> Tensor:
        """Rewards (B,) of images (B, 3, H, W) in [0, 1]."""
        return self._score(self.logits(images))


@declare(
    differentiable=True,
    unit="probability",
    range=(0.0, 1.0),
    downloads=(f"{HUB} (about 0.6 GB)",),
    licence="Apache-2.0",
)
class Removal(_Detector):
    """How surely the objects of `queries` are nowhere in the image: the mean over queries q of 1 - p_q.

    p_q is as in `Addition`. The most confident box alone has a gradient, p_q (1 - p_q) times its logit's, and as it
    fades the next one takes its place; with `log`, the mean of log(1 - p_q), it is p_q times the logit's, largest where
    an object is plainly there.
    """

    _name = "owlvit_removal"

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict] | None = None) -> Tensor:
        """Rewards (B,) of images (B, 3, H, W) in [0, 1]."""
        return self._score(-self.logits(images))
