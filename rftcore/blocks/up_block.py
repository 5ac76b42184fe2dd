"""UpBlock2D and its relatives: a ResNet's input, cut together with a skip connection, is not kept beside its parts."""

from __future__ import annotations

from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D, CrossAttnUpBlock2D, UpBlock2D
from torch import Tensor, is_grad_enabled

from rftcore.blocks import modules, resnet
from rftcore.blocks.modules import Unserved
from rftcore.blocks.serving import Place, check_call, opaque


@opaque
def forward(block: UpBlock2D, place: Place, hidden_states, res_hidden_states_tuple, temb=None, upsample_size=None, *args, **kwargs):
    """In place of UpBlock2D.forward."""
    try:
        if args or kwargs:
            raise Unserved("it was called with further arguments")
        _check(block, hidden_states, res_hidden_states_tuple, temb)
    except Unserved as reason:
        return place.stock(
            block, reason, hidden_states, res_hidden_states_tuple, temb, upsample_size, *args, **kwargs
        )
    skips = reversed(res_hidden_states_tuple[-len(block.resnets) :])
    for inner, skip in zip(block.resnets, skips, strict=True):
        hidden_states = _joined(inner, hidden_states, skip, temb)
    for upsampler in block.upsamplers or ():
        hidden_states = upsampler(hidden_states, upsample_size)
    place.served()
    return hidden_states


@opaque
def forward_attention(block: AttnUpBlock2D, place: Place, hidden_states, res_hidden_states_tuple, temb=None, upsample_size=None, *args, **kwargs):
    """In place of AttnUpBlock2D.forward."""
    try:
        if args or kwargs:
            raise Unserved("it was called with further arguments")
        if block.upsample_type == "resnet":
            raise Unserved("it upsamples by a ResNet")
        _check(block, hidden_states, res_hidden_states_tuple, temb)
    except Unserved as reason:
        return place.stock(
            block, reason, hidden_states, res_hidden_states_tuple, temb, upsample_size, *args, **kwargs
        )
    skips = reversed(res_hidden_states_tuple[-len(block.resnets) :])
    for inner, attention, skip in zip(block.resnets, block.attentions, skips, strict=True):
        hidden_states = attention(_joined(inner, hidden_states, skip, temb))
    for upsampler in block.upsamplers or ():
        hidden_states = upsampler(hidden_states)
    place.served()
    return hidden_states


@opaque
def forward_cross_attention(
    block: CrossAttnUpBlock2D,
    place: Place,
    hidden_states: Tensor,
    res_hidden_states_tuple: tuple[Tensor, ...],
    temb: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    cross_attention_kwargs=None,
    upsample_size: int | None = None,
    attention_mask: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
):
    """In place of CrossAttnUpBlock2D.forward."""
    try:
        _check(block, hidden_states, res_hidden_states_tuple, temb)
    except Unserved as reason:
        return place.stock(
            block, reason, hidden_states, res_hidden_states_tuple, temb, encoder_hidden_states,
            cross_attention_kwargs, upsample_size, attention_mask, encoder_attention_mask,
        )  # fmt: skip
    skips = reversed(res_hidden_states_tuple[-len(block.resnets) :])
    for inner, attention, skip in zip(block.resnets, block.attentions, skips, strict=True):
        hidden_states = attention(
            _joined(inner, hidden_states, skip, temb),
            encoder_hidden_states=encoder_hidden_states,
            cross_attention_kwargs=cross_attention_kwargs,
            attention_mask=attention_mask,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=False,
        )[0]
    for upsampler in block.upsamplers or ():
        hidden_states = upsampler(hidden_states, upsample_size)
    place.served()
    return hidden_states


def _check(block, hidden_states, res_hidden_states_tuple, temb):
    """Raises: Unserved, where any of the ResNets would be: then the block runs as it is, and they each for themselves."""
    if all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2")):
        raise Unserved("FreeU is on")
    if getattr(block, "gradient_checkpointing", False) and is_grad_enabled():
        raise Unserved("gradient checkpointing is on")
    if len(res_hidden_states_tuple) < len(block.resnets):
        raise Unserved("fewer skip connections than ResNets")
    for inner in block.resnets:
        modules.expect(inner, ResnetBlock2D, served=True)
        if not modules.is_served(inner):
            raise Unserved("a ResNet of its own is not served")
        resnet.write(_place(inner).builder(*resnet.TWO_PARTS), inner, resnet.TWO_PARTS, temb is not None)
    check_call(hidden_states, *res_hidden_states_tuple, temb)


def _joined(inner: ResnetBlock2D, hidden_states: Tensor, skip: Tensor, temb: Tensor | None) -> Tensor:
    return resnet.forward_parts(inner, _place(inner), (hidden_states, skip), temb)


def _place(inner: ResnetBlock2D) -> Place:
    return inner.forward.args[1]
