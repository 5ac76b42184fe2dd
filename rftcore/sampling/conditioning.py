"""What a UNet is told besides the noisy sample: both branches of classifier-free guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from rftcore.sampling.records import stored

# The UNet's argument for an embedding of the guidance scale.
GUIDANCE = "timestep_cond"


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """The UNet's keyword arguments, flat: `prompt_embeds`, the tensors of `added_cond_kwargs`, and `timestep_cond`.

    Attributes:
        positive: name -> tensor (B, ...), empty for an unconditional UNet.
        negative: the same names for the other branch of guidance, None without guidance.
    """

    positive: dict[str, Tensor]
    negative: dict[str, Tensor] | None = None

    @classmethod
    def build(
        cls,
        prompt_embeds: Tensor | None,
        negative_prompt_embeds: Tensor | None,
        added_cond_kwargs: Mapping[str, Tensor] | None,
        negative_added_cond_kwargs: Mapping[str, Tensor] | None,
        *,
        guided: bool,
    ) -> Conditioning:
        """Checks and gathers what a caller gave.

        Args:
            prompt_embeds, negative_prompt_embeds: (B, tokens, width), of one shape.
            added_cond_kwargs: SDXL's {"text_embeds": (B, width), "time_ids": (B, 6)}.
            negative_added_cond_kwargs: the negative branch's; `time_ids` may be left out and are then shared.
            guided: whether two branches are run; without, what belongs to the negative branch is not used.

        Raises:
            ValueError: for a missing negative branch, or shapes that do not fit.
        """
        positive = _flat(prompt_embeds, added_cond_kwargs, "")
        sizes = {name: tensor.shape[0] for name, tensor in positive.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the batch sizes of the conditioning differ: {sizes}; give one row for each sample.")
        if not guided or not positive:
            return cls(positive)
        if negative_prompt_embeds is None:
            raise ValueError(
                "negative_prompt_embeds=None with guidance_scale != 1: guidance needs the embeddings of the negative "
                "(or empty) prompt, of prompt_embeds' shape; or set guidance_scale=1.0."
            )
        negative = _flat(negative_prompt_embeds, negative_added_cond_kwargs, "negative_")
        if "time_ids" in positive:
            negative.setdefault("time_ids", positive["time_ids"])
        if missing := sorted(positive.keys() - negative.keys()):
            raise ValueError(
                f"negative_added_cond_kwargs lacks {missing}, which added_cond_kwargs has; guidance needs them for "
                "the negative prompt too."
            )
        if unknown := sorted(negative.keys() - positive.keys()):
            raise ValueError(f"negative_added_cond_kwargs has {unknown}, which added_cond_kwargs lacks; give both.")
        for name, tensor in positive.items():
            if tensor.shape != negative[name].shape:
                raise ValueError(
                    f"negative_{name} has shape {tuple(negative[name].shape)} and {name} {tuple(tensor.shape)}; both "
                    "branches of guidance need one shape (pad the prompts to one length, repeat to one batch size)."
                )
        return cls(positive, negative)

    @property
    def batch_size(self) -> int | None:
        """B, None for an unconditional UNet."""
        return next((tensor.shape[0] for tensor in self.positive.values()), None)

    def told(self, embedding: Tensor) -> Conditioning:
        """The same without a negative branch, and with the embedding (1, D) of the guidance scale for each sample."""
        return Conditioning({**self.positive, GUIDANCE: embedding.repeat(cast(int, self.batch_size), 1)})

    def tensors(self) -> list[Tensor]:
        """All tensors, in a fixed order."""
        return [*self.positive.values(), *(self.negative or {}).values()]

    def replaced(self, tensors: list[Tensor]) -> Conditioning:
        """The same conditioning with other tensors, in the order of `tensors()`."""
        values = iter(tensors)
        positive = {name: next(values) for name in self.positive}
        negative = None if self.negative is None else {name: next(values) for name in self.negative}
        return Conditioning(positive, negative)

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        return self.replaced([function(tensor) for tensor in self.tensors()])

    def joined(self) -> dict[str, Tensor]:
        """One batch for one UNet call: (2B, ...) [negative; positive] under guidance, else (B, ...)."""
        if self.negative is None:
            return self.positive
        return {name: torch.cat([self.negative[name], tensor]) for name, tensor in self.positive.items()}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, under the attributes' names."""
        copy = self.map(stored)
        return {"positive": copy.positive, "negative": copy.negative}

    @staticmethod
    def cat(parts: list[Conditioning]) -> Conditioning:
        """Concatenates along the batch.

        Raises:
            ValueError: when the parts do not hold the same tensors.
        """
        first = parts[0]
        for part in parts[1:]:
            same_branches = (part.negative is None) == (first.negative is None)
            if part.positive.keys() != first.positive.keys() or not same_branches:
                raise ValueError("samples of different conditioning (guided or not, SDXL or not) do not join.")
        return first.replaced([torch.cat(tensors) for tensors in zip(*(part.tensors() for part in parts), strict=True)])


def _flat(prompt_embeds: Tensor | None, added: Mapping[str, Tensor] | None, prefix: str) -> dict[str, Tensor]:
    tensors = {} if prompt_embeds is None else {"prompt_embeds": prompt_embeds}
    tensors |= added or {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.ndim == 0:
            raise ValueError(f"{prefix}{name} must be a tensor (B, ...), got {type(tensor).__name__}.")
    return tensors
