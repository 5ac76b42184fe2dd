"""UpBlock2D and its relatives: each layer takes a skip connection, and what both are cut together to is not kept."""

from __future__ import annotations

from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D, CrossAttnUpBlock2D, UpBlock2D
from torch import Tensor, is_grad_enabled, nn

from rftcore.blocks import modules, stage
from rftcore.blocks.modules import Unserved
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
        skips = [res_hidden_states_tuple[-1 - i] for i in range(len(block.resnets))]
        if attentions is None:
            hidden_states = _run(place, [(inner, None) for inner in block.resnets], hidden_states, skips, temb)
        else:
            for inner, attention, skip in zip(block.resnets, attentions, skips, strict=True):
                hidden_states = attention(stage.run_layer((inner, None), hidden_states, skip, temb))
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
        layers = list(zip(block.resnets, block.attentions, strict=True))
        skips = [res_hidden_states_tuple[-1 - i] for i in range(len(layers))]
        hidden_states = _run(
            place, layers, hidden_states, skips, temb, encoder_hidden_states,
            cross_attention_kwargs=cross_attention_kwargs, attention_mask=attention_mask,
            encoder_attention_mask=encoder_attention_mask,
        )  # fmt: skip
        for upsampler in block.upsamplers or ():
            hidden_states = upsampler(hidden_states, upsample_size)
        return hidden_states
    return place.stock(
        block, refusal, hidden_states, res_hidden_states_tuple, temb, encoder_hidden_states,
        cross_attention_kwargs, upsample_size, attention_mask, encoder_attention_mask,
    )  # fmt: skip


def _run(
    place: Place,
    layers: list[stage.Layer],
    hidden_states: Tensor,
    skips: list[Tensor],
    temb: Tensor | None,
    encoder_hidden_states: Tensor | None = None,
    **arguments,
) -> Tensor:
    """The output of all layers, as one program; where one of them cannot be served, each for itself."""
    try:
        stage.check_arguments(**arguments)
        prepared = stage.prepare(place, layers, hidden_states, skips, temb, encoder_hidden_states)
    except Unserved:
        for layer, skip in zip(layers, skips, strict=True):
            hidden_states = stage.run_layer(layer, hidden_states, skip, temb, encoder_hidden_states, **arguments)
        return hidden_states
    return place.run(*prepared)


def check(block: nn.Module, *kinds: type) -> None:
    """Raises: Unserved: then the block runs as it is, and its layers each for themselves."""
    modules.check_own(block, *kinds)
    if all(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2")):
        raise Unserved("FreeU is on")
    if getattr(block, "gradient_checkpointing", False) and is_grad_enabled():
        raise Unserved("gradient checkpointing is on")
    if getattr(block, "upsample_type", "conv") == "resnet":
        raise Unserved("it upsamples by a ResNet")
