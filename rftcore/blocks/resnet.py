"""ResnetBlock2D: keeps its input and the first convolution's output."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from rftcore.blocks import kinds, modules
from rftcore.blocks.builder import Builder
from rftcore.blocks.modules import Unserved
from rftcore.blocks.serving import Place, check_call

# Names of the inputs where the ResNet's input is cut together.
TWO_PARTS = ("hidden_states", "res_hidden_states")


def forward(block: ResnetBlock2D, place: Place, input_tensor: Tensor, temb: Tensor | None = None, *args, **kwargs):
    """In place of ResnetBlock2D.forward."""
    try:
        if args or kwargs:
            raise Unserved("it was called with further arguments")
        prepared = prepare(block, place, (input_tensor,), temb)
    except Unserved as reason:
        refusal = str(reason)
    else:
        return place.run(*prepared)
    return place.stock(block, refusal, input_tensor, temb, *args, **kwargs)


def prepare(
    block: ResnetBlock2D, place: Place, parts: Sequence[Tensor], temb: Tensor | None
) -> tuple[Builder, list[Tensor]]:
    """The block's program, and its inputs, for an input that is these parts (N, C_i, H, W) along the channels.

    Raises: Unserved.
    """
    inputs = checked_inputs(block, parts, temb)
    b = place.builder(*inputs)
    write(b, block, _names(parts), temb is not None)
    return b, list(inputs.values())


def checked_inputs(block: ResnetBlock2D, parts: Sequence[Tensor], temb: Tensor | None) -> dict[str, Tensor]:
    """Parts and embedding by the names that they have in the program. Raises: Unserved."""
    modules.check_own(block, ResnetBlock2D)
    check_call(*parts, temb)
    inputs = dict(zip(_names(parts), parts, strict=True))
    if temb is not None:
        if temb.shape[:1] != parts[0].shape[:1]:
            raise Unserved(f"temb is {tuple(temb.shape)}, for {parts[0].shape[0]} images")
        inputs["temb"] = temb
    return inputs


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
    embedding, how = _embedding(b, block, embedded)
    n2 = b.group_norm("n2", c1, block.norm2, True, embedding, how)
    if block.conv_shortcut is None:
        y = b.convolution("y", n2, block.conv2, residual=x)
    else:
        c2 = b.convolution("c2", n2, block.conv2)
        y = b.convolution("y", x, block.conv_shortcut, residual=c2)
    return b.quotient("resnet", y, block.output_scale_factor)


def _embedding(b: Builder, block: ResnetBlock2D, embedded: bool) -> tuple[str | None, str | None]:
    """The projected time embedding and how it enters; None and None where it does not."""
    how = {"default": "add", "scale_shift": "scale_shift"}.get(block.time_embedding_norm)
    if block.time_emb_proj is None and not embedded or how is None:
        return None, None
    if block.time_emb_proj is None or not embedded:
        raise Unserved("a time embedding without a projection, or a projection without one")
    temb = "temb"
    if not block.skip_time_act:
        temb = b.step(kinds.SiLU(), [temb], ["activated_temb"])
    return b.linear(["embedding"], temb, [block.time_emb_proj]), how


def _names(parts: Sequence[Tensor]) -> tuple[str, ...]:
    return ("hidden_states",) if len(parts) == 1 else TWO_PARTS
