"""accelerate and restore: puts served forwards in the place of blocks' own, and takes them away again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D, CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from peft.tuners import lora
from torch import nn

from rftcore.blocks import attention, ends, levels, modules, resampling, resnet, transformer, up_block
from rftcore.blocks.serving import Place, Serving
from rftcore.ops.backends import OPS

SERVED_MODELS = (UNet2DConditionModel, UNet2DModel, AutoencoderKL)

_FORWARDS: dict[type, Callable] = {
    ResnetBlock2D: resnet.forward,
    Downsample2D: resampling.forward_down,
    Upsample2D: resampling.forward_up,
    Transformer2DModel: transformer.forward_model,
    BasicTransformerBlock: transformer.forward_block,
    UpBlock2D: up_block.forward,
    AttnUpBlock2D: up_block.forward,
    CrossAttnUpBlock2D: up_block.forward_cross_attention,
}
_END_CONVOLUTIONS = ("conv_in", "conv_out", "quant_conv", "post_quant_conv")


def accelerate(module: nn.Module, recompute: str = "none", backend: str = "auto") -> nn.Module:
    served = _model(module)
    restore(served)
    serving = Serving(recompute, {} if backend == "auto" else dict.fromkeys(OPS, backend))
    for name, block, forward in _blocks(served):
        if "forward" not in block.__dict__:
            block.forward = functools.partial(forward, block, Place(serving, name))
    return module


def restore(module: nn.Module) -> nn.Module:
    for block in module.modules():
        if modules.is_served(block):
            del block.forward
    return module


def _model(module):
    return module


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, Callable]]:
    """Name, block and served forward of everything that can be served."""
    for name, block in model.named_modules():
        last = name.rpartition(".")[2]
        if type(block) in _FORWARDS:
            yield name, block, _FORWARDS[type(block)]
        elif type(block) is Attention and block.group_norm is not None:
            yield name, block, attention.forward
        elif last in _END_CONVOLUTIONS and type(block) in (nn.Conv2d, lora.Conv2d):
            yield name, block, ends.forward_convolution
        elif last == "conv_norm_out" and type(block) is nn.GroupNorm:
            yield name, block, ends.forward_norm
        elif last == "conv_act" and type(block) is nn.SiLU:
            yield name, block, ends.forward_silu
