"""diffusers' Attention inside a block; and as a block of its own, over an image's pixels."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor

from rftcore.blocks import kinds, modules
from rftcore.blocks.builder import Builder
from rftcore.blocks.modules import Unserved
from rftcore.blocks.serving import Place, check_call

# The processors that we stand for, as they were.
_PROCESSORS = {kind: kind.__call__ for kind in (AttnProcessor2_0, AttnProcessor)}


def forward(block: Attention, place: Place, hidden_states: Tensor, *args, **kwargs):
    """In place of Attention.forward, where it has a GroupNorm: in unconditional UNets and autoencoders."""
    b = place.builder("hidden_states")
    try:
        if args or any(value is not None for name, value in kwargs.items() if name != "temb"):
            raise Unserved("it was called with further arguments")
        if hidden_states.dim() != 4:
            raise Unserved(f"its input is {tuple(hidden_states.shape)}, not an image")
        modules.check_own(block, Attention)
        check_call(hidden_states)
        write_image(b, block)
    except Unserved as reason:
        refusal = str(reason)
    else:
        return place.run(b, [hidden_states])
    return place.stock(block, refusal, hidden_states, *args, **kwargs)


def write_image(b: Builder, block: Attention) -> None:
    """Writes the steps of a block of its own. Raises: Unserved."""
    _check(block)
    n = b.group_norm("normalised", "hidden_states", block.group_norm, silu=False)
    n = b.step(kinds.ToTokens(), [n], ["n"])
    b.linear(["q", "k", "v"], n, [block.to_q, block.to_k, block.to_v])
    o = b.attention("o", "q", "k", "v", block.heads, scale(block))
    y = b.linear(["p"], o, [block.to_out[0]])
    y = b.step(kinds.ToImage(contiguous=False, residual=block.residual_connection), [y, "hidden_states"], ["image"])
    b.quotient("y", y, block.rescale_output_factor)


def write(
    b: Builder,
    attn: Attention,
    n: str,
    context: str,
    h: str,
    names: Sequence[str],
    place: str | None = None,
) -> str:
    """Attention of n (B, N, C) to `context` (B, M, D), n itself for self-attention, added to h. Raises: Unserved.

    Args:
        names: of q, k, v, the attention's output, and the sum.
        place: the attention's name in the model, by which k and v may be given; None: they are not.
    """
    modules.expect(attn, Attention)
    _check(attn)
    if attn.group_norm is not None or attn.residual_connection or attn.rescale_output_factor != 1:
        raise Unserved("an attention with a norm, a residual or a factor of its own")
    q, k, v, o, y = names
    if context == n:
        b.linear([q, k, v], n, [attn.to_q, attn.to_k, attn.to_v])
    else:
        b.linear([q], n, [attn.to_q])
        if place is None or not b.take({f"{place}.to_k": k, f"{place}.to_v": v}):
            b.linear([k, v], context, [attn.to_k, attn.to_v])
    b.attention(o, q, k, v, attn.heads, scale(attn))
    return b.linear([y], o, [attn.to_out[0]], h)


def scale(attn: Attention) -> float:
    """What the logits are multiplied by: AttnProcessor2_0 does not look at the module's own scale."""
    if type(attn.processor) is AttnProcessor:
        return attn.scale
    return (attn.inner_kv_dim // attn.heads) ** -0.5


def _check(attn: Attention) -> None:
    kind = type(attn.processor)
    if kind not in _PROCESSORS:
        raise Unserved(f"its processor is a {kind.__name__}")
    if kind.__call__ is not _PROCESSORS[kind]:
        raise Unserved(f"{kind.__name__}.__call__ was replaced")
    unusual = ("spatial_norm", "norm_q", "norm_k", "norm_cross", "added_kv_proj_dim", "only_cross_attention")
    for name in unusual:
        if getattr(attn, name, None):
            raise Unserved(f"an attention has {name}")
    if attn.fused_projections or attn.inner_dim != attn.inner_kv_dim or attn.to_out is None or len(attn.to_out) != 2:
        raise Unserved("an attention of another build")
    modules.inactive_dropout(attn.to_out[1])
