"""The head that the aesthetic predictor and ImageReward share: linear layers with nothing between them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# The linear layers of its sequence; between them is dropout alone.
_LAYERS = (0, 2, 4, 6, 7)


def folded(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The affine map that the predictor's layers are together: w (D,) and b () of w x + b, in fp64.

    Raises: KeyError for a layer that is missing, ValueError for one too many or more outputs than one, RuntimeError for
        layers that do not follow each other.
    """
    names = [f"layers.{layer}.{kind}" for layer in _LAYERS for kind in ("weight", "bias")]
    if missing := [name for name in names if name not in tensors]:
        raise KeyError(f"{missing[0]} is missing")
    if others := sorted(set(tensors) - set(names)):
        raise ValueError(f"it has {others[0]}, too")
    slope, offset = torch.eye(tensors[names[0]].shape[1], dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for layer in _LAYERS:
        weight, bias = (tensors[f"layers.{layer}.{kind}"].double() for kind in ("weight", "bias"))
        slope, offset = weight @ slope, (weight @ offset if offset.ndim else 0) + bias
    if slope.shape[0] != 1:
        raise ValueError(f"it gives {slope.shape[0]} numbers, not one")
    return slope[0], offset[0]
