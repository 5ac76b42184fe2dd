"""Models, tokenizers and files: what loads, and what is said of what does not."""

import copy
import json
import pickle
import shutil

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from tiny_rewards import save_clip
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from rftcore.rewards import RewardSpecError, checkpoints, towers


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return folder, save_clip(folder)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def load(kind, place, **settings):
    return checkpoints.load(kind, "clip_score", "model", place, **settings)


def tensors(path):
    return checkpoints.tensors(path, "aesthetic", "head")


def test_models_and_tokenizers_of_a_folder(clip):
    folder, model = clip
    loaded = load(CLIPModel, folder)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
    assert load(CLIPModel, folder, dtype=torch.bfloat16).logit_scale.dtype is torch.bfloat16
    assert torch.equal(
        load(CLIPVisionModelWithProjection, folder).visual_projection.weight, model.visual_projection.weight
    )
    assert load(CLIPTokenizer, folder)("ab")["input_ids"] == [80, 0, 41, 81]


def test_half_precision_on_disk_comes_in_fp32(clip, tmp_path):
    copy.deepcopy(clip[1]).half().save_pretrained(tmp_path)
    assert load(CLIPModel, tmp_path).logit_scale.dtype is torch.float32


def test_a_model_that_lacks_weights_is_refused(clip, tmp_path):
    folder, model = clip
    kept = {name: t.contiguous() for name, t in model.state_dict().items() if not name.startswith("text_")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(RewardSpecError, match="no CLIPModel: it lacks the weights text_.* and 3[0-9] more"):
        load(CLIPModel, tmp_path)
    assert load(CLIPModel, tmp_path, unused=("text_model", "text_projection"))


def test_a_model_of_other_shapes_is_refused(clip, tmp_path):
    folder, _ = clip
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text((folder / "config.json").read_text().replace("80", "88"))
    with pytest.raises(RewardSpecError, match="other shapes than its config.json says have .*mlp.fc1"):
        load(CLIPModel, tmp_path)


def test_a_model_of_nan_is_refused(clip, tmp_path):
    broken = copy.deepcopy(clip[1])
    broken.visual_projection.weight.data[0, 0] = torch.nan
    broken.save_pretrained(tmp_path)
    with pytest.raises(RewardSpecError, match="visual_projection.weight holds NaN"):
        load(CLIPModel, tmp_path)


@pytest.mark.parametrize("kind", [CLIPModel, CLIPTokenizer])
def test_without_network_it_says_what_to_fetch_and_where_to_put_it(kind, offline):
    with pytest.raises(RewardSpecError, match="(?s)'clip_score'.*model='openai/no-such-model'.*cannot be reached") as e:
        load(kind, "openai/no-such-model", revision="v2")
    assert "`hf download openai/no-such-model --revision v2 --local-dir FOLDER`" in str(e.value)
    assert "`reward.options: {clip_score: {model: FOLDER}}`" in str(e.value)


@pytest.mark.parametrize("kind", [CLIPModel, CLIPTokenizer])
def test_places_that_hold_nothing(kind, tmp_path):
    with pytest.raises(RewardSpecError, match="model='.*': (no CLIPModel came|the folder holds no tokenizer.json)"):
        load(kind, tmp_path)
    with pytest.raises(RewardSpecError, match="there is no such f"):
        load(kind, tmp_path / "away")
    with pytest.raises(RewardSpecError, match="there is no such f"):
        load(kind, tmp_path / ("x" * 300))


def test_a_file_by_itself_by_folder_and_from_the_hub(tmp_path, offline):
    def file(place, *names):
        return checkpoints.file("aesthetic", "head", place, *names)

    wanted = tmp_path / "b.pth"
    wanted.touch()
    assert file(wanted, "any") == wanted
    assert file(tmp_path, "a.safetensors", "b.pth") == wanted
    with pytest.raises(RewardSpecError, match="holds no a.safetensors or c.pth"):
        file(tmp_path, "a.safetensors", "c.pth")
    with pytest.raises(RewardSpecError, match="no such file or folder; set `reward.options: {aesthetic: {head: FOLDER"):
        file("/away/b.pth", "b.pth")
    with pytest.raises(RewardSpecError, match="hf download owner/name --local-dir"):
        file("owner/name", "b.pth")


@pytest.mark.parametrize("reachable", [True, False])
def test_the_hub_is_asked_for_each_name_in_turn(reachable, monkeypatch, tmp_path):
    """Without network its cache is, which may hold one of them alone."""
    kind = huggingface_hub.errors.EntryNotFoundError if reachable else huggingface_hub.errors.LocalEntryNotFoundError
    asked = []

    def download(repository, name, revision=None):
        asked.append((repository, name, revision))
        if name == "first.safetensors":
            raise kind("not there")
        return str(tmp_path / name)

    monkeypatch.setattr(checkpoints, "hf_hub_download", download)
    found = checkpoints.file("aesthetic", "head", "owner/name", "first.safetensors", "second.pt", revision="r")
    assert found == tmp_path / "second.pt"
    assert asked == [("owner/name", "first.safetensors", "r"), ("owner/name", "second.pt", "r")]


def test_tensors_of_every_kind_of_file(tmp_path):
    wanted = {"a.weight": torch.randn(2, 3), "n": torch.tensor(3)}
    save_file(wanted, tmp_path / "w.safetensors")
    torch.save(wanted, tmp_path / "w.pth")
    torch.save({"state_dict": wanted, "epoch": 3}, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pth", "w.pt"):
        found = tensors(tmp_path / name)
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


class Exploit:
    def __reduce__(self):
        return pytest.fail, ("the file's code ran",)


def test_files_that_are_refused(tmp_path):
    (tmp_path / "code.pt").write_bytes(pickle.dumps({"w": Exploit()}, protocol=2))
    torch.save({"w": Exploit()}, tmp_path / "code_in_a_zip.bin")
    (tmp_path / "text.safetensors").write_text("not one")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "model.ckpt").touch()
    torch.save(torch.ones(2), tmp_path / "one.pt")
    torch.save({"w": torch.ones(2), "epoch": 3}, tmp_path / "mixed.pt")
    torch.save({"w": torch.tensor([1.0, torch.nan]), "v": torch.tensor([torch.inf])}, tmp_path / "nan.pt")
    for name, message in {
        "code.pt": "does not read as tensors.*save_file",
        "code_in_a_zip.bin": "does not read as tensors",
        "text.safetensors": "does not read as tensors",
        "empty.pt": "does not read as tensors",
        "model.ckpt": "those end in .safetensors, .bin, .pt, .pth",
        "one.pt": "holds a Tensor",
        "mixed.pt": "epoch is no tensor",
        "nan.pt": "w, v holds NaN or inf",
    }.items():
        with pytest.raises(RewardSpecError, match=f"reward 'aesthetic' cannot load head='.*{name}': .*{message}"):
            tensors(tmp_path / name)


def test_configs_that_are_none(clip, tmp_path):
    folder, _ = clip
    whole = json.loads((folder / "config.json").read_text())
    shutil.copytree(folder, tmp_path / "clip")
    for content in ("[]", json.dumps(whole)[:200], json.dumps({**whole, "projection_dim": "24"})):
        (tmp_path / "clip" / "config.json").write_text(content)
        with pytest.raises(RewardSpecError, match="no CLIPModel came from it"):
            load(CLIPModel, tmp_path / "clip")


def test_pickled_weights_that_hold_code_say_what_to_do(clip, tmp_path):
    folder, _ = clip
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save({"w": Exploit()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(RewardSpecError, match="hold more than tensors.*weights_only=False.*save_file"):
        load(CLIPModel, tmp_path)


@pytest.mark.parametrize("kind", [AutoConfig, AutoTokenizer, AutoModel, AutoProcessor])
def test_a_repositorys_own_code_is_neither_run_nor_offered(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked whether to run the code"))
    (tmp_path / "own.py").write_text("raise SystemExit('the code ran')")
    names = {
        name: ["own.Own", None] if name == "AutoTokenizer" else "own.Own" for name in (kind.__name__, "AutoConfig")
    }
    for file in ("config.json", "tokenizer_config.json", "processor_config.json"):
        (tmp_path / file).write_text(json.dumps({"model_type": "own", "auto_map": names}))
    (tmp_path / "vocab.txt").touch()
    with pytest.raises(RewardSpecError, match=f"no {kind.__name__} came from it .*custom code"):
        load(kind, tmp_path)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 64), nn.GELU(), nn.Linear(64, 4)) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_checkpointed_layers_keep_their_inputs_alone_and_change_nothing():
    from rftcore.counting import saved_bytes

    stock = towers.freeze(Stack())
    assert not stock.training and not any(p.requires_grad for p in stock.parameters())
    ours = copy.deepcopy(stock)
    towers.checkpoint_layers(ours.layers)
    assert list(ours.state_dict()) == list(stock.state_dict())
    x = torch.randn(5, 4, requires_grad=True)
    gradients, kept = [], []
    copied = copy.deepcopy(ours)
    for model in (stock, ours, copied, pickle.loads(pickle.dumps(ours))):
        with saved_bytes(model.parameters()) as count:
            y = model(x)
        kept.append(count["bytes"])
        gradients.append(torch.autograd.grad(y.square().sum(), x)[0])
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    assert kept[1] == kept[2] == kept[3] < kept[0] / 4
    # A copy is its own: the layers that it computes again are not the first one's.
    copied.layers[0][0].weight.data.zero_()
    assert torch.equal(torch.autograd.grad(ours(x).square().sum(), x)[0], gradients[0])
    with torch.no_grad():
        assert torch.equal(ours(x), stock(x))
