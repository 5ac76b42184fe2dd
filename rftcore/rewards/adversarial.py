"""Images that a classifier takes for another thing: the log-probability of a class that is not the prompt's."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

from torch import Tensor, nn
from transformers import ResNetForImageClassification

from rftcore.rewards import checkpoints
from rftcore.rewards.preprocessing import IMAGENET_MEAN, IMAGENET_STD, centre_crop, normalise, resize_shortest
from rftcore.rewards.reward import RewardSpecError, declare
from rftcore.rewards.towers import checkpoint_layers, freeze, looked_at

NAME = "adversarial"
HUB = "microsoft/resnet-50"
# Of that model's processor, which every ImageNet ResNet of transformers shares: the shortest edge is resized to
# 224 / 0.875, and 224 are cut out.
EDGE, CROP = 256, 224


@declare(
    differentiable=True,
    unit="nats",
    range=(-math.inf, 0.0),
    downloads=(f"{HUB} (about 0.1 GB)",),
    licence="Apache-2.0",
)
class Adversarial(nn.Module):
    """How surely a classifier takes an image for the class `target`, whatever its prompt: log p(target | image).

    Args:
        target: a class, by its index or by its name: the whole label, or one of its comma-separated synonyms.
        model: a ResNet of transformers that was trained on ImageNet at 224 px, a hub name or a folder.
        checkpointing: its layers are computed again in the backward, which keeps their memory small.
        dtype: of the model, "fp32", "fp16" or "bf16"; the score is fp32.
        revision: of its repository.

    Raises: RewardSpecError for a class that the model does not know, or a model that is not found.

    Source: Clark et al., DRaFT (2309.17400), adversarial examples.
    """

    def __init__(
        self,
        target: int | str,
        model: str = HUB,
        *,
        checkpointing: bool = True,
        dtype: str = "fp32",
        revision: str | None = None,
    ) -> None:
        super().__init__()
        classifier = checkpoints.load(
            ResNetForImageClassification,
            NAME,
            "model",
            model,
            revision=revision,
            dtype=checkpoints.named_dtype(NAME, dtype),
        )
        labels = {int(index): label for index, label in classifier.config.id2label.items()}
        self.target = _index(target, labels)
        self.label = labels[self.target]
        if checkpointing:
            for stage in classifier.resnet.encoder.stages:
                checkpoint_layers(stage.layers)
        self.classifier = freeze(classifier)

    def forward(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict] | None = None) -> Tensor:
        """Rewards (B,) of images (B, 3, H, W) in [0, 1]."""
        pixels = normalise(centre_crop(resize_shortest(images, EDGE), CROP, CROP), IMAGENET_MEAN, IMAGENET_STD)
        return looked_at(self._logits, pixels, self.classifier.dtype).log_softmax(dim=-1)[:, self.target]

    def _logits(self, pixels: Tensor) -> Tensor:
        return self.classifier(pixels.to(self.classifier.dtype)).logits


def _index(target: int | str, labels: dict[int, str]) -> int:
    """The class of that index or name. Raises: RewardSpecError where it is none, or several."""
    if isinstance(target, int) and not isinstance(target, bool):
        if target in labels:
            return target
        raise RewardSpecError(
            f"reward {NAME!r} has the target {target}, and its model has the classes 0 to {len(labels) - 1}"
        )
    if not isinstance(target, str):
        raise RewardSpecError(f"reward {NAME!r} has the target {target!r}; give a class's index or its name")
    wanted = target.strip().lower()
    synonyms: dict[str, list[int]] = {}
    for index, label in labels.items():
        for name in dict.fromkeys(part.strip() for part in label.lower().split(",")):
            synonyms.setdefault(name, []).append(index)
    # ImageNet has a label that is another's synonym, and two that are the same word.
    whole = [index for index, label in labels.items() if label.lower() == wanted]
    found = whole or synonyms.get(wanted, [])
    if len(found) == 1:
        return found[0]
    if found:
        which = ", ".join(f"{index} ({labels[index]!r})" for index in found)
        raise RewardSpecError(f"reward {NAME!r}: {target!r} names the classes {which}; give the index of one")
    close = difflib.get_close_matches(wanted, synonyms, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    raise RewardSpecError(
        f"reward {NAME!r}: no class is named {target!r}; {hint}The model's config.json lists its {len(labels)} classes "
        "under id2label"
    )
