"""kohya's names of LoRA layers, and diffusers': dots are underscores there, and SDXL's blocks are Stability's own.

Source: the names that kohya-ss sd-scripts (networks/lora.py) writes; for SDXL it trains Stability's UNet.
"""

from __future__ import annotations

import re

# Of a diffusers component, kohya's prefix where the model has one text encoder, and where it has two.
_PREFIXES = {
    "unet": ("lora_unet_", "lora_unet_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_", "lora_te2_"),
}
# Every name of a module in which an underscore is no dot.
_WORDS = """
    down_blocks mid_block up_blocks transformer_blocks proj_in proj_out conv_in conv_out conv_shortcut
    time_emb_proj time_embedding add_embedding linear_1 linear_2 to_q to_k to_v to_out
    text_model text_projection self_attn q_proj k_proj v_proj out_proj
    input_blocks middle_block output_blocks in_layers out_layers emb_layers skip_connection time_embed label_emb
""".split()
_PART = re.compile(rf"(?:{'|'.join(sorted(_WORDS, key=len, reverse=True))}|[^_]+)(?=_|$)")
# Blocks of Stability's UNet for each of diffusers': its layers and what comes after them.
_LAYERS = 3
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_RESNET_BACK = {original: name for name, original in _RESNET.items()}
_OUTSIDE_BACK = {original: name for name, original in _OUTSIDE.items()}


def to_kohya(component: str, module: str, xl: bool) -> str:
    """unet, mid_block.attentions.0.proj_in -> lora_unet_mid_block_attentions_0_proj_in; with `xl` in SDXL's names.

    Raises: ValueError for a module of which SDXL has no such name.
    """
    try:
        name = _to_original(module) if xl and component == "unet" else module
    except (KeyError, IndexError, ValueError):
        raise ValueError(f"{module} is no layer of SDXL's UNet, so kohya has no name for it") from None
    key = _PREFIXES[component][xl] + name.replace(".", "_")
    # A dot and an underscore are the same there: only of a model's own names is it known which is which.
    if from_kohya(key) != (component, module):
        raise ValueError(f"{component}.{module} is no name that could be told from another there")
    return key


def from_kohya(name: str) -> tuple[str, str]:
    """Component and module of a name that `to_kohya` gives, with or without `xl`.

    Raises: ValueError for another name.
    """
    for component, prefixes in _PREFIXES.items():
        for prefix in prefixes:
            if name.startswith(prefix):
                parts = _PART.findall(name.removeprefix(prefix))
                if prefix + "_".join(parts) != name:
                    raise ValueError(f"{name} is no name of a layer")
                module = ".".join(parts)
                try:
                    return component, _from_original(module) if component == "unet" else module
                except (KeyError, IndexError, ValueError):
                    raise ValueError(f"{name} is no layer of Stable Diffusion's UNet") from None
    raise ValueError(f"{name} begins with none of lora_unet_, lora_te_, lora_te1_, lora_te2_")


def _to_original(module: str) -> str:
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    """Raises: KeyError, IndexError or ValueError for a module that is none of the UNet's."""
    parts = module.split(".")
    if parts[0] == "mid_block" and len(parts) > 3:
        place = {"resnets": 2 * int(parts[2]), "attentions": 1}[parts[1]]
        return ".".join(["middle_block", str(place), *_inner_to(parts[1], parts[3:])])
    if parts[0] not in ("down_blocks", "up_blocks") or len(parts) < 5:
        raise KeyError(parts[0])
    number, kind, layer, inner = int(parts[1]), parts[2], int(parts[3]), parts[4:]
    first = _LAYERS * number
    if kind == "downsamplers":
        return f"input_blocks.{first + _LAYERS}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{first + _LAYERS - 1}.2.conv"
    place = {"resnets": 0, "attentions": 1}[kind]
    side, index = ("input_blocks", 1 + first + layer) if parts[0] == "down_blocks" else ("output_blocks", first + layer)
    return ".".join([side, str(index), str(place), *_inner_to(kind, inner)])


def _from_original(module: str) -> str:
    if module in _OUTSIDE_BACK:
        return _OUTSIDE_BACK[module]
    parts = module.split(".")
    if parts[0] == "middle_block":
        place = int(parts[1])
        kind, layer = ("attentions", 0) if place == 1 else ("resnets", place // 2)
        return ".".join(["mid_block", kind, str(layer), *_inner_from(kind, parts[2:])])
    if parts[0] not in ("input_blocks", "output_blocks"):
        return module
    index, place, inner = int(parts[1]), int(parts[2]), parts[3:]
    if parts[0] == "input_blocks":
        number, layer = divmod(index - 1, _LAYERS)
        if inner == ["op"]:
            return f"down_blocks.{number}.downsamplers.0.conv"
        side = "down_blocks"
    else:
        number, layer = divmod(index, _LAYERS)
        if inner == ["conv"]:
            return f"up_blocks.{number}.upsamplers.0.conv"
        side = "up_blocks"
    kind = ("resnets", "attentions")[place]
    return ".".join([side, str(number), kind, str(layer), *_inner_from(kind, inner)])


def _inner_to(kind: str, inner: list[str]) -> list[str]:
    return [_RESNET[inner[0]], *inner[1:]] if kind == "resnets" else inner


def _inner_from(kind: str, inner: list[str]) -> list[str]:
    return [_RESNET_BACK[".".join(inner)]] if kind == "resnets" else inner
