"""Files of tensors, safe and pickled: models that are one file, and what rewards load."""

from __future__ import annotations

import contextlib
import io
import pickle
import zipfile
from pathlib import Path

import torch
from atheris import FuzzedDataProvider
from safetensors.torch import save

from fuzz import drawn
from fuzz.guard import Refused, demand, tried
from rftcore.errors import UsageError
from rftcore.rewards import RewardSpecError, checkpoints
from rftcore.training.config import ModelConfig
from rftcore.training.models import single_file

_KEYS = (
    single_file._FIRST, single_file._LAST, "first_stage_model.x", "conditioner.embedders.1.x", "cond_stage_model.model.x",
    "cond_stage_model.transformer.x", "conditioner.embedders.0.model.x", "joint_blocks.0", "x.double_blocks.1", "v_pred",
    "conv_in.weight", "down_blocks.0", "decoder.x", "state_dict", "lora_a", "a", "",
)  # fmt: skip


class _Code:
    """What a pickle that runs code holds."""

    def __reduce__(self):
        import os

        return os.system, ("true",)


def check(data: bytes, folder: Path) -> None:
    source = FuzzedDataProvider(data[1:])
    form = data[0] if data else 0
    suffix = (".safetensors", ".pt", ".pt")[form % 3]
    content = data[1:] if form % 2 else _made(source, suffix)
    if suffix == ".pt" and form % 5 == 0:
        content = _zipped(content)
    (folder / f"a{suffix}").write_bytes(content)
    checkpoint = folder / f"a{'.ckpt' if suffix == '.pt' else suffix}"
    checkpoint.write_bytes(content)
    with contextlib.suppress(Refused):
        tried((UsageError,), single_file.configs_name, checkpoint, ModelConfig(original_config=str(folder)))
    found = tried((RewardSpecError,), checkpoints.tensors, folder / f"a{suffix}", "aesthetic", "weights")
    demand(bool(found) and all(isinstance(value, torch.Tensor) for value in found.values()), "no tensors")


def _made(source: FuzzedDataProvider, suffix: str) -> bytes:
    state = {}
    for _ in range(source.ConsumeIntInRange(0, 4)):
        dtype = drawn.one_of(source, (torch.float32, torch.float16, torch.int8, torch.float8_e5m2, torch.bool))
        shape = [source.ConsumeIntInRange(0, 3) for _ in range(source.ConsumeIntInRange(0, 4))]
        state[drawn.one_of(source, _KEYS)] = torch.full(shape, drawn.one_of(source, (1.0, 0.0, float("nan")))).to(dtype)
    if suffix == ".safetensors":
        return save(state)
    kind, held = source.ConsumeIntInRange(0, 9), state
    if kind == 1:
        held = {"state_dict": state, "epoch": drawn.value(source, 1)}
    elif kind == 2:
        held = {"state_dict": {}}
        held["state_dict"]["state_dict"] = held
    elif kind == 3:
        held = drawn.value(source, 2)
    elif kind == 4:
        held = {source.ConsumeIntInRange(0, 9): torch.ones(2), "a": [torch.ones(1)]}
    elif kind == 5:
        held = {"a": torch.ones(2).to_sparse(), "b": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}
    elif kind == 6:
        held = {"a": torch.empty(2, device="meta")}
    buffer = io.BytesIO()
    try:
        torch.save(held, buffer, _use_new_zipfile_serialization=source.ConsumeBool())
    except Exception as error:
        raise Refused from error
    return buffer.getvalue()


def _zipped(content: bytes) -> bytes:
    """A pickle in the archive that torch writes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/byteorder", "little")
        archive.writestr("a/version", "3\n")
        archive.writestr("a/data/0", b"\0" * 64)
    return buffer.getvalue()


def seeds() -> list[bytes]:
    found = []
    for held in ({"a": torch.ones(2, 3)}, {"state_dict": {single_file._FIRST: torch.ones(1, 4)}}, {"a": 1}, [1], 3.5):
        for new in (True, False):
            buffer = io.BytesIO()
            torch.save(held, buffer, _use_new_zipfile_serialization=new)
            found.append(b"\x01" + buffer.getvalue())
            if new:
                with zipfile.ZipFile(buffer) as archive:
                    name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                    found.append(b"\x05" + archive.read(name))
    found += [b"\x05" + pickle.dumps(held, protocol=2) for held in ({}, {"a": None}, _Code(), [[]], {1: 2})]
    found += [b"\x01" + pickle.dumps(_Code(), protocol=2), b"\x03" + save({"a": torch.ones(2)}), b"\x03", b"\x01"]
    return found + [bytes([form]) + bytes((19 * k * form + k) % 256 for k in range(80)) for form in range(0, 60, 2)]
