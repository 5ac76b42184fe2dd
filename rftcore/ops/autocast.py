"""Autocast's dtypes, for ops that cast by themselves so that their backward can cast alike, wherever it is called."""

import contextlib

import torch
from torch import Tensor


def active(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast lowers to on `device`; None outside of autocast."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def disabled(device: torch.device) -> contextlib.AbstractContextManager:
    """No autocast on `device`: a backward computes in its forward's dtypes."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


def lowered(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype in which a convolution or matrix product takes `tensor` under autocast to `dtype`: fp64 stays."""
    return tensor.dtype if dtype is None or tensor.dtype == torch.float64 else dtype
