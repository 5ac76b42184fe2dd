"""CrossAttnDownBlock2D: a ResNet and its transformer are one program; its output is a skip connection."""

from __future__ import annotations

from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D
from torch import Tensor, is_grad_enabled

from rftcore.blocks import modules, stage
from rftcore.blocks.modules import Unserved
from rftcore.blocks.serving import Place, check_call


def forward(
    block: CrossAttnDownBlock2D,
    place: Place,
    hidden_states: Tensor,
    temb: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cross_attention_kwargs=None,
    encoder_attention_mask: Tensor | None = None,
    additional_residuals: Tensor | None = None,
):
    """In place of CrossAttnDownBlock2D.forward."""
    try:
        check(block)
        check_call(hidden_states, temb)
    except Unserved as reason:
        refusal = str(reason)
    else:
        place.served()
        skips: tuple[Tensor, ...] = ()
        for layer in zip(block.resnets, block.attentions, strict=True):
            hidden_states = stage.run_layer(
                layer, hidden_states, None, temb, encoder_hidden_states,
                cross_attention_kwargs=cross_attention_kwargs, attention_mask=attention_mask,
                encoder_attention_mask=encoder_attention_mask,
            )  # fmt: skip
            if additional_residuals is not None and len(skips) + 1 == len(block.resnets):
                hidden_states = hidden_states + additional_residuals
            skips += (hidden_states,)
        if block.downsamplers is not None:
            for downsampler in block.downsamplers:
                hidden_states = downsampler(hidden_states)
            skips += (hidden_states,)
        return hidden_states, skips
    return place.stock(
        block, refusal, hidden_states, temb, encoder_hidden_states, attention_mask, cross_attention_kwargs,
        encoder_attention_mask, additional_residuals,
    )  # fmt: skip


def check(block: CrossAttnDownBlock2D) -> None:
    """Raises: Unserved: then the block runs as it is, and its layers each for themselves."""
    modules.check_own(block, CrossAttnDownBlock2D)
    if block.gradient_checkpointing and is_grad_enabled():
        raise Unserved("gradient checkpointing is on")
