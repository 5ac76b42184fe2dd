"""The layers of a model as programs of known shapes, without a forward: what a budget is divided among."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from rftcore.blocks import attention, modules, once, resampling, stage, transformer
from rftcore.blocks.builder import Builder
from rftcore.blocks.modules import Unserved
from rftcore.blocks.program import Program
from rftcore.blocks.served import place_of, served
from rftcore.blocks.serving import servings

# How many text tokens a layer is taken to attend to: a ResNet's share of a budget cannot depend on the real number.
TEXT_TOKENS = 77


class Layer(NamedTuple):
    """A program and its tensors, on the meta device.

    Attributes:
        name: of its place in the model.
        shared: names of inputs that are kept by other layers anyway.
    """

    name: str
    program: Program
    inputs: tuple[Tensor, ...]
    parameters: tuple[Tensor | None, ...]
    shared: frozenset[str]


class _Site(NamedTuple):
    """Where a program runs.

    Attributes:
        owner: the block under whose name it does.
        blocks: one block, or ResNets with the transformers after them.
        channels: of its input.
        scale: how often its input was halved since the model's; negative where it was doubled.
        skips: of each skip connection that it takes, the channels, and whether another layer keeps it anyway.
        parts: what runs in its place where it cannot be served.
    """

    owner: nn.Module
    blocks: tuple[nn.Module, ...]
    channels: int
    scale: int
    skips: tuple[tuple[int, bool], ...] = ()
    parts: tuple[_Site, ...] = ()


def layers(
    model: nn.Module, batch: int, height: int, width: int, dtype: torch.dtype, given: bool | None = None
) -> Iterator[Layer]:
    """What runs when the model is called on (batch, ..., height, width): on latents, for an autoencoder's decoder.

    Layers that cannot be served are left out.

    Args:
        given: whether it is called with what `once.compute` makes: inputs that are shared; None: as it would be now.

    Raises:
        ValueError: for a model of a build that is not known here.
    """
    try:
        sites = list(_sites(model))
    except (AttributeError, TypeError, IndexError) as error:
        raise ValueError(
            f"recompute='auto' cannot divide a budget among the layers of this {type(model).__name__}, whose build it "
            f"does not know ({error}); choose one of the other levels."
        ) from error
    if given is None:
        given = any(serving.given for serving in servings(model))
    beforehand = once.on_meta(model, batch, TEXT_TOKENS, dtype) if given else {}
    while sites:
        site = sites.pop(0)
        try:
            yield _layer(site, batch, height, width, dtype, beforehand)
        except Unserved:
            sites[:0] = site.parts


def scales(model: nn.Module) -> dict[str, int]:
    """How often the input of each layer was halved since the model's, by the layer's name."""
    found, sites = {}, list(_sites(model))
    while sites:
        site = sites.pop()
        sites += site.parts
        if (place := place_of(site.owner)) is not None:
            found[place.name] = site.scale
    return found


def _sites(model: nn.Module) -> Iterator[_Site]:
    if isinstance(model, AutoencoderKL):
        model, skips = model.decoder, None
        stages = [(model.mid_block, 0), *((block, -i) for i, block in enumerate(model.up_blocks))]
    else:
        halvings = len(model.down_blocks) - 1
        stages = [*zip(model.down_blocks, range(halvings + 1), strict=True), (model.mid_block, halvings)]
        stages += [(block, halvings - i) for i, block in enumerate(model.up_blocks)]
        skips = _skips(model)
    yield _single(model.conv_in, modules.base_of(model.conv_in).in_channels, stages[0][1])
    for block, scale in stages:
        if block is not None:
            yield from _stage_sites(block, scale, skips if block in list(model.up_blocks) else None)
    for end, channels in ((model.conv_norm_out, "num_channels"), (model.conv_out, "in_channels")):
        if end is not None:
            yield _single(end, getattr(modules.base_of(end), channels), stages[-1][1])


def _single(block: nn.Module, channels: int, scale: int) -> _Site:
    return _Site(block, (block,), channels, scale)


def _skips(unet: nn.Module) -> list[tuple[int, bool]]:
    """Of each skip connection, in the order of the down-blocks: its channels, and whether a layer has it as input."""
    skips = [(modules.base_of(unet.conv_in).out_channels, True)]
    for block in unet.down_blocks:
        *before, last = (inner.out_channels for inner in block.resnets)
        downsamplers = getattr(block, "downsamplers", None) or ()
        # The last layer's output goes nowhere else, where a convolution that keeps nothing follows.
        skips += [
            *((channels, True) for channels in before),
            (last, not downsamplers),
            *((last, True) for _ in downsamplers),
        ]
    return skips


def _stage_sites(block: nn.Module, scale: int, skips: list[tuple[int, bool]] | None) -> Iterator[_Site]:
    """The sites of a down-block, the middle or an up-block; `skips`, where it takes them, from their end."""
    attentions = [a for a in getattr(block, "attentions", None) or () if a is not None]
    # The middle begins with a ResNet more.
    first = len(block.resnets) - len(attentions) if attentions else 0
    found = []
    for i, inner in enumerate(block.resnets):
        own = () if skips is None else (skips.pop(),)
        if first and i >= first:
            found.append(_single(attentions[i - first], inner.in_channels, scale))
        layer = _Site(inner, (inner,), inner.in_channels - sum(channels for channels, _ in own), scale, own)
        if not first and attentions:
            after = _single(attentions[i], inner.out_channels, scale)
            if isinstance(block, CrossAttnDownBlock2D | CrossAttnUpBlock2D):
                layer = _Site(attentions[i], (inner, attentions[i]), layer.channels, scale, own, (layer, after))
                found.append(layer)
            else:
                found += [layer, after]
        else:
            found.append(layer)
    if isinstance(block, UpBlock2D | CrossAttnUpBlock2D) and found:
        blocks = tuple(module for site in found for module in site.blocks)
        taken = tuple(skip for site in found for skip in site.skips)
        found = [_Site(block, blocks, found[0].channels, scale, taken, tuple(found))]
    yield from found
    for resampler in (*(getattr(block, "downsamplers", None) or ()), *(getattr(block, "upsamplers", None) or ())):
        if isinstance(resampler, Downsample2D | Upsample2D):
            yield _single(resampler, resampler.channels, scale)


def _layer(site: _Site, batch: int, height: int, width: int, dtype: torch.dtype, given: dict[str, Tensor]) -> Layer:
    """Raises: Unserved."""
    if any(served(module) is None for module in (site.owner, *site.blocks)):
        raise Unserved("not served")
    if len(site.blocks) > 1 or site.skips:
        for module in site.blocks:
            modules.check_hooks(module, own=True)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    pixels = [-(-size // 2**site.scale) if site.scale > 0 else size * 2**-site.scale for size in (height, width)]
    first = site.blocks[0]
    skips = stage.skip_names(len(site.skips))
    inputs = {"hidden_states": empty(batch, site.channels, *pixels)}
    inputs.update((name, empty(batch, skip[0], *pixels)) for name, skip in zip(skips, site.skips, strict=True))
    if embedded(first):
        inputs["temb"] = empty(batch, modules.base_of(first.time_emb_proj).in_features)
    cross = [b.transformer_blocks[0].attn2 for b in site.blocks if isinstance(b, Transformer2DModel)]
    if cross and cross[0] is not None:
        inputs["encoder_hidden_states"] = empty(batch, TEXT_TOKENS, modules.base_of(cross[0].to_k).in_features)
    # Prices do not depend on who serves, and these serve on the meta device.
    b = Builder(inputs, {"attention": "math", "group_norm_silu": "reference", "geglu": "reference"}, given)
    write(b, site.blocks, skips, embedded(first), "encoder_hidden_states" in inputs)
    inputs |= b.taken
    shared = {"temb", "encoder_hidden_states", *b.taken}
    shared |= {name for name, (_, is_shared) in zip(skips, site.skips, strict=True) if is_shared}
    parameters = tuple(
        None if p is None else torch.empty(p.shape, dtype=p.dtype, device="meta", requires_grad=p.requires_grad)
        for p in b.parameters
    )
    name = place_of(site.owner).name
    return Layer(name, b.program, tuple(inputs.values()), parameters, frozenset(shared))


def embedded(block: nn.Module) -> bool:
    """Whether the block takes a time embedding."""
    return isinstance(block, ResnetBlock2D) and block.time_emb_proj is not None


def write(b: Builder, blocks: Sequence[nn.Module], skips: Sequence[str], embedded: bool, conditioned: bool) -> None:
    """Writes the steps of these blocks, for the input "hidden_states".

    Args:
        blocks: one, or ResNets with the transformers after them.
        skips: names of the skip connections that they take.
        embedded, conditioned: whether the program has the inputs "temb" and "encoder_hidden_states".

    Raises: Unserved.
    """
    x, block = "hidden_states", blocks[0]
    if isinstance(block, ResnetBlock2D):
        stage.write(b, _rows(blocks), x, skips, embedded, conditioned)
    elif isinstance(block, Transformer2DModel):
        transformer.write(b, block, x, conditioned)
    elif isinstance(block, Attention):
        attention.write_image(b, block)
    elif isinstance(block, Downsample2D):
        resampling.write_down(b, block)
    elif isinstance(block, Upsample2D):
        resampling.write_up(b, block, None)
    elif isinstance(block, nn.GroupNorm):
        b.group_norm("y", x, block, silu=True, own=True)
    else:
        b.convolution("y", x, block, own=True)


def _rows(blocks: Sequence[nn.Module]) -> list[stage.Layer]:
    """Each ResNet with the transformer after it, if one is."""
    following = [*blocks[1:], None]
    return [
        (block, after if isinstance(after, Transformer2DModel) else None)
        for block, after in zip(blocks, following, strict=True)
        if isinstance(block, ResnetBlock2D)
    ]
