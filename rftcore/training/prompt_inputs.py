"""Prompts as a UNet takes them: each encoded once, before training; then the text encoders are let go."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from rftcore.errors import UsageError

_ENCODED_AT_ONCE = 32
# Prompts that the warning of lost text shows.
_SHOWN = 3


@dataclass(frozen=True)
class PromptInputs:
    """What `CheckpointedSampler` is called with for any of a run's prompts. Kept on the CPU, given on `device`.

    Attributes:
        positive: prompt -> {"prompt_embeds": (tokens, width)}, and with SDXL {"text_embeds": (width,)} too. Empty for
            an unconditional model.
        negative: the same of the negative prompt.
        pooled: prompt -> (width,), one vector for the whole text.
        time_ids: SDXL's (6,): original size, crop, target size, in pixels; else None.
        device: of what is given.
    """

    positive: dict[str, dict[str, Tensor]]
    negative: dict[str, Tensor]
    pooled: dict[str, Tensor]
    time_ids: Tensor | None
    device: torch.device

    def batch(self, prompts: Sequence[str]) -> dict[str, Any]:
        """The sampler's keyword arguments for B prompts, and for as many negative ones.

        Shapes: prompt_embeds, negative_prompt_embeds (B, tokens, width); SDXL's added_cond_kwargs and
        negative_added_cond_kwargs hold text_embeds (B, width) and time_ids (B, 6). Nothing for an unconditional model.
        """
        if not self.positive:
            return {}
        positive = {
            name: torch.stack([self.positive[prompt][name] for prompt in prompts]).to(self.device)
            for name in self.negative
        }
        negative = {name: row.to(self.device).expand_as(positive[name]) for name, row in self.negative.items()}
        arguments: dict[str, Any] = {
            "prompt_embeds": positive.pop("prompt_embeds"),
            "negative_prompt_embeds": negative.pop("prompt_embeds"),
        }
        if self.time_ids is not None:
            time_ids = self.time_ids.to(self.device).expand(len(prompts), -1)
            arguments["added_cond_kwargs"] = {**positive, "time_ids": time_ids}
            arguments["negative_added_cond_kwargs"] = {**negative, "time_ids": time_ids}
        return arguments

    def features(self, prompts: Sequence[str]) -> Tensor:
        """(B, width) fp32, for a value function: the text encoder's pooled output; zeros (B, 1) without a prompt."""
        if not self.pooled:
            return torch.zeros(len(prompts), 1, device=self.device)
        return torch.stack([self.pooled[prompt] for prompt in prompts]).to(self.device, torch.float32)


@torch.no_grad()
def encode_prompts(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    negative_prompt: str,
    device: torch.device,
    sample_size: int | tuple[int, int] | None = None,
    clip_skip: int | None = None,
) -> PromptInputs:
    """Encodes each distinct prompt once, then drops the pipeline's text encoders: training needs their memory.

    An empty negative prompt is what the pipeline's own call makes of none: SDXL's zeros, where its config says so, or
    else the empty text. Text beyond what the encoder reads is cut off, with one warning that shows it.

    Args:
        sample_size: of the latents, which SDXL is told in pixels.
        clip_skip: layers left out at the text encoders' ends, as the pipeline's own call takes it.

    Raises:
        UsageError: where clip_skip leaves no layer, or is negative.
        ValueError: for SDXL without `sample_size`.
    """
    if not hasattr(pipe, "encode_prompt"):
        return PromptInputs({}, {}, {}, None, device)
    is_xl = isinstance(pipe, StableDiffusionXLPipeline)
    if is_xl and sample_size is None:
        raise ValueError("sample_size=None with SDXL, which is told its images' size; give pipeline.sample_size(...)")
    _check_clip_skip(pipe, clip_skip)
    encode = _encode_xl if is_xl else _encode
    positive, pooled = {}, {}
    distinct = [*dict.fromkeys([negative_prompt, *prompts])]
    _warn_of_lost_text(pipe, distinct)
    encoders = [name for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)]
    for name in encoders:
        getattr(pipe, name).to(device).eval()
    for start in range(0, len(distinct), _ENCODED_AT_ONCE):
        chunk = distinct[start : start + _ENCODED_AT_ONCE]
        tensors, vectors = encode(pipe, chunk, device, clip_skip)
        for row, prompt in enumerate(chunk):
            # Copies: a row would keep its whole chunk.
            positive[prompt] = {name: tensor[row].cpu().clone() for name, tensor in tensors.items()}
            pooled[prompt] = vectors[row].cpu().clone()
    for name in encoders:
        setattr(pipe, name, None)
    negative = positive[negative_prompt]
    if not negative_prompt and pipe.config.get("force_zeros_for_empty_prompt", False):
        negative = {name: torch.zeros_like(tensor) for name, tensor in negative.items()}
    time_ids = None
    if is_xl and sample_size is not None:
        sides = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
        height, width = (side * pipe.vae_scale_factor for side in sides)
        time_ids = torch.tensor([height, width, 0, 0, height, width], dtype=negative["prompt_embeds"].dtype)
    return PromptInputs(positive, negative, pooled, time_ids, device)


