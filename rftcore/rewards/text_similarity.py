"""How much of one text another says: BERTScore's recall, by an encoder of the transformers library."""

from __future__ import annotations

import collections
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoTokenizer

from rftcore.rewards import checkpoints
from rftcore.rewards.reward import RewardSpecError
from rftcore.rewards.towers import freeze

MODEL = "microsoft/deberta-xlarge-mnli"
# The layer whose states agree best with people's judgement of translations (WMT16), by bert-score's table.
LAYERS = {
    "bert-base-uncased": 9,
    "bert-large-uncased": 18,
    "deberta-base-mnli": 9,
    "deberta-large-mnli": 18,
    "deberta-xlarge-mnli": 40,
    "distilbert-base-uncased": 5,
    "distilroberta-base": 5,
    "roberta-base": 10,
    "roberta-large": 17,
}
_LONGEST = 512
# Texts that go through the encoder together, and references whose states are kept.
_AT_ONCE, _REMEMBERED = 64, 512


class _Text(NamedTuple):
    """States of a text's T tokens, (T, width) of length 1, on the CPU, and which of them count, (T,)."""

    states: Tensor
    counts: Tensor


class TextSimilarity(nn.Module):
    """BERTScore recall, without idf weights and without a rescaled baseline.

    Every token of the reference is met by the token of the candidate whose state has the largest cosine with its own;
    the mean of these cosines is the score. As in bert-score, the tokens that open and close a text do not count in the
    reference, and may be met in the candidate; an empty text scores 0. A negative cosine stays what it is (bert-score
    makes it 0 where it pads a batch), so that a score does not depend on the other texts.

    Args:
        model: an encoder, by hub name or folder.
        layer: whose states are compared, 0 the embeddings; None: bert-score's choice for the model.
        reward: for whom it works, in errors.
        option: of that reward, which names the model.

    Raises:
        RewardSpecError: for a model that cannot be loaded, or a layer that is not known or not there.

    Source: Zhang et al. 2020, "BERTScore", equation 1.
    """

    def __init__(
        self,
        model: str = MODEL,
        layer: int | None = None,
        *,
        reward: str = "text_similarity",
        option: str = "model",
    ) -> None:
        super().__init__()
        self.layer = _layer(model, layer, reward)
        self.tokenizer = checkpoints.load(AutoTokenizer, reward, option, model)
        self.encoder = freeze(_encoder(model, reward, option))
        if self.encoder.config.is_encoder_decoder:
            raise RewardSpecError(
                f"reward {reward!r}: {model} has a decoder, and an encoder is needed; take one such as {MODEL}"
            )
        if not 0 <= self.layer <= self.encoder.config.num_hidden_layers:
            raise RewardSpecError(
                f"reward {reward!r}: {model} has {self.encoder.config.num_hidden_layers} layers, and the layer "
                f"{self.layer} was asked for; 0 is its embeddings"
            )
        self._longest = min(
            _LONGEST, self.tokenizer.model_max_length, getattr(self.encoder.config, "max_position_embeddings", _LONGEST)
        )
        # bert-score gives these tokenizers the space that a word has inside a sentence.
        self._space = " " if type(self.tokenizer).__name__.startswith(("Roberta", "GPT2")) else ""
        ids = (self.tokenizer.cls_token_id, self.tokenizer.sep_token_id)
        self._opening_and_closing = torch.tensor([index for index in ids if index is not None], dtype=torch.long)
        self._known: collections.OrderedDict[str, _Text] = collections.OrderedDict()

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def recall(self, candidates: Sequence[str], references: Sequence[str]) -> Tensor:
        """(B,) fp32 of B texts and B references: how much of each reference its candidate says, at most 1."""
        pairs = list(zip(candidates, references, strict=True))
        # References are a run's prompts, which come back; what is said of an image does not.
        said = self._encoded(candidates)
        asked = {text: self._known[text] for text in references if text in self._known}
        asked |= self._encoded([text for text in references if text not in asked])
        for text in asked:
            self._known[text] = asked[text]
            self._known.move_to_end(text)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        with torch.autocast("cpu", enabled=False):
            scores = [_recall(said[candidate], asked[reference]) for candidate, reference in pairs]
        return torch.stack(scores).to(self.device)

    @torch.no_grad()
    def _encoded(self, texts: Sequence[str]) -> dict[str, _Text]:
        distinct = list(dict.fromkeys(texts))
        found = {}
        for start in range(0, len(distinct), _AT_ONCE):
            chunk = distinct[start : start + _AT_ONCE]
            inputs = self.tokenizer(
                [self._space + text.strip() if text.strip() else "" for text in chunk],
                padding=True,
                truncation=True,
                max_length=self._longest,
                return_tensors="pt",
            )
            # Half precision would move the score, in which prompts differ by hundredths.
            with torch.autocast(self.device.type, enabled=False):
                outputs = self.encoder(
                    input_ids=inputs["input_ids"].to(self.device),
                    attention_mask=inputs["attention_mask"].to(self.device),
                    output_hidden_states=True,
                )
            states = nn.functional.normalize(outputs.hidden_states[self.layer], dim=-1).cpu()  # (b, T, width)
            present = inputs["attention_mask"].bool()
            counts = present & ~torch.isin(inputs["input_ids"], self._opening_and_closing)
            for row, text in enumerate(chunk):
                found[text] = _Text(states[row][present[row]], counts[row][present[row]])
        return found


def _layer(model: str, layer: int | None, reward: str) -> int:
    name = model.rstrip("/").rpartition("/")[2]
    if layer is None and name not in LAYERS:
        raise RewardSpecError(
            f"reward {reward!r}: the layer of {model} whose states are compared is not known; set similarity_layer "
            f"(known: {', '.join(f'{known} {its}' for known, its in LAYERS.items())}, for a folder of that name too)"
        )
    return LAYERS[name] if layer is None else layer


def _encoder(model: str, reward: str, option: str) -> nn.Module:
    config = checkpoints.load(AutoConfig, reward, option, model)
    kind = MODEL_MAPPING.get(type(config), None)
    # Published encoders often come without a pooler's weights, which nothing here asks for.
    pooled = kind is not None and "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    options: dict[str, Any] = {"add_pooling_layer": False} if pooled else {}
    return checkpoints.load(AutoModel, reward, option, model, **options)


def _recall(candidate: _Text, reference: _Text) -> Tensor:
    if not candidate.counts.any() or not reference.counts.any():
        return torch.zeros(())
    return (reference.states[reference.counts] @ candidate.states.T).amax(dim=1).mean()
