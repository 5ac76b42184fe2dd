"""Writes a pipeline's weights as the one file that Stable Diffusion's authors publish: diffusers' reading, inverted."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
_OPEN_CLIP |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def state_dict(pipe: DiffusionPipeline, *, open_clip: bool = False) -> dict[str, Tensor]:
    """All weights by their original names; `open_clip` for SD 2's text encoder instead of SD 1's."""
    state = {f"model.diffusion_model.{name}": value for name, value in unet(pipe.unet).items()}
    state |= {f"first_stage_model.{name}": value for name, value in vae(pipe.vae).items()}
    if isinstance(pipe, StableDiffusionXLPipeline):
        state |= _clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        state |= _open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    elif open_clip:
        state |= _open_clip(pipe.text_encoder, "cond_stage_model.model.")
    else:
        state |= _clip(pipe.text_encoder, "cond_stage_model.transformer.")
    return {name: value.contiguous().clone() for name, value in state.items()}


def save(pipe: DiffusionPipeline, path: Path, **options: bool) -> Path:
    state = state_dict(pipe, **options)
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    return path


def unet(model: UNet2DConditionModel) -> dict[str, Tensor]:
    return {_unet_name(name, model): value for name, value in model.state_dict().items()}


def _unet_name(name: str, model: UNet2DConditionModel) -> str:
    for ours, theirs in _UNET_ENDS.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return f"middle_block.{place}.{_layer_name(found[1], found[3])}"
    side, block, kind, layer, rest = re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", name).groups()
    each = model.config.layers_per_block + 1
    first = int(block) * each + (side == "down")
    blocks = "input_blocks" if side == "down" else "output_blocks"
    if kind == "downsamplers":
        return f"{blocks}.{first + each - 1}.0.{rest.replace('conv', 'op', 1)}"
    if kind == "upsamplers":
        after = 2 if hasattr(model.up_blocks[int(block)], "attentions") else 1
        return f"{blocks}.{first + each - 1}.{after}.{rest}"
    return f"{blocks}.{first + int(layer)}.{int(kind == 'attentions')}.{_layer_name(kind, rest)}"


def _layer_name(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    layer, _, leaf = rest.partition(".")
    return f"{_RESNET[layer]}.{leaf}"


def vae(model: AutoencoderKL) -> dict[str, Tensor]:
    state, last = {}, len(model.config.up_block_types) - 1
    for name, value in model.state_dict().items():
        if ".attentions." in name and name.endswith("weight") and value.ndim == 2:
            value = value[:, :, None, None]
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{last - int(m[1])}.block.{m[2]}", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if "mid_block.attentions.0" in name:
            name = name.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            name = re.sub(r"to_([qkv])", r"\1", name).replace("to_out.0", "proj_out")
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        state[name] = value
    return state


def _text_names(model: nn.Module) -> dict[str, Tensor]:
    """Weights by the names before transformers 5.6, which let go of "text_model."."""
    return {
        name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}": value
        for name, value in model.state_dict().items()
    }


def _clip(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in _text_names(model).items()}


def _open_clip(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    names, state = _text_names(model), {}
    ends = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    for name, value in names.items():
        if name == "text_projection.weight":
            state[f"{prefix}text_projection"] = value.T
        elif name in ends:
            state[prefix + ends[name]] = value
        elif found := re.match(r"text_model\.encoder\.layers\.(\d+)\.(.*)\.(weight|bias)$", name):
            layer, part, leaf = found.groups()
            block = f"{prefix}transformer.resblocks.{layer}."
            if part in _OPEN_CLIP:
                state[f"{block}{_OPEN_CLIP[part]}.{leaf}"] = value
            elif part == "self_attn.q_proj":
                parts = [names[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                state[f"{block}attn.in_proj_{leaf}"] = torch.cat(parts)
    return state