def _encode(
    pipe: StableDiffusionPipeline, prompts: list[str], device: torch.device, clip_skip: int | None
) -> tuple[dict[str, Tensor], Tensor]:
    """The UNet's tensors, and the pooled vectors, which the pipeline does not give: seen as they are made."""
    outputs = []
    seen = pipe.text_encoder.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        with _text_model(pipe.text_encoder):
            embeddings, _ = pipe.encode_prompt(
                prompt=prompts,
                device=device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
                clip_skip=clip_skip,
            )
    finally:
        seen.remove()
    return {"prompt_embeds": embeddings}, outputs[0].pooler_output


@contextmanager
def _text_model(text_encoder: nn.Module) -> Iterator[None]:
    """diffusers takes the last norm, for clip_skip, from inside a wrapper that transformers 5.6 has no more."""
    if hasattr(text_encoder, "text_model"):
        yield
        return
    # Not as a submodule: the model would be inside itself.
    text_encoder.__dict__["text_model"] = text_encoder
    try:
        yield
    finally:
        del text_encoder.__dict__["text_model"]


def _encode_xl(
    pipe: StableDiffusionXLPipeline, prompts: list[str], device: torch.device, clip_skip: int | None
) -> tuple[dict[str, Tensor], Tensor]:
    embeddings, _, pooled, _ = pipe.encode_prompt(
        prompt=prompts,
        device=device,
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
        clip_skip=clip_skip,
    )
    return {"prompt_embeds": embeddings, "text_embeds": pooled}, pooled


def _check_clip_skip(pipe: StableDiffusionPipeline | StableDiffusionXLPipeline, clip_skip: int | None) -> None:
    if clip_skip is None:
        return
    if clip_skip < 0:
        raise UsageError(f"sampling.clip_skip={clip_skip} must be at least 0, the number of layers that are left out")
    # SDXL always takes the last layer but one.
    own = 1 if isinstance(pipe, StableDiffusionXLPipeline) else 0
    for name in ("text_encoder", "text_encoder_2"):
        layers = getattr(getattr(getattr(pipe, name, None), "config", None), "num_hidden_layers", None)
        if layers is not None and clip_skip >= layers - own:
            raise UsageError(
                f"sampling.clip_skip={clip_skip}, and {name} has {layers} layers"
                f"{', the last unused anyway' * own}; at most "
                f"{max(0, layers - own - 1)} can be left out (0: set it to null)"
            )


def _warn_of_lost_text(pipe: StableDiffusionPipeline | StableDiffusionXLPipeline, prompts: Sequence[str]) -> None:
    tokenizer, lost = pipe.tokenizer, []
    most = tokenizer.model_max_length
    for prompt in prompts:
        # One word of a textual inversion may stand for several tokens.
        text = pipe.maybe_convert_prompt(prompt, tokenizer)
        tokens = tokenizer(text, verbose=False).input_ids
        if len(tokens) > most:
            # The first and the last one mark the text's ends.
            lost.append(f"{prompt[:40]!r} ends before {tokenizer.decode(tokens[most - 1 : -1])!r}")
    if lost:
        more = f", and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        warnings.warn(
            f"{len(lost)} prompt(s) are longer than the {most - 2} tokens that the text encoder reads, and the rest is cut "
            f"off: {'; '.join(lost[:_SHOWN])}{more}",
            stacklevel=3,
        )
