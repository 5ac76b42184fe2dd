"""The layers at a model's ends: convolutions, and the norm and SiLU before the last one."""

from __future__ import annotations

from torch import Tensor, nn

from rftcore.blocks import modules
from rftcore.blocks.modules import Unserved
from rftcore.blocks.serving import Place, check_call


def forward_convolution(layer: nn.Module, place: Place, x: Tensor, *args, **kwargs):
    """In place of a convolution's forward, adapted or not."""
    b = place.builder("x")
    try:
        if args or kwargs:
            raise Unserved("it was called with further arguments")
        if x.dim() != 4:
            raise Unserved(f"its input is {tuple(x.shape)}")
        check_call(x)
        b.convolution("y", "x", layer, own=True)
    except Unserved as reason:
        refusal = str(reason)
    else:
        return place.run(b, [x])
    return place.stock(layer, refusal, x, *args, **kwargs)


def forward_norm(norm: nn.GroupNorm, place: Place, x: Tensor):
    """In place of the forward of the GroupNorm before a SiLU. Its output remembers where it came from.

    Without a graph, too: rounded between the norm and the SiLU, a sample would have other bits than its replay.
    """
    b = place.builder("x")
    try:
        _write(b, norm, x, silu=False)
    except Unserved as reason:
        refusal = str(reason)
    else:
        y = place.run(b, [x])
        y.rftcore_normalised = norm, x, _version(y)  # type: ignore[attr-defined]  # read where it arrives, by _origin
        return y
    return place.stock(norm, refusal, x)


def forward_silu(activation: nn.SiLU, place: Place, y: Tensor):
    """In place of the forward of the SiLU: of a served norm's output it is one step from that norm's input.

    The norm's output is then no longer needed, and goes.
    """
    b = place.builder("x")
    try:
        modules.check_own(activation, nn.SiLU)
        check_call(y)
        norm, x = _origin(activation, y)
        if norm is not None and x is not None:
            _write(b, norm, x, silu=True)
    except Unserved as reason:
        refusal = str(reason)
    else:
        place.served()
        return nn.SiLU.forward(activation, y) if x is None else place.run(b, [x])
    return place.stock(activation, refusal, y)


def _origin(activation: nn.SiLU, y: Tensor) -> tuple[nn.GroupNorm | None, Tensor | None]:
    """The norm that made y and its input, where nobody looks at y itself, or changed it."""
    norm, x, version = getattr(y, "rftcore_normalised", (None, None, None))
    watched = activation._forward_pre_hooks or activation._backward_pre_hooks or y._backward_hooks or y.retains_grad
    if norm is not None and version is None:
        watched = watched or norm._forward_hooks
    return (None, None) if norm is None or watched or _version(y) != version else (norm, x)


def _version(y: Tensor) -> int | None:
    """Changes with the tensor's values; under torch.inference_mode nothing is counted."""
    return None if y.is_inference() else y._version


def _write(b, norm: nn.GroupNorm, x: Tensor, silu: bool) -> None:
    check_call(x)
    modules.check_own(norm, nn.GroupNorm)
    b.group_norm("y", "x", norm, silu=silu, own=True)
