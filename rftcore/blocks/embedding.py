"""The time embedding and SDXL's added one: their own forwards, but where `once.given` has their values."""

from __future__ import annotations

from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor

from rftcore.blocks.serving import Place

# Of a model that has them.
EMBEDDINGS = ("time_embedding", "add_embedding")


def forward(block: TimestepEmbedding, place: Place, sample: Tensor, *args, **kwargs):
    """In place of TimestepEmbedding.forward."""
    value = (place.serving.given or {}).get(place.name)
    # A condition, as guidance-distilled models have, is no part of what is given.
    if value is None or any(other is not None for other in (*args, *kwargs.values())):
        return type(block).forward(block, sample, *args, **kwargs)
    rows = sample.shape[0]
    if value.shape[0] not in (1, rows):
        raise ValueError(
            f"{place.name}: {value.shape[0]} rows are given for {rows}; give {rows}, or 1 for all of them."
        )
    return value.expand(rows, -1)
