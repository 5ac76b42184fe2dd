"""UpBlock2D and its relatives: each layer takes a skip connection, and what both are cut together to is not kept."""

from __future__ import annotations

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D, CrossAttnUpBlock2D, UpBlock2D
from torch import Tensor, is_grad_enabled, nn

from rftcore.blocks import modules, resnet, transformer
from rftcore.blocks.modules import Unserved
from rftcore.blocks.serving import Place, check_call, opaque


@opaque
def forward(
    block: UpBlock2D,
    place: Place,
    hidden_states: Tensor,
    res_hidden_states_tuple: tuple[Tensor, ...],
    temb: Tensor | None = None,
    upsample_size: int | None = None,
    *args,
    **kwargs,
):
    """In place of UpBlock2D.forward and AttnUpBlock2D.forward."""
    attentions = getattr(block, "attentions", None)
    try:
        if args or kwargs:
            raise Unserved("it was called with further arguments")
        check(block)
        check_call(hidden_states, *res_hidden_states_tuple, temb)
    except Unserved as reason:
        return place.stock(block, reason, hidden_states, res_hidden_states_tuple, temb, upsample_size, *args, **kwargs)
    place.served()
    for i, inner in enumerate(block.resnets):
        parts = hidden_states, res_hidden_states_tuple[-1 - i]
        hidden_states = _resnet(inner, parts, temb)
        if attentions is not None:
            hidden_states = attentions[i](hidden_states)
    for upsampler in block.upsamplers or ():
        # AttnUpBlock2D does not pass a size on.
        hidden_states = upsampler(hidden_states, *(() if attentions is not None else (upsample_size,)))
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
        check(block)
        check_call(hidden_states, *res_hidden_states_tuple, temb)
    except Unserved as reason:
        return place.stock(
            block, reason, hidden_states, res_hidden_states_tuple, temb, encoder_hidden_states,
            cross_attention_kwargs, upsample_size, attention_mask, encoder_attention_mask,
        )  # fmt: skip
    place.served()
    for i, (inner, attention) in enumerate(zip(block.resnets, block.attentions, strict=True)):
        parts = hidden_states, res_hidden_states_tuple[-1 - i]
        try:
            transformer.check_arguments(attention_mask, encoder_attention_mask, cross_attention_kwargs)
            hidden_states = _layer(inner, attention, parts, temb, encoder_hidden_states)
        except Unserved:
            hidden_states = attention(
                _resnet(inner, parts, temb),
                encoder_hidden_states=encoder_hidden_states,
                cross_attention_kwargs=cross_attention_kwargs,
                attention_mask=attention_mask,
                encoder_attention_mask=encoder_attention_mask,
                return_dict=False,
            )[0]
    for upsampler in block.upsamplers or ():
        hidden_states = upsampler(hidden_states, upsample_size)
    return hidden_states


def check(block: nn.Module) -> None:
    """Raises: Unserved, also where a ResNet would be: then the block runs as it is, and its layers each for themselves."""
    if all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2")):
        raise Unserved("FreeU is on")
    if getattr(block, "gradient_checkpointing", False) and is_grad_enabled():
        raise Unserved("gradient checkpointing is on")
    if getattr(block, "upsample_type", "conv") == "resnet":
        raise Unserved("it upsamples by a ResNet")
    for inner in block.resnets:
        modules.expect(inner, ResnetBlock2D, served=True)
        resnet.write(_place(inner).builder(), inner, resnet.TWO_PARTS, inner.time_emb_proj is not None)


def _resnet(inner: ResnetBlock2D, parts, temb) -> Tensor:
    """A ResNet by itself; as it is, where a hook of the layer before it returned what cannot be served."""
    try:
        return resnet.forward_parts(inner, _place(inner), parts, temb)
    except Unserved:
        return inner(torch.cat(parts, dim=1), temb)


def _layer(inner: ResnetBlock2D, attention: Transformer2DModel, parts, temb, encoder_hidden_states) -> Tensor:
    """ResNet and transformer as one program: what lies between them need not be kept either. Raises: Unserved."""
    modules.expect(attention, Transformer2DModel, served=True)
    inputs = {**dict(zip(resnet.TWO_PARTS, parts, strict=True)), "temb": temb}
    inputs["encoder_hidden_states"] = encoder_hidden_states
    present = {name: tensor for name, tensor in inputs.items() if tensor is not None}
    check_call(*present.values())
    place = _place(attention)
    b = place.builder(*present)
    x = resnet.write(b, inner, resnet.TWO_PARTS, temb is not None)
    transformer.write(b, attention, x, encoder_hidden_states is not None)
    _place(inner).served()
    return place.run(b, list(present.values()))


def _place(block: nn.Module) -> Place:
    """Raises: Unserved where our forward is not in place of the block's own."""
    if not modules.is_served(block):
        raise Unserved(f"{type(block).__name__} is not served")
    return block.forward.args[1]
