"""ResnetBlock2D: keeps its input and the first convolution's output."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from rftcore.blocks import kinds, modules
from rftcore.blocks.builder import Builder
from rftcore.blocks.modules import Unserved
from rftcore.blocks.served import place_of
from rftcore.blocks.serving import Place, check_call


def forward(block: ResnetBlock2D, place: Place, input_tensor: Tensor, temb: Tensor | None = None, *args, **kwargs):
    """In place of ResnetBlock2D.forward."""
    inputs = {"hidden_states": input_tensor} | ({} if temb is None else {"temb": temb})
    b = place.builder(*inputs)
    try:
        if args or kwargs:
            raise Unserved("it was called with further arguments")
        modules.check_own(block, ResnetBlock2D)
        check_call(input_tensor, temb)
        check_embedding(input_tensor, temb)
        write(b, block, ("hidden_states",), temb is not None)
    except Unserved as reason:
        refusal = str(reason)
    else:
        return place.run(b, list(inputs.values()))
    return place.stock(block, refusal, input_tensor, temb, *args, **kwargs)


def check_embedding(x: Tensor, temb: Tensor | None) -> None:
    """Raises: Unserved."""
    if temb is not None and temb.shape[:1] != x.shape[:1]:
        raise Unserved(f"temb is {tuple(temb.shape)}, for {x.shape[0]} images")


def write(b: Builder, block: ResnetBlock2D, parts: Sequence[str], embedded: bool) -> str:
    """Writes the block's steps, for these parts of its input; the name of its output. Raises: Unserved."""
    if block.upsample is not None or block.downsample is not None:
        raise Unserved("it changes the resolution")
    modules.expect(block.nonlinearity, nn.SiLU)
    modules.inactive_dropout(block.dropout)
    x = parts[0] if len(parts) == 1 else b.step(kinds.Concatenation(), parts, ["x"])
    # In the order of ResnetBlock2D.forward, in which adapters with dropout draw.
    n1 = b.group_norm("n1", x, block.norm1, silu=True)
    c1 = b.convolution("c1", n1, block.conv1)
    embedding, how = _embedding(b, block, x, embedded)
    n2 = b.group_norm("n2", c1, block.norm2, True, embedding, how)
    if block.conv_shortcut is None:
        y = b.convolution("y", n2, block.conv2, residual=x)
    else:
        c2 = b.convolution("c2", n2, block.conv2)
        y = b.convolution("y", x, block.conv_shortcut, residual=c2)
    return b.quotient("resnet", y, block.output_scale_factor)


def _embedding(b: Builder, block: ResnetBlock2D, x: str, embedded: bool) -> tuple[str | None, str | None]:
    """The projected time embedding of each image of x, and how it enters; None and None where it does not."""
    how = {"default": "add", "scale_shift": "scale_shift"}.get(block.time_embedding_norm)
    if (block.time_emb_proj is None and not embedded) or how is None:
        return None, None
    if block.time_emb_proj is None or not embedded:
        raise Unserved("a time embedding without a projection, or a projection without one")
    place = place_of(block)
    if place is not None and b.take({f"{place.name}.time_emb_proj": "embedding"}):
        return b.step(kinds.Rows(), ["embedding", x], ["embeddings"]), how
    return write_projection(b, block), how


def write_projection(b: Builder, block: ResnetBlock2D) -> str:
    """Writes what becomes of the time embedding, "temb" (rows, D). Raises: Unserved."""
    temb = "temb"
    if not block.skip_time_act:
        temb = b.step(kinds.SiLU(), [temb], ["activated_temb"])
    return b.linear(["embedding"], temb, [block.time_emb_proj])
