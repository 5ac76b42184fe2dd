"""accelerate, restore and report: our forwards in the place of blocks' own, and which of them can serve."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D, CrossAttnDownBlock2D, CrossAttnUpBlock2D, UpBlock2D
from diffusers.models.upsampling import Upsample2D
from peft import PeftModel
from peft.tuners import lora
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from rftcore.blocks import (
    attention,
    down_block,
    embedding,
    ends,
    layers,
    levels,
    modules,
    resampling,
    resnet,
    transformer,
    up_block,
)
from rftcore.blocks.budget import Budget, bytes_of
from rftcore.blocks.modules import Unserved
from rftcore.blocks.served import Served, served
from rftcore.blocks.serving import Place, Serving
from rftcore.ops.backends import OPS

_MODELS = (UNet2DConditionModel, UNet2DModel, AutoencoderKL)

_FORWARDS: dict[type, Callable] = {
    ResnetBlock2D: resnet.forward,
    Downsample2D: resampling.forward_down,
    Upsample2D: resampling.forward_up,
    Transformer2DModel: transformer.forward_model,
    BasicTransformerBlock: transformer.forward_block,
    CrossAttnDownBlock2D: down_block.forward,
    UpBlock2D: up_block.forward,
    AttnUpBlock2D: up_block.forward,
    CrossAttnUpBlock2D: up_block.forward_cross_attention,
}
_END_CONVOLUTIONS = ("conv_in", "conv_out", "quant_conv", "post_quant_conv")
# Whose backends `backend` may name.
_OPS = ("group_norm_silu", "geglu", "attention", "lora_linear", "gated_linear")


def accelerate(
    module: nn.Module, recompute: str = "none", backend: str = "auto", memory_budget: int | str | None = None
) -> nn.Module:
    """Makes a model keep less for its backward, with the same outputs and the same gradients. In place.

    The module tree, names, state_dict, hooks, adapters and everything else stay as they are; only the forwards of known
    blocks are replaced, and `restore` puts them back. Called again, it switches to the new settings. What requires a
    gradient is looked at when a block runs, as are adapters, hooks and masks: a block that cannot be served then runs
    its own forward, and `report` says why.

    Args:
        module: a UNet2DConditionModel, UNet2DModel or AutoencoderKL, which DistributedDataParallel, torch.compile,
            accelerate or PEFT may have wrapped.
        recompute: what the backward makes again: "none", what takes no matrix product and no convolution; "ff", also
            the feed-forwards' projections; "qkv", also queries, keys and values; "block", all but the blocks' inputs;
            "auto", layer by layer what is cheapest, until `memory_budget` holds.
        backend: "auto", or the name of one for all ops that have it, such as "reference".
        memory_budget: bytes, or a text such as "264MiB", that one forward of the whole batch may keep, for "auto".

    Returns: module.
    Raises:
        ValueError: for a module or settings it does not know, and for weights on several devices.
        RuntimeError: where `backend` cannot serve on the module's device, with its reasons.
    """
    model = _unwrapped(module)
    if recompute not in (*levels.LEVELS, "auto"):
        known = ", ".join(repr(level) for level in (*levels.LEVELS, "auto"))
        raise ValueError(f"recompute={recompute!r} is unknown; choose one of {known}.")
    if (recompute == "auto") != (memory_budget is not None):
        raise ValueError(
            f"recompute={recompute!r} with memory_budget={memory_budget!r}: "
            'give memory_budget, such as "8GiB", with recompute="auto", and only then.'
        )
    budget = None if memory_budget is None else Budget(model, bytes_of(memory_budget))
    serving = Serving(recompute, _backends(model, backend), budget=budget)
    restore(model)
    for name, block, forward in _blocks(model):
        if "forward" not in block.__dict__:
            block.forward = Served(forward, block, Place(serving, name))
    for name in embedding.EMBEDDINGS:
        embedder: Any = getattr(model, name, None)
        if type(embedder) is TimestepEmbedding and "forward" not in embedder.__dict__:
            embedder.forward = Served(embedding.forward, embedder, Place(serving, name))
    return module


def restore(module: nn.Module) -> nn.Module:
    """Takes back what `accelerate` did, wherever it did it inside `module`.

    Returns: module.
    """
    for block in module.modules():
        if served(block):
            del block.forward
        # What a hook of the library accelerate has put aside, and calls.
        if isinstance(block.__dict__.get("_old_forward"), Served):
            block.__dict__["_old_forward"] = functools.partial(type(block).forward, block)
    return module


@dataclasses.dataclass(frozen=True)
class Report:
    """What of a model is served.

    Attributes:
        recompute: the level; None where the model is not accelerated.
        served: names of the blocks that are.
        stock: of a block's name, why it runs its own forward, as it stands or in its last call.
        outside: names of the layers with parameters that belong to no block we know.
    """

    recompute: str | None
    served: tuple[str, ...]
    stock: dict[str, str]
    outside: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"recompute: {self.recompute or 'not accelerated'}; {len(self.served)} blocks served"]
        lines += [f"stock: {name}: {reason}" for name, reason in self.stock.items()]
        lines += [f"outside of known blocks: {', '.join(self.outside)}"] if self.outside else []
        return "\n".join(lines)


def report(module: nn.Module) -> Report:
    """Which blocks of a model are served, which run their own forward, and why.

    Raises: ValueError for a module that `accelerate` does not know.
    """
    model = _unwrapped(module)
    fine, stock, recompute = [], {}, None
    known: set[nn.Module] = set()
    for name, block, _ in _blocks(model):
        known.update(block.modules())
        ours = served(block)
        if ours is None:
            stock[name] = _why_not_accelerated(block)
            continue
        recompute = ours.place.serving.recompute
        reason = _refusal(block, ours.place) or ours.place.serving.refusals.get(name)
        if reason is None:
            fine.append(name)
        else:
            stock[name] = reason
    outside = tuple(
        name
        for name, layer in model.named_modules()
        if layer not in known and any(True for _ in layer.parameters(False))
    )
    return Report(recompute, tuple(fine), stock, outside)


def _why_not_accelerated(block: nn.Module) -> str:
    if "forward" in block.__dict__:
        return "it has a forward of its own"
    if served(modules.base_of(block)):
        return "adapted after accelerate, only its base layer is served; call accelerate again"
    return "not accelerated"


def _refusal(block: nn.Module, place: Place) -> str | None:
    """Why the block cannot be served as it stands."""
    if isinstance(block, nn.SiLU):
        return None
    try:
        if isinstance(block, UpBlock2D | AttnUpBlock2D | CrossAttnUpBlock2D):
            up_block.check(block, type(block))
        elif isinstance(block, CrossAttnDownBlock2D):
            down_block.check(block)
        elif isinstance(block, BasicTransformerBlock):
            transformer.write_block(place.builder(), block, 0, True)
        elif modules.base_of(block).__class__ is nn.Conv2d:
            modules.convolution(block, own=True)
        else:
            layers.write(place.builder(), (block,), (), layers.embedded(block), True)
    except Unserved as reason:
        return str(reason)
    return None


def _unwrapped(module: nn.Module) -> nn.Module:
    """The model under what may be wrapped around it."""
    model, wrapped = module, None
    if isinstance(module, nn.DataParallel):
        raise ValueError(
            "module is in nn.DataParallel, whose replicas would all run the first one's weights; use "
            "DistributedDataParallel, by `accelerate launch` or torchrun."
        )
    while isinstance(model, nn.Module) and model is not wrapped:
        # keep_torch_compile=True would take DistributedDataParallel out of a compiled model, for good.
        wrapped, model = model, extract_model_from_parallel(model, keep_torch_compile=False)
        if isinstance(model, PeftModel):
            model = model.get_base_model()
    if not isinstance(model, _MODELS):
        kinds = ", ".join(kind.__name__ for kind in _MODELS)
        raise ValueError(
            f"module is a {type(model).__name__}; rftcore.accelerate serves {kinds}. "
            "Of a pipeline, give it pipeline.unet and pipeline.vae."
        )
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) > 1:
        raise ValueError(
            f"module has weights on {', '.join(devices)}; they must be on one device. Move it, without offloading "
            f"or a device map: module.to({devices[0]!r})."
        )
    return model


def _backends(model: nn.Module, backend: str) -> dict[str, str]:
    """Of an op's name, the backend asked for."""
    if backend == "auto":
        return {}
    chosen = [name for name in _OPS if backend in OPS[name].not_supported_reasons]
    if not chosen:
        known = sorted({b for name in _OPS for b in OPS[name].not_supported_reasons})
        raise ValueError(f"backend={backend!r} is unknown; choose one of 'auto', {', '.join(map(repr, known))}.")
    weight = next(model.parameters())
    # Fake tensors: reasons look at devices, dtypes and shapes only.
    with torch.no_grad(), FakeTensorMode():
        for name in chosen:
            OPS[name].choose(backend, *OPS[name].example(weight.device, weight.dtype))
    return dict.fromkeys(chosen, backend)


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, Callable]]:
    """Name, block and our forward, of everything that we know."""
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
