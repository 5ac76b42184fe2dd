"""Transformer2DModel and BasicTransformerBlock: keep hidden states, attention outputs, and by level q, k, v and u."""

from __future__ import annotations

from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, is_grad_enabled, nn

from rftcore.blocks import attention, kinds, modules
from rftcore.blocks.builder import Builder
from rftcore.blocks.modules import Unserved
from rftcore.blocks.served import place_of, served
from rftcore.blocks.serving import Place, check_call


def forward_model(
    block: Transformer2DModel,
    place: Place,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    timestep=None,
    added_cond_kwargs=None,
    class_labels=None,
    cross_attention_kwargs=None,
    attention_mask: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    return_dict: bool = True,
):
    """In place of Transformer2DModel.forward."""
    try:
        check_arguments(attention_mask, encoder_attention_mask, cross_attention_kwargs)
        inputs = checked_inputs(block, Transformer2DModel, "hidden_states", hidden_states, encoder_hidden_states)
        b = place.builder(*inputs)
        write(b, block, "hidden_states", encoder_hidden_states is not None)
    except Unserved as reason:
        refusal = str(reason)
    else:
        output = place.run(b, list(inputs.values()))
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)
    return place.stock(
        block, refusal, hidden_states, encoder_hidden_states, timestep, added_cond_kwargs, class_labels,
        cross_attention_kwargs, attention_mask, encoder_attention_mask, return_dict,
    )  # fmt: skip


def forward_block(
    block: BasicTransformerBlock,
    place: Place,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep=None,
    cross_attention_kwargs=None,
    class_labels=None,
    added_cond_kwargs=None,
):
    """In place of BasicTransformerBlock.forward."""
    try:
        check_arguments(attention_mask, encoder_attention_mask, cross_attention_kwargs)
        if hidden_states.dim() != 3:
            raise Unserved(f"hidden_states is {tuple(hidden_states.shape)}, not (B, N, C)")
        inputs = checked_inputs(block, BasicTransformerBlock, "0.h", hidden_states, encoder_hidden_states)
        b = place.builder(*inputs)
        write_block(b, block, 0, encoder_hidden_states is not None)
    except Unserved as reason:
        refusal = str(reason)
    else:
        return place.run(b, list(inputs.values()))
    return place.stock(
        block, refusal, hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
        cross_attention_kwargs, class_labels, added_cond_kwargs,
    )  # fmt: skip


def write(b: Builder, block: Transformer2DModel, x: str, conditioned: bool) -> str:
    """Writes the block's steps, from the image x; the name of its output. Raises: Unserved.

    Args:
        conditioned: whether the program has an input "encoder_hidden_states".
    """
    if not block.is_input_continuous:
        raise Unserved("its input is not an image")
    if block.gradient_checkpointing and is_grad_enabled():
        raise Unserved("gradient checkpointing is on")
    n = b.group_norm("normalised", x, block.norm, silu=False)
    if block.use_linear_projection:
        h = b.linear(["0.h"], b.step(kinds.ToTokens(), [n], ["n"]), [block.proj_in])
    else:
        h = b.step(kinds.ToTokens(), [b.convolution("projected", n, block.proj_in)], ["0.h"])
    for i, inner in enumerate(block.transformer_blocks):
        if i > 0:
            b.boundary(h)
        modules.expect(inner, BasicTransformerBlock, own=True)
        h = write_block(b, inner, i, conditioned)
    if block.use_linear_projection:
        p = b.linear(["p"], h, [block.proj_out])
        return b.step(kinds.ToImage(contiguous=True, residual=True), [p, x], ["transformer"])
    return b.convolution(
        "transformer", b.step(kinds.ToImage(contiguous=True, residual=False), [h, x], ["p"]), block.proj_out, x
    )


def write_block(b: Builder, block: BasicTransformerBlock, i: int, conditioned: bool) -> str:
    """Writes the i-th block's steps, from the value "i.h" (B, N, C) to "i+1.h", which it returns. Raises: Unserved."""
    if block.norm_type != "layer_norm" or block.pos_embed is not None:
        raise Unserved(f"norm_type={block.norm_type!r} or a positional embedding")
    if block.only_cross_attention or block._chunk_size is not None:
        raise Unserved("only_cross_attention or a chunked feed-forward")
    if block.attn2 is not None and not conditioned:
        raise Unserved("a cross-attention without encoder_hidden_states")

    def name(value: str) -> str:
        return f"{i}.{value}"

    h, after = name("h"), f"{i + 1}.h"
    n = b.layer_norm(name("n1"), h, block.norm1)
    h = attention.write(b, block.attn1, n, n, h, tuple(map(name, ("q", "k", "v", "o", "h1"))))
    if block.attn2 is not None:
        n = b.layer_norm(name("n2"), h, block.norm2)
        names = tuple(map(name, ("q2", "k2", "v2", "o2", "h2")))
        place = f"{place_of(block).name}.attn2" if served(block) else None
        h = attention.write(b, block.attn2, n, "encoder_hidden_states", h, names, place)
    up, down = _feed_forward(block.ff)
    n = b.layer_norm(name("n3"), h, block.norm3)
    u = b.linear([name("u")], n, [up])
    return b.linear([after], b.geglu(name("g"), u), [down], h)


def _feed_forward(ff: FeedForward) -> tuple[nn.Module, nn.Module]:
    """The two projections of a gated feed-forward."""
    modules.expect(ff, FeedForward)
    gated, dropout, down, *more = ff.net
    modules.expect(gated, GEGLU)
    for module in (dropout, *more):
        modules.inactive_dropout(module)
    return gated.proj, down


def check_arguments(attention_mask, encoder_attention_mask, cross_attention_kwargs) -> None:
    """Raises: Unserved for what no program can stand for."""
    if attention_mask is not None or encoder_attention_mask is not None:
        raise Unserved("it was called with an attention mask")
    if cross_attention_kwargs:
        raise Unserved(f"it was called with cross_attention_kwargs {sorted(cross_attention_kwargs)}")


def checked_inputs(
    block: nn.Module, kind: type, name: str, hidden_states: Tensor, encoder_hidden_states: Tensor | None
) -> dict[str, Tensor]:
    """The inputs by the names that they have in the program. Raises: Unserved."""
    modules.check_own(block, kind)
    check_call(hidden_states, encoder_hidden_states)
    if encoder_hidden_states is None:
        return {name: hidden_states}
    if encoder_hidden_states.dim() != 3 or encoder_hidden_states.shape[0] != hidden_states.shape[0]:
        raise Unserved(
            f"encoder_hidden_states is {tuple(encoder_hidden_states.shape)}, hidden_states {tuple(hidden_states.shape)}"
        )
    return {name: hidden_states, "encoder_hidden_states": encoder_hidden_states}
