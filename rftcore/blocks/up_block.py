"""UpBlock2D and its relatives: each layer takes a skip connection, and what both are cut together to is not kept."""

from __future__ import annotations

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D, CrossAttnUpBlock2D, UpBlock2D
from torch import Tensor, is_grad_enabled, nn

from rftcore.blocks import modules, resnet, transformer
from rftcore.blocks.modules import Unserved
from rftcore.blocks.served import served
from rftcore.blocks.serving import Place, check_call


def forward(
    block: UpBlock2D | AttnUpBlock2D,
    place: Place,
    hidden_states: Tensor,
    res_hidden_states_tuple: tuple[Tensor, ...],
    temb: Tensor | None = None,
    upsample_size: int | None = None,
    *args,
    **kwargs,
):
    """In place of UpBlock2D.forward and AttnUpBlock2D.forward."""
    try:
        if args or kwargs:
            raise Unserved("it was called with further arguments")
        check(block, UpBlock2D, AttnUpBlock2D)
        check_call(hidden_states, *res_hidden_states_tuple, temb)
    except Unserved as reason:
        refusal = str(reason)
    else:
        place.served()
        attentions = getattr(block, "attentions", None)
        for i, inner in enumerate(block.resnets):
            hidden_states = _resnet(inner, (hidden_states, res_hidden_states_tuple[-1 - i]), temb)
            if attentions is not None:
                hidden_states = attentions[i](hidden_states)
        for upsampler in block.upsamplers or ():
            # AttnUpBlock2D does not pass a size on.
            hidden_states = upsampler(hidden_states, *(() if attentions is not None else (upsample_size,)))
        return hidden_states
    return place.stock(block, refusal, hidden_states, res_hidden_states_tuple, temb, upsample_size, *args, **kwargs)


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
        check(block, CrossAttnUpBlock2D)
        check_call(hidden_states, *res_hidden_states_tuple, temb)
    except Unserved as reason:
        refusal = str(reason)
    else:
        place.served()
        for i, (inner, attention) in enumerate(zip(block.resnets, block.attentions, strict=True)):
            parts = hidden_states, res_hidden_states_tuple[-1 - i]
            try:
                transformer.check_arguments(attention_mask, encoder_attention_mask, cross_attention_kwargs)
                layer = _layer(inner, attention, parts, temb, encoder_hidden_states)
            except Unserved:
                hidden_states = attention(
                    _resnet(inner, parts, temb),
                    encoder_hidden_states=encoder_hidden_states,
                    cross_attention_kwargs=cross_attention_kwargs,
                    attention_mask=attention_mask,
                    encoder_attention_mask=encoder_attention_mask,
                    return_dict=False,
                )[0]
            else:
                served(inner).place.served()
                hidden_states = served(attention).place.run(*layer)
        for upsampler in block.upsamplers or ():
            hidden_states = upsampler(hidden_states, upsample_size)
        return hidden_states
    return place.stock(
        block, refusal, hidden_states, res_hidden_states_tuple, temb, encoder_hidden_states,
        cross_attention_kwargs, upsample_size, attention_mask, encoder_attention_mask,
    )  # fmt: skip


def check(block: nn.Module, *kinds: type) -> None:
    """Raises: Unserved: then the block runs as it is, and its layers each for themselves."""
    modules.check_own(block, *kinds)
    if all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2")):
        raise Unserved("FreeU is on")
    if getattr(block, "gradient_checkpointing", False) and is_grad_enabled():
        raise Unserved("gradient checkpointing is on")
    if getattr(block, "upsample_type", "conv") == "resnet":
        raise Unserved("it upsamples by a ResNet")


def _resnet(inner: ResnetBlock2D, parts: tuple[Tensor, Tensor], temb: Tensor | None) -> Tensor:
    """The output of a ResNet for an input in two parts; from its own call, where it has hooks or cannot be served."""
    try:
        modules.expect(inner, ResnetBlock2D, own=True)
        if served(inner) is None:
            raise Unserved("not served")
        prepared = resnet.prepare(inner, served(inner).place, parts, temb)
    except Unserved:
        prepared = None
    return inner(torch.cat(parts, dim=1), temb) if prepared is None else served(inner).place.run(*prepared)


def _layer(inner: ResnetBlock2D, attention: Transformer2DModel, parts, temb, encoder_hidden_states):
    """ResNet and transformer as one program, and its inputs: what lies between them need not be kept either.

    Raises: Unserved.
    """
    modules.expect(inner, ResnetBlock2D, own=True)
    modules.expect(attention, Transformer2DModel, own=True)
    if served(inner) is None or served(attention) is None:
        raise Unserved("not served")
    inputs = resnet.checked_inputs(inner, parts, temb)
    context = transformer.checked_inputs(attention, Transformer2DModel, "", parts[0], encoder_hidden_states)
    inputs.update((name, tensor) for name, tensor in context.items() if name)
    b = served(attention).place.builder(*inputs)
    x = resnet.write(b, inner, resnet.TWO_PARTS, temb is not None)
    transformer.write(b, attention, x, encoder_hidden_states is not None)
    return b, list(inputs.values())
