"""What does not depend on the noisy sample, made once for all steps of a chain: text keys and values, embeddings.

The text and the timesteps of a chain are known before its first step. `compute` makes of them what every UNet
evaluation would make anew; inside `given`, blocks take those values as inputs.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import (
    AttnDownBlock2D,
    AttnUpBlock2D,
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UNetMidBlock2D,
    UNetMidBlock2DCrossAttn,
    UpBlock2D,
)
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor, nn

from rftcore.blocks import modules, resnet, transformer
from rftcore.blocks.embedding import EMBEDDINGS
from rftcore.blocks.modules import Unserved
from rftcore.blocks.served import place_of, served
from rftcore.blocks.serving import servings, setting

# Which hand text and time embedding on as they got them, by the forwards that they have when this is imported.
_CARRIERS: dict[type, Callable] = {
    kind: kind.forward
    for kind in (
        *(DownBlock2D, AttnDownBlock2D, CrossAttnDownBlock2D, UNetMidBlock2D, UNetMidBlock2DCrossAttn),
        *(UpBlock2D, AttnUpBlock2D, CrossAttnUpBlock2D, Transformer2DModel, BasicTransformerBlock, ResnetBlock2D),
    )
}
# What of a model decides what its blocks are given.
_METHODS = ("forward", "get_time_embed", "get_aug_embed", "get_class_embed", "process_encoder_hidden_states")
_OWN = {kind: {name: getattr(kind, name, None) for name in _METHODS} for kind in (UNet2DConditionModel, UNet2DModel)}


@dataclasses.dataclass(frozen=True)
class Values:
    """What `compute` makes, by the name of the layer that makes it otherwise.

    Attributes:
        text: (N, ...): of every cross-attention "<its block>.attn2.to_k" and ".to_v" (N, M, C), and SDXL's
            "add_embedding" (N, D).
        time: (T, 1 or N, ...): "time_embedding" (T, 1, D), and of every ResNet "<its name>.time_emb_proj" (T, 1, C), or
            (T, N, C) where the embedding differs from sample to sample.
    """

    text: dict[str, Tensor]
    time: dict[str, Tensor]

    def at(self, step: int) -> dict[str, Tensor]:
        """What `given` takes for the step of this index."""
        return {**self.text, **{name: values[step] for name, values in self.time.items()}}


def reasons(module: nn.Module) -> list[str]:
    """Why `compute` cannot stand for what this model's evaluations make; empty where it can.

    Layers that it cannot stand for, such as adapters with dropout or a block with hooks, are no reason: they are left
    out of its values and compute as usual.
    """
    model, found = _model(module), []
    if not servings(model):
        return ["module is not accelerated; call rftcore.accelerate(module) first"]
    if not isinstance(model, UNet2DConditionModel | UNet2DModel):
        return [f"module is a {type(model).__name__}, which has no timesteps"]
    own = _OWN[UNet2DConditionModel if isinstance(model, UNet2DConditionModel) else UNet2DModel]
    replaced = [
        name for name in _METHODS if name in model.__dict__ or getattr(type(model), name, None) is not own[name]
    ]
    found += [f"{type(model).__name__}.{name} was replaced" for name in replaced]
    if model._forward_pre_hooks:
        found.append("the model has hooks that may change what it is called with")
    if getattr(model, "is_gradient_checkpointing", False):
        found.append("gradient checkpointing is on: it runs blocks again where nothing is given")
    for name in ("encoder_hid_proj", "class_embedding"):
        if getattr(model, name, None) is not None:
            found.append(f"the model has {name}")
    for name, allowed in (("addition_embed_type", (None, "text_time")), ("time_cond_proj_dim", (None,))):
        if (value := getattr(model.config, name, None)) not in allowed:
            found.append(f"the model has {name}={value!r}")
    try:
        modules.check_global_hooks()
        for name in EMBEDDINGS:
            _check_embedding(getattr(model, name, None))
    except Unserved as reason:
        found.append(str(reason))
    return found


def compute(
    module: nn.Module,
    timesteps: Tensor,
    encoder_hidden_states: Tensor | None = None,
    added_cond_kwargs: Mapping[str, Tensor] | None = None,
    cross_attention_kwargs: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Values:
    """What the model's blocks make of text and timesteps, as they are now: adapters, their scales, autocast.

    Differentiable, in the caller's grad mode, with respect to parameters and inputs. The values hold as long as the
    model's weights, adapters and scales do; with adapters switched off, there are others.

    Args:
        module: an accelerated UNet, or what wraps it.
        timesteps: (T,).
        encoder_hidden_states: (N, M, D); None for an unconditional model.
        added_cond_kwargs, cross_attention_kwargs: as the model is called with; of the latter, the scale.
        dtype: of the model's noisy samples; None: the model's own.

    Raises:
        ValueError: where there are `reasons`, and for timesteps that are not (T,).
    """
    if why := reasons(module):
        raise ValueError(f"nothing can be computed once for all steps: {'; '.join(why)}. Let the blocks compute it.")
    if timesteps.dim() != 1:
        raise ValueError(f"timesteps is {tuple(timesteps.shape)}; it must be (T,), one for each step.")
    model = _model(module)
    scale = (cross_attention_kwargs or {}).get("scale", 1.0)
    scale_lora_layers(model, scale)
    try:
        text = {} if encoder_hidden_states is None else _text(model, encoder_hidden_states)
        time = _embedding(model, timesteps, model.dtype if dtype is None else dtype)  # (T, D)
        values = {"time_embedding": time[:, None]}
        time = time[:, None]  # (T, 1, D)
        if getattr(model, "add_embedding", None) is not None:
            added = model.get_aug_embed(time, encoder_hidden_states, dict(added_cond_kwargs or {}))  # (N, D)
            text["add_embedding"] = added
            time = time + added  # (T, N, D)
        if getattr(model, "time_embed_act", None) is not None:
            time = model.time_embed_act(time)
        return Values(text, values | _time(model, time))
    finally:
        unscale_lora_layers(model, scale)


@contextlib.contextmanager
def given(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Blocks called inside take these values instead of making them. The innermost one counts.

    They are inputs of the blocks, which get gradients through autograd. What is not named is computed as usual.

    Args:
        module: an accelerated UNet, or what wraps it.
        tensors: by the names of `Values`: text values (N, ...), of the rows at hand; time values of the step at hand,
            (N or 1, ...).

    Raises: ValueError for a module that is not accelerated; and blocks raise it for another number of rows.
    """
    with setting(module, "given", tensors):
        yield


