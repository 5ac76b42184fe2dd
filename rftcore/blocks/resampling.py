"""Downsample2D and Upsample2D: their frozen convolution keeps nothing."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.models.downsampling import Downsample2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor

from rftcore.blocks import kinds, modules
from rftcore.blocks.builder import Builder
from rftcore.blocks.modules import Unserved
from rftcore.blocks.serving import Place, check_call


def forward_down(block: Downsample2D, place: Place, hidden_states: Tensor, *args, **kwargs):
    """In place of Downsample2D.forward."""
    b = place.builder("hidden_states")
    try:
        _check(block, Downsample2D, hidden_states, args, kwargs)
        write_down(b, block)
    except Unserved as reason:
        refusal = str(reason)
    else:
        return place.run(b, [hidden_states])
    return place.stock(block, refusal, hidden_states, *args, **kwargs)


def forward_up(
    block: Upsample2D,
    place: Place,
    hidden_states: Tensor,
    output_size: Sequence[int] | None = None,
    *args,
    **kwargs,
):
    """In place of Upsample2D.forward."""
    b = place.builder("hidden_states")
    try:
        _check(block, Upsample2D, hidden_states, args, kwargs)
        write_up(b, block, None if output_size is None else (output_size[0], output_size[1]))
    except Unserved as reason:
        refusal = str(reason)
    else:
        return place.run(b, [hidden_states])
    return place.stock(block, refusal, hidden_states, output_size, *args, **kwargs)


def write_down(b: Builder, block: Downsample2D) -> None:
    """Writes the block's steps. Raises: Unserved."""
    _check_build(block)
    x = "hidden_states"
    if block.padding == 0:
        x = b.step(kinds.Padding(), [x], ["padded"])
    b.convolution("y", x, block.conv)


def write_up(b: Builder, block: Upsample2D, size: tuple[int, int] | None) -> None:
    """Writes the block's steps; size as `kinds.Upsampling` has it. Raises: Unserved."""
    _check_build(block)
    if block.use_conv_transpose or not block.interpolate:
        raise Unserved("it does not interpolate")
    x = b.step(kinds.Upsampling(size), ["hidden_states"], ["upsampled"])
    b.convolution("y", x, block.conv if block.name == "conv" else block.Conv2d_0)


def _check_build(block: Downsample2D | Upsample2D) -> None:
    if block.norm is not None:
        raise Unserved("it has a norm")
    if not block.use_conv:
        raise Unserved("it has no convolution")


def _check(block, kind, hidden_states, args, kwargs):
    if args or kwargs:
        raise Unserved("it was called with further arguments")
    modules.check_own(block, kind)
    check_call(hidden_states)
