"""What a vision-language model of the transformers library says of images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from rftcore.rewards import checkpoints
from rftcore.rewards.reward import RewardSpecError
from rftcore.rewards.towers import freeze


class Describer(nn.Module):
    """An image-text-to-text model that answers a question about images, greedily.

    The question is put by the processor's chat template; a processor without one is given the question as it is, with
    its image token before it unless the question holds it, so that the model's own format can be written there
    ("USER: <image>\\n... ASSISTANT:").

    Args:
        model: hub name or folder.
        dtype: of the weights: fp32, fp16 or bf16.
        reward: for whom it works, in errors.

    Raises:
        RewardSpecError: for a model that cannot be loaded.
    """

    def __init__(self, model: str, dtype: str = "bf16", *, reward: str = "vlm_alignment") -> None:
        super().__init__()
        precision = checkpoints.named_dtype(reward, dtype)
        try:
            self.processor = checkpoints.load(AutoProcessor, reward, "model", model)
        except ImportError as error:
            # Some processors need torchvision, others packages of their own; transformers says which.
            reason = " ".join(str(error).split())
            raise RewardSpecError(f"reward {reward!r} cannot load model={model!r}: {reason}") from error
        if (
            getattr(self.processor, "tokenizer", None) is None
            or getattr(self.processor, "image_processor", None) is None
        ):
            raise checkpoints.refuse(reward, "model", model, "its processor does not take both images and text")
        self.model = freeze(checkpoints.load(AutoModelForImageTextToText, reward, "model", model, dtype=precision))
        # Answers are read from the end, so that a batch is padded before its questions.
        self.processor.tokenizer.padding_side = "left"
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        if self.model.generation_config.pad_token_id is None:
            self.model.generation_config.pad_token_id = self.processor.tokenizer.pad_token_id
        # What some models ask of sampling is warned of where nothing is sampled.
        for setting in ("temperature", "top_p", "top_k"):
            setattr(self.model.generation_config, setting, None)

    def describe(
        self, images: Sequence[Image.Image], question: str, max_new_tokens: int, at_once: int = 4
    ) -> list[str]:
        """Its answer for each image, without the question, stripped; `at_once` images go through it together."""
        chunks = [images[start : start + at_once] for start in range(0, len(images), at_once)]
        return [answer for chunk in chunks for answer in self._answers(chunk, question, max_new_tokens)]

    @torch.no_grad()
    def _answers(self, images: Sequence[Image.Image], question: str, max_new_tokens: int) -> list[str]:
        inputs = {
            name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in self._inputs(images, question).items()
        }
        with torch.autocast(self.model.device.type, enabled=False):
            tokens = self.model.generate(
                **inputs,
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_new_tokens,
            )
        tokens = tokens[:, _echoed(tokens, inputs["input_ids"]) :]
        return [answer.strip() for answer in self.processor.batch_decode(tokens, skip_special_tokens=True)]

    def _inputs(self, images: Sequence[Image.Image], question: str) -> Any:
        settings = {"padding": True, "return_tensors": "pt"}
        if self.processor.chat_template is None:
            token = getattr(self.processor, "image_token", None)
            text = question if token is None or token in question else f"{token}\n{question}"
            return self.processor(images=list(images), text=[text] * len(images), **settings)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        # A template that writes the opening token itself must not be given a second one.
        opening = self.processor.tokenizer.bos_token
        settings["add_special_tokens"] = not (opening and text.startswith(opening))
        return self.processor(images=[[image] for image in images], text=[text] * len(images), **settings)


def _echoed(tokens: Tensor, asked: Tensor) -> int:
    """How many tokens of an output are its input: decoders give it back and go on, others begin with the answer.

    BLIP gives back all but the last token, which closes the question.
    """
    for length in (asked.shape[1], asked.shape[1] - 1):
        if length and tokens.shape[1] >= length and torch.equal(tokens[:, :length], asked[:, :length]):
            return length
    return 0
