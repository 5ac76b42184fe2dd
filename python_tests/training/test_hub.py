"""What a run uploads, what it never uploads, and that no failure of the hub costs a run."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from huggingface_hub.utils import filter_repo_objects

from rftcore.training import Trainer, UsageError, hub


class FakeApi:
    """The hub, as far as a run sees it."""

    role, fails, uploads = "write", None, []

    def __init__(self, token=None):
        self.token = token

    def whoami(self):
        if self.fails == "whoami":
            raise ConnectionError("no route to host\nat all")
        return {"name": "somebody", "auth": {"accessToken": {"role": self.role}}}

    def create_repo(self, repo_id, exist_ok):
        assert exist_ok
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"somebody/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        if self.fails == "upload":
            raise ConnectionError("no route to host\nat all")
        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        self.uploads.append((repo_id, sorted(filter_repo_objects(files, allow_patterns=allow_patterns))))


@pytest.fixture
def api(monkeypatch):
    kind = type("Api", (FakeApi,), {"uploads": []})
    monkeypatch.setattr(hub, "HfApi", kind)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_secret")
    return kind


def config(model, folder, **groups):
    return tiny.config(model, folder, push_to_hub=True, train={"max_train_steps": 1}, **groups)


def test_result_is_uploaded_without_checkpoints(model, tmp_path, api, capsys):
    folder = tmp_path / "bright-digits"
    Trainer(config(model, folder)).train()
    assert (folder / "checkpoint-1" / "pytorch_lora_weights.safetensors").exists()
    ((repository, files),) = api.uploads
    assert repository == "somebody/bright-digits"
    wanted = {"README.md", "config.yaml", "results.json", "pytorch_lora_weights.safetensors", "before_after.png"}
    assert wanted | {"samples/step-000000.png", "samples/step-000001.png"} <= {*files}
    assert not [name for name in files if "checkpoint" in name or name.startswith(("logs", "env"))]
    assert "uploaded to https://huggingface.co/somebody/bright-digits" in capsys.readouterr().out
    assert "hf_secret" not in "".join(
        path.read_text() for path in folder.glob("*.*") if path.suffix != ".png" and path.suffix != ".safetensors"
    )


def test_whole_unets_are_uploaded_from_the_top_alone():
    files = ["unet/config.json", "checkpoint-2/unet/config.json", "best/pytorch_lora_weights.safetensors", "plan.json"]
    assert [*filter_repo_objects(files, allow_patterns=hub.UPLOADED)] == [files[0], files[2]]


def test_failed_upload_leaves_everything_and_says_how(model, tmp_path, api, capsys):
    api.fails = "upload"
    folder = tmp_path / "run"
    results = Trainer(config(model, folder, hub_model_id="team/name")).train()
    assert json.loads((folder / "results.json").read_text()) == results
    out = capsys.readouterr().out
    assert "not uploaded to the hub (ConnectionError: no route to host); everything is in" in out
    assert f"hf upload team/name {folder} . --include 'README.md' --include" in out and "at all" not in out


@pytest.mark.parametrize(
    ("name", "token", "role", "fails", "message"),
    [
        (None, None, "write", None, "there is none: run `hf auth login`, or set HF_TOKEN"),
        (None, "hf_secret", "read", None, "token may only read"),
        (None, "hf_secret", "write", "whoami", "cannot be reached .ConnectionError: no route to host.*hf upload run"),
        ("a/b/c", "hf_secret", "write", None, "hub_model_id='a/b/c': .*give user/name"),
    ],
)
def test_hopeless_uploads_are_refused_before_training(
    model, tmp_path, api, monkeypatch, name, token, role, fails, message
):
    api.role, api.fails = role, fails
    monkeypatch.setattr(hub, "get_token", lambda: token)
    with pytest.raises(UsageError, match=message):
        Trainer(config("not/loaded", tmp_path / "run", hub_model_id=name))
    assert not (tmp_path / "run").exists()


def test_without_push_the_hub_is_not_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "get_token", lambda: pytest.fail("asked for a token"))
    hub.check(tiny.config("not/loaded", tmp_path / "run"))
