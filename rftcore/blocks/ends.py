"""The layers at a model's ends: convolutions, and the norm and SiLU before the last one."""

from __future__ import annotations

from torch import Tensor, nn

from rftcore.blocks.modules import Unserved
from rftcore.blocks.serving import Place, check_call, opaque


@opaque
def forward_convolution(layer: nn.Module, place: Place, x: Tensor, *args, **kwargs):
    """In place of a convolution's forward, adapted or not."""
    try:
        if args or kwargs:
            raise Unserved("it was called with further arguments")
        check_call(x)
        b = place.builder("x")
        b.convolution("y", "x", layer, own=True)
        return place.run(b, [x])
    except Unserved as reason:
        return place.stock(layer, reason, x, *args, **kwargs)


@opaque
def forward_norm(norm: nn.GroupNorm, place: Place, x: Tensor):
    """In place of the forward of the GroupNorm before a SiLU. The output remembers where it came from."""
    try:
        check_call(x)
        b = place.builder("x")
        b.group_norm("y", "x", norm, silu=False, own=True)
        y = place.run(b, [x])
    except Unserved as reason:
        return place.stock(norm, reason, x)
    y.rftcore_normalised = norm, x
    return y


@opaque
def forward_silu(activation: nn.SiLU, place: Place, y: Tensor):
    """In place of the forward of the SiLU: of a served norm's output it is one step from that norm's input.

    The norm's output is then no longer needed, and goes.
    """
    try:
        if not hasattr(y, "rftcore_normalised"):
            raise Unserved("its input is not the output of a served norm")
        norm, x = y.rftcore_normalised
        check_call(x)
        b = place.builder("x")
        b.group_norm("y", "x", norm, silu=True, own=True)
        return place.run(b, [x])
    except Unserved as reason:
        return place.stock(activation, reason, y)
