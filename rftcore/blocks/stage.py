"""Layers in a row as one program: ResNets, each with the transformer after it; what lies between need not be kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor

from rftcore.blocks import modules, resnet, transformer
from rftcore.blocks.builder import Builder
from rftcore.blocks.modules import Unserved
from rftcore.blocks.served import place_of, served
from rftcore.blocks.serving import Place, check_call

# A ResNet and the transformer after it, or None.
Layer = tuple[ResnetBlock2D, Transformer2DModel | None]


def prepare(
    place: Place,
    layers: Sequence[Layer],
    hidden_states: Tensor,
    skips: Sequence[Tensor],
    temb: Tensor | None,
    encoder_hidden_states: Tensor | None,
) -> tuple[Builder, list[Tensor]]:
    """The program of these layers, each of which is also given one of `skips` where there are any; and its inputs.

    Raises: Unserved.
    """
    for inner, attention in layers:
        modules.expect(inner, ResnetBlock2D, own=True)
        if served(inner) is None or (attention is not None and served(attention) is None):
            raise Unserved("not served")
    check_call(hidden_states, *skips, temb)
    inputs = {"hidden_states": hidden_states, **dict(zip(skip_names(len(skips)), skips, strict=True))}
    resnet.check_embedding(hidden_states, temb)
    if temb is not None:
        inputs["temb"] = temb
    for _, attention in layers:
        if attention is not None:
            modules.expect(attention, Transformer2DModel, own=True)
            found = transformer.checked_inputs(attention, Transformer2DModel, "", hidden_states, encoder_hidden_states)
            inputs.update((name, tensor) for name, tensor in found.items() if name)
    b = place.builder(*inputs)
    write(b, layers, "hidden_states", skip_names(len(skips)), temb is not None, encoder_hidden_states is not None)
    return b, list(inputs.values())


def skip_names(count: int) -> list[str]:
    """Names of the inputs that are skip connections."""
    return ["res_hidden_states"] if count == 1 else [f"layers.{i}.res_hidden_states" for i in range(count)]


def write(b: Builder, layers: Iterable[Layer], x: str, skips: Sequence[str], embedded: bool, conditioned: bool) -> str:
    """Writes the steps of the layers; the name of the last one's output. Raises: Unserved.

    Args:
        x: name of the first one's input.
        skips: names of what each ResNet's input is cut together with; empty: with nothing.
        embedded, conditioned: whether the program has the inputs "temb" and "encoder_hidden_states".
    """
    layers = list(layers)
    for i, (inner, attention) in enumerate(layers):
        if i > 0:
            b.boundary(x)
        with b.within(f"layers.{i}") if len(layers) > 1 else contextlib.nullcontext():
            x = resnet.write(b, inner, (x, *skips[i : i + 1]), embedded)
            if attention is not None:
                if not skips:
                    b.boundary(x)
                x = transformer.write(b, attention, x, conditioned)
    return x


def run_layer(
    layer: Layer,
    hidden_states: Tensor,
    skip: Tensor | None,
    temb: Tensor | None,
    encoder_hidden_states: Tensor | None = None,
    **arguments,
) -> Tensor:
    """The output of a layer by itself, or of its parts by their own calls, where they have hooks or cannot be served.

    Args:
        arguments: further ones of the transformer.
    """
    inner, attention = layer
    skips = () if skip is None else (skip,)
    place = place_of(attention or inner)
    try:
        check_arguments(**arguments)
        prepared = prepare(place, [layer], hidden_states, skips, temb, encoder_hidden_states)
    except Unserved:
        pass
    else:
        place_of(inner).served()
        return place.run(*prepared)
    if attention is None:
        return inner(torch.cat((hidden_states, *skips), dim=1) if skips else hidden_states, temb)
    x = run_layer((inner, None), hidden_states, skip, temb)
    return attention(x, encoder_hidden_states=encoder_hidden_states, **arguments, return_dict=False)[0]


def check_arguments(attention_mask=None, encoder_attention_mask=None, cross_attention_kwargs=None) -> None:
    """Raises: Unserved for what no program can stand for."""
    transformer.check_arguments(attention_mask, encoder_attention_mask, cross_attention_kwargs)
