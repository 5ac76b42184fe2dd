"""Files of tensors that hold something else: refused by name, at once, and without running code."""

import zipfile

import pytest
import torch
from safetensors.torch import save_file

from rftcore.errors import UsageError
from rftcore.ops import measured
from rftcore.rewards import RewardSpecError, checkpoints
from rftcore.training.config import ModelConfig
from rftcore.training.models import single_file


def itself():
    held = {}
    held["state_dict"] = held
    return held


@pytest.mark.parametrize("held", [itself(), {1: torch.ones(2)}, {"state_dict": [1]}, {}, 3.5], ids=str)
def test_checkpoints_of_one_file(held, tmp_path):
    torch.save(held, tmp_path / "a.ckpt")
    with pytest.raises(UsageError, match="a.ckpt (is no checkpoint of a whole model|holds a)"):
        single_file.configs_name(tmp_path / "a.ckpt", ModelConfig())


def test_a_unet_of_other_dimensions(tmp_path):
    save_file({single_file._FIRST: torch.ones(3), single_file._LAST: torch.tensor(1.0)}, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="is no checkpoint of a whole model"):
        single_file.configs_name(tmp_path / "a.safetensors", ModelConfig())


@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"\x80\x02]q\x00(K", b"\x80\x02cos\nsystem\n(S'touch ran'\ntR.", b"(i\n.", b"\x80\x02\x8a\x0a"],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_pickles_of_anything(content, zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.ckpt", "a.pt"):
        if zipped:
            with zipfile.ZipFile(name, "w") as archive:
                archive.writestr("a/data.pkl", content)
                archive.writestr("a/version", "3\n")
        else:
            (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match="a.ckpt does not load as tensors alone"):
        single_file.configs_name(tmp_path / "a.ckpt", ModelConfig())
    with pytest.raises(RewardSpecError, match="it does not read as tensors"):
        checkpoints.tensors(tmp_path / "a.pt", "aesthetic", "head")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "value", [torch.ones(2).to_sparse(), torch.empty(2, device="meta"), [1]], ids=["sparse", "meta", "list"]
)
def test_tensors_without_values_of_their_own(value, tmp_path):
    torch.save({"a": value}, tmp_path / "a.pt")
    with pytest.raises(RewardSpecError, match="what it holds as a is no tensor of numbers"):
        checkpoints.tensors(tmp_path / "a.pt", "aesthetic", "head")


def test_one_bytes_floats_are_looked_at(tmp_path):
    save_file({"a": torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(RewardSpecError, match="a holds NaN"):
        checkpoints.tensors(tmp_path / "a.safetensors", "aesthetic", "head")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"winners": 3}', '{"winners": {"a": {"b": 3}}}', "[" * 5000,
                                  '{"winners": {"a": {"b": {"backend": "x", "config": {"k": 3}}}}}'])  # fmt: skip
def test_tables_of_winners_that_are_none(text, tmp_path):
    (tmp_path / "sm_90.json").write_text(text)
    with pytest.raises(ValueError, match="sm_90.json is no table of winners"):
        measured.read(tmp_path / "sm_90.json")
