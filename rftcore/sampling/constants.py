"""What a UNet makes of text and timesteps, once for all steps of a chain: whether it can be made, and making it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, func, nn

from rftcore.blocks import once
from rftcore.sampling.denoiser import Denoiser


def has_constants(denoiser: Denoiser) -> bool:
    """Whether the UNet can be given what does not depend on the state."""
    return _cross_attention(denoiser).keys() <= {"scale"} and not once.reasons(denoiser.model)


def make_constants(
    denoiser: Denoiser, timesteps: Tensor, conditioning: Mapping[str, Tensor], stand_ins: Mapping[str, Tensor]
) -> once.Values:
    """What the UNet makes of all of a chain's timesteps (T,) and of its conditioning, in the caller's grad mode.

    Args:
        conditioning: (N, ...) `Conditioning.joined`.
        stand_ins: for parameters of `denoiser.module`, by name.
    """
    rest = dict(conditioning)
    text = rest.pop("prompt_embeds", None)
    dtype = denoiser.dtype
    arguments = (timesteps, None if text is None else text.to(dtype), rest or None, _cross_attention(denoiser), dtype)
    return func.functional_call(_Once(denoiser.module), {f"module.{n}": t for n, t in stand_ins.items()}, arguments)


def _cross_attention(denoiser: Denoiser) -> Mapping[str, Any]:
    return denoiser.extra.get("cross_attention_kwargs", {})


class _Once(nn.Module):
    """`once.compute` as a module's forward, for stand-ins to be swapped into that module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any) -> once.Values:
        return once.compute(self.module, *arguments)
