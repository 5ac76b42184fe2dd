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
from diffusers.models.unets.unet_2d_blocks import CrossAttnUpBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from rftcore.blocks import attention, modules, resampling, resnet, transformer
from rftcore.blocks.builder import Builder
from rftcore.blocks.modules import Unserved
from rftcore.blocks.program import Program
from rftcore.blocks.served import served

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
        blocks: one block, or a ResNet and the transformer after it.
        channels: of its input, or of the two parts of that.
        scale: how often its input was halved since the model's; negative where it was doubled.
        skip_is_shared: whether the second part is the input of another layer, too.
    """

    blocks: tuple[nn.Module, ...]
    channels: tuple[int, ...]
    scale: int
    skip_is_shared: bool = True


def layers(model: nn.Module, batch: int, height: int, width: int, dtype: torch.dtype) -> Iterator[Layer]:
    """What runs when the model is called on (batch, ..., height, width): on latents, for an autoencoder's decoder.

    Layers that cannot be served are left out.

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
    for site in sites:
        try:
            yield _layer(site, batch, height, width, dtype)
        except Unserved:
            continue


def scales(model: nn.Module) -> dict[str, int]:
    """How often the input of each layer was halved since the model's, by the layer's name."""
    return {served(site.blocks[-1]).place.name: site.scale for site in _sites(model) if _is_served(site)}


def _sites(model: nn.Module) -> Iterator[_Site]:
    if isinstance(model, AutoencoderKL):
        model, skips = model.decoder, None
        stages = [(model.mid_block, 0), *((block, -i) for i, block in enumerate(model.up_blocks))]
    else:
        halvings = len(model.down_blocks) - 1
        stages = [*zip(model.down_blocks, range(halvings + 1), strict=True), (model.mid_block, halvings)]
        stages += [(block, halvings - i) for i, block in enumerate(model.up_blocks)]
        skips = _skips(model)
    yield _Site((model.conv_in,), (modules.base_of(model.conv_in).in_channels,), stages[0][1])
    for stage, scale in stages:
        if stage is not None:
            yield from _stage_sites(stage, scale, skips if stage in list(model.up_blocks) else None)
    for end, channels in ((model.conv_norm_out, "num_channels"), (model.conv_out, "in_channels")):
        if end is not None:
            yield _Site((end,), (getattr(modules.base_of(end), channels),), stages[-1][1])


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


def _stage_sites(stage: nn.Module, scale: int, skips: list[tuple[int, bool]] | None) -> Iterator[_Site]:
    """The sites of a down-block, the middle or an up-block; `skips`, where it takes them, from their end."""
    attentions = [a for a in getattr(stage, "attentions", None) or () if a is not None]
    # The middle begins with a ResNet more.
    first = len(stage.resnets) - len(attentions) if attentions else 0
    for i, inner in enumerate(stage.resnets):
        channels, shared = (inner.in_channels,), True
        if skips is not None:
            skip, shared = skips.pop()
            channels = (inner.in_channels - skip, skip)
        if first and i >= first:
            yield _Site((attentions[i - first],), channels, scale)
        following = attentions[i] if not first and attentions else None
        joined = isinstance(stage, CrossAttnUpBlock2D)
        yield _Site((inner, following) if joined else (inner,), channels, scale, shared)
        if following is not None and not joined:
            yield _Site((following,), (inner.out_channels,), scale)
    for resampler in (*(getattr(stage, "downsamplers", None) or ()), *(getattr(stage, "upsamplers", None) or ())):
        if isinstance(resampler, Downsample2D | Upsample2D):
            yield _Site((resampler,), (resampler.channels,), scale)


def _is_served(site: _Site) -> bool:
    return all(served(block) is not None for block in site.blocks)


def _layer(site: _Site, batch: int, height: int, width: int, dtype: torch.dtype) -> Layer:
    """Raises: Unserved."""
    if not _is_served(site):
        raise Unserved("not served")

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    pixels = [-(-size // 2**site.scale) if site.scale > 0 else size * 2**-site.scale for size in (height, width)]
    images = [empty(batch, channels, *pixels) for channels in site.channels]
    place = served(site.blocks[-1]).place
    first, last = site.blocks[0], site.blocks[-1]
    parts = resnet.TWO_PARTS if len(images) == 2 else ("hidden_states",)
    inputs = dict(zip(parts, images, strict=True))
    if embedded(first):
        inputs["temb"] = empty(batch, modules.base_of(first.time_emb_proj).in_features)
    cross = last.transformer_blocks[0].attn2 if isinstance(last, Transformer2DModel) else None
    if cross is not None:
        inputs["encoder_hidden_states"] = empty(batch, TEXT_TOKENS, modules.base_of(cross.to_k).in_features)
    # Prices do not depend on who serves, and these serve on the meta device.
    b = Builder(inputs, {"attention": "math", "group_norm_silu": "reference", "geglu": "reference"})
    write(b, site.blocks, parts, embedded(first), cross is not None)
    shared = {"temb", "encoder_hidden_states", *([resnet.TWO_PARTS[1]] if site.skip_is_shared else [])}
    parameters = tuple(
        None if p is None else torch.empty(p.shape, dtype=p.dtype, device="meta", requires_grad=p.requires_grad)
        for p in b.parameters
    )
    return Layer(place.name, b.program, tuple(inputs.values()), parameters, frozenset(shared))


def embedded(block: nn.Module) -> bool:
    """Whether the block takes a time embedding."""
    return isinstance(block, ResnetBlock2D) and block.time_emb_proj is not None


def write(b: Builder, blocks: Sequence[nn.Module], parts: tuple[str, ...], embedded: bool, conditioned: bool) -> None:
    """Writes the steps of these blocks, one after the other, for the parts of the first one's input.

    Args:
        embedded, conditioned: whether the program has the inputs "temb" and "encoder_hidden_states".

    Raises: Unserved.
    """
    x = parts[0]
    for block in blocks:
        if isinstance(block, ResnetBlock2D):
            x = resnet.write(b, block, parts, embedded)
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
