"""LoRA files and folders of every layout: read, described, compared, mixed, converted, and read back."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from atheris import FuzzedDataProvider
from safetensors.torch import save

from fuzz import drawn
from fuzz.guard import Refused, demand, tried
from rftcore.commands.lora import run
from rftcore.errors import UsageError
from rftcore.lora import files

_ERRORS = (UsageError,)
_NAMES = (
    "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k", "unet.mid_block.resnets.1.conv1",
    "unet.up_blocks.1.attentions.0.proj_in", "unet.down_blocks.1.downsamplers.0.conv", "unet.conv_in", "unet.mid_block.x",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "text_encoder_2.text_projection", "unet.up_blocks.a.b.c.d",
    "base_model.model.down_blocks.0.resnets.0.conv1", "base_model.model.text_model.encoder.layers.1.mlp.fc1",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", "lora_unet_mid_block_attentions_0_proj_in",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj", "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "lora_te2_text_projection", "lora_unet_output_blocks_2_2_conv", "lora_unet_label_emb_0_0",
    "lora_unet_", "unet", "", "x",
    "unet.down_blocks.0.attentions.0.attn1.processor.to_q_lora", "unet.middle_block.0.a", "lora_unet_middle_block_9_a_b",
)  # fmt: skip
_DOWN = (
    ".lora_A.weight",
    ".lora_down.weight",
    ".lora.down.weight",
    ".down.weight",
    ".lora_A.default.weight",
    ".hada_w1",
)
_UP = (".lora_B.weight", ".lora_up.weight", ".lora.up.weight", ".up.weight", ".lora_B.default.weight", ".hada_w2")
_DTYPES = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool,
    torch.float8_e4m3fn, torch.complex64,
)  # fmt: skip
_CONFIG = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "alpha_pattern": {"conv1": 3, "^down_blocks.*": 1.5},
    "rank_pattern": {},
    "use_rslora": True,
    "auto_mapping": {"base_model_class": "CLIPTextModel"},
}


def check(data: bytes, folder: Path) -> None:
    source = FuzzedDataProvider(data[1:])
    path = folder / "a.safetensors"
    form = data[0] % 4 if data else 0
    if form == 0:
        path.write_bytes(data[1:])
    elif form == 1:
        path = folder / "peft"
        path.mkdir()
        (path / files.CONFIG_FILE).write_text(_config(source), errors="surrogatepass")
        (path / files.PEFT_FILE).write_bytes(_file(source))
    else:
        path.write_bytes(_file(source))
    lora = tried(_ERRORS, files.read, path)
    demand(bool(lora.layers), "a LoRA of no layers")
    demand(bool(run("info", {"lora": str(path)})), "nothing to say")
    demand(bool(run("diff", {"first": str(path), "second": str(path)})), "nothing to compare")
    for layout, name in (("diffusers", "d.safetensors"), ("kohya", "k.safetensors"), ("peft", "p")):
        _convert(path, folder / name, layout, lora)
    _mix(path, folder / "m.safetensors", data[-1] % 5 if data else 0)


def _convert(path: Path, output: Path, layout: str, lora) -> None:
    given = {"lora": str(path), "to": layout, "output": str(output), "force": False}
    try:
        tried(_ERRORS, run, "convert", given)
    except Refused:
        demand(not output.exists(), f"{layout}: refused, and written")
        return
    again = files.read(output)
    demand(again.layers.keys() == lora.layers.keys(), f"{layout}: other layers are read back")
    for name, layer in lora.layers.items():
        other = again.layers[name]
        same = torch.equal(layer.down, other.down) and torch.equal(layer.up, other.up)
        demand(same, f"{layout}: other matrices are read back")
        demand(abs(layer.alpha - other.alpha) <= 1e-6 * abs(layer.alpha), f"{layout}: another alpha is read back")


def _mix(path: Path, output: Path, rank: int) -> None:
    loras = [str(path), f"{path}:-0.5"]
    given = {"loras": loras, "rank": rank or None, "dtype": "fp32", "output": str(output), "force": False}
    try:
        tried(_ERRORS, run, "mix", given)
    except Refused:
        demand(not output.exists(), "mix: refused, and written")
        return
    files.read(output)


def _file(source: FuzzedDataProvider) -> bytes:
    state = {}
    for _ in range(source.ConsumeIntInRange(1, 4)):
        name, end = drawn.one_of(source, _NAMES), source.ConsumeIntInRange(0, len(_DOWN) - 1)
        shapes = _shapes(source)
        for ending, shape in zip((_DOWN[end], _UP[end], ".alpha"), shapes, strict=True):
            if source.ConsumeIntInRange(0, 15):
                dtype = _DTYPES[max(0, source.ConsumeIntInRange(-20, len(_DTYPES) - 1))]
                fill = drawn.one_of(
                    source, (0.5, 1.0, -2.0, 0.0, 60000.0, 1e38, 1e300, 1e-40, float("nan"), float("inf"))
                )
                state[name + ending] = torch.full(shape, fill, dtype=torch.float64).to(dtype)
    metadata = {}
    if source.ConsumeBool():
        metadata["lora_adapter_metadata"] = _metadata(source)
    if source.ConsumeBool():
        metadata["ss_tag_frequency"] = drawn.dumped(drawn.mutated(source, {"10_x": {"a cat": 3, "dog": 2}}))
    try:
        return save(state, {key: value.encode("utf-8", "replace").decode() for key, value in metadata.items()})
    except Exception as error:
        raise Refused from error


def _shapes(source: FuzzedDataProvider) -> tuple[tuple[int, ...], ...]:
    rank, inputs, outputs = (source.ConsumeIntInRange(0, 4) for _ in range(3))
    kernel = drawn.one_of(source, ((), (), (1, 1), (3, 3), (0, 3), (2,)))
    ones = (1,) * len(kernel)
    shapes = ((rank, inputs, *kernel), (outputs, rank, *ones), drawn.one_of(source, ((), (), (1,), (2,), (0,))))
    return shapes if source.ConsumeIntInRange(0, 7) else shapes[::-1]


def _config(source: FuzzedDataProvider) -> str:
    return drawn.dumped(drawn.mutated(source, _CONFIG)) if source.ConsumeIntInRange(0, 9) else drawn.text(source)


def _metadata(source: FuzzedDataProvider) -> str:
    flat = {f"{component}.{key}": value for component in ("unet", "text_encoder") for key, value in _CONFIG.items()}
    return drawn.dumped(drawn.mutated(source, flat)) if source.ConsumeIntInRange(0, 9) else drawn.text(source)


def seeds() -> list[bytes]:
    down, up = torch.full((2, 3), 0.5), torch.full((4, 2), 0.25)
    kohya = {"lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_up.weight": up}
    names = ("unet.mid_block.attentions.0.proj_in", "base_model.model.mid_block.attentions.0.proj_in")
    files_ = [{f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up} for name in names]
    raw = [save(state) for state in (kohya | {"lora_unet_conv_in.alpha": torch.tensor(2.0)}, *files_)]
    header = json.dumps({"a.lora_A.weight": {"dtype": "F32", "shape": [2**40, 0], "data_offsets": [0, 0]}}).encode()
    raw += [raw[0][:30], struct.pack("<Q", len(header)) + header, struct.pack("<Q", 2**63), b""]
    drawn_ = [
        bytes([form]) + bytes((7 * place + step) % 256 for place in range(300)) for form in (1, 2) for step in range(16)
    ]
    return [b"\0" + content for content in raw] + drawn_