def on_meta(model: nn.Module, batch: int, tokens: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors without data, of the shapes that an evaluation of `batch` rows is given of this accelerated model."""
    if reasons(model):
        return {}

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    found = {
        f"{name}.attn2.{layer}": empty(batch, tokens, modules.base_of(getattr(block.attn2, layer)).out_features)
        for name, block in _cross_attentions(model)
        for layer in ("to_k", "to_v")
    }
    for name, block in _resnets(model):
        found[f"{name}.time_emb_proj"] = empty(1, modules.base_of(block.time_emb_proj).out_features)
    return found


def _model(module: nn.Module) -> nn.Module:
    """The model inside of what wraps it."""
    inside = (m for m in module.modules() if isinstance(m, UNet2DConditionModel | UNet2DModel))
    return next(inside, module)


def _check_embedding(embedding: nn.Module | None) -> None:
    """Raises: Unserved where a call does more than its class's forward, or not the same each time."""
    if embedding is None:
        return
    if type(embedding) is not TimestepEmbedding or served(embedding) is None:
        raise Unserved(f"an embedding of the model is a {type(embedding).__name__}, or not served")
    if embedding._forward_hooks or embedding._forward_pre_hooks or embedding._backward_hooks:
        raise Unserved("an embedding of the model has hooks")
    for layer in (embedding.linear_1, embedding.linear_2):
        _steady(layer)


def _steady(layer: nn.Module) -> None:
    """Raises: Unserved where a linear layer has hooks, or adapters whose dropout is drawn at every call."""
    _, dropped = modules.linear(layer)
    if dropped:
        raise Unserved("an adapter drops out")


def _text(model: nn.Module, encoder_hidden_states: Tensor) -> dict[str, Tensor]:
    found = {}
    for name, block in _cross_attentions(model):
        for layer in ("to_k", "to_v"):
            b = place_of(block).builder("encoder_hidden_states")
            b.linear([layer], "encoder_hidden_states", [getattr(block.attn2, layer)])
            found[f"{name}.attn2.{layer}"] = place_of(block).evaluate(b, [encoder_hidden_states])
    return found


def _embedding(model: nn.Module, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, D), as the model's forward makes it before anything is added."""
    if isinstance(model, UNet2DModel):
        return model.time_embedding(model.time_proj(timesteps).to(model.dtype))
    # Of the sample it looks at number, dtype and device.
    like = torch.empty(len(timesteps), dtype=dtype, device=timesteps.device)
    return model.time_embedding(model.get_time_embed(like, timesteps), None)


def _time(model: nn.Module, embedding: Tensor) -> dict[str, Tensor]:
    """The projections of an embedding (T, rows, D)."""
    found, flat = {}, embedding.flatten(0, 1)
    for name, block in _resnets(model):
        b = place_of(block).builder("temb")
        resnet.write_projection(b, block)
        projected = place_of(block).evaluate(b, [flat])
        found[f"{name}.time_emb_proj"] = projected.unflatten(0, embedding.shape[:2])
    return found


def _cross_attentions(model: nn.Module) -> Iterator[tuple[str, BasicTransformerBlock]]:
    """Those whose keys and values can be made beforehand."""
    for name, block in _reached(model):
        if isinstance(block, BasicTransformerBlock) and type(block.attn2) is Attention:
            try:
                transformer.write_block(place_of(block).builder("0.h", "encoder_hidden_states"), block, 0, True)
                _steady(block.attn2.to_k)
                _steady(block.attn2.to_v)
            except Unserved:
                continue
            yield name, block


def _resnets(model: nn.Module) -> Iterator[tuple[str, ResnetBlock2D]]:
    """Those whose projection of the time embedding can be made beforehand."""
    for name, block in _reached(model):
        if isinstance(block, ResnetBlock2D) and block.time_emb_proj is not None:
            try:
                modules.expect(block.nonlinearity, nn.SiLU)
                _steady(block.time_emb_proj)
            except Unserved:
                continue
            yield name, block


def _reached(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Served blocks that are called with the text and the embedding that the model made, and their names."""
    # A block copied from another place goes by that place's name, too.
    names = collections.Counter(ours.place.name for m in model.modules() if (ours := served(m)))

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        for child_name, child in module.named_children():
            name = f"{path}{child_name}"
            if isinstance(child, nn.ModuleList):
                yield from walk(child, f"{name}.")
            elif _hands_on(child):
                ours = served(child)
                if ours and ours.place.name == name and names[name] == 1:
                    yield name, child
                yield from walk(child, f"{name}.")

    return walk(model, "")


def _hands_on(module: nn.Module) -> bool:
    """Whether what is inside gets what `module` is called with, and that is what calls it."""
    kind = type(module)
    foreign = "forward" in module.__dict__ and served(module) is None
    return kind in _CARRIERS and kind.forward is _CARRIERS[kind] and not foreign and not module._forward_pre_hooks
