"""Checkpoints whose files are not what was written, with checksums that fit: refused by name, and nothing is changed."""

import hashlib
import json
import shutil

import pytest
import torch
from torch import nn

from rftcore.errors import UsageError
from rftcore.sampling.plan import Plan
from rftcore.training import checkpoint, memory_plan
from rftcore.training.algorithm_configs import DraftConfig
from rftcore.training.parsing import to_yaml
from rftcore.training.run_directory import CONFIG, RunDirectory

CONFIGURED = DraftConfig()
SAVED = checkpoint.Progress(2, evaluations={0: {"digits": [0.5, 0.25]}})


class Stateless:
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def trained():
    unet = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(unet.parameters())
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return checkpoint.Trained(unet, optimizer, rate, Stateless())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return checkpoint.save(tmp_path_factory.mktemp("run"), trained(), SAVED, CONFIGURED)


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run" / saved.name)


def sign(folder):
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}
    sums.pop(checkpoint.MARK)
    (folder / checkpoint.MARK).write_text(json.dumps(sums))


def with_progress(folder, **changed):
    record = json.loads((folder / checkpoint.PROGRESS).read_text())
    record |= {name: value for name, value in changed.items() if name in record}
    if inner := {name: value for name, value in changed.items() if name not in record}:
        record["progress"] |= inner
    return json.dumps(record).encode()


def test_what_was_written_is_read(folder):
    sign(folder)
    assert checkpoint.load(folder, trained(), CONFIGURED) == SAVED


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("trainable.safetensors", b"x", "trainable.safetensors is damaged"),
        ("state.pt", b"", "state.pt is damaged"),
        ("state.pt", b"\x80\x02cos\nsystem\n(S'true'\ntR.", "state.pt is damaged"),
        ("progress.json", b"[" * 5000, "progress.json is damaged.*nested"),
        ("progress.json", {"config": []}, "progress.json has other contents"),
        ("progress.json", {"progress": 3}, "progress.json has other contents"),
        ("progress.json", {"step": "2"}, "progress.json is damaged"),
        ("progress.json", {"step": -1}, "progress.json is damaged .what it counts"),
        ("progress.json", {"counters": {"x": 1}}, "progress.json is damaged"),
        ("progress.json", {"evaluations": {"x": {}}}, "progress.json is damaged"),
        ("progress.json", {"evaluations": {"0": {"digits": 3}}}, "progress.json is damaged"),
        ("progress.json", {"evaluations": {"0": {"digits": ["x"]}}}, "progress.json is damaged .what it has of eval"),
        ("COMPLETE", b"{}", "COMPLETE is damaged .it has no SHA-256 of progress.json, state.pt, trainable.safetensors"),
        ("COMPLETE", b"[" * 5000, "COMPLETE is damaged"),
    ],
)
def test_files_of_others(name, content, message, folder):
    (folder / name).write_bytes(with_progress(folder, **content) if isinstance(content, dict) else content)
    if name != checkpoint.MARK:
        sign(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UsageError, match=message):
        checkpoint.load(folder, trained(), CONFIGURED)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_states_of_other_kinds(folder):
    states = torch.load(folder / checkpoint.STATE, weights_only=True)
    for name, other in (("optimizer", 3), ("optimizer", {"state": {}}), ("lr_scheduler", [1])):
        torch.save(states | {name: other}, folder / checkpoint.STATE)
        sign(folder)
        with pytest.raises(UsageError, match="state.pt is damaged"):
            checkpoint.load(folder, trained(), CONFIGURED)
    torch.save({}, folder / checkpoint.STATE)
    sign(folder)
    with pytest.raises(UsageError, match="state.pt is damaged"):
        checkpoint.load(folder, trained(), CONFIGURED)


@pytest.mark.parametrize("text", ["1: x\n", "- x\n", "[" * 3000, "seed: !!timestamp x\n", "a: &a [*a]\n", "\0"])
def test_a_begun_runs_config_that_is_none(text, tmp_path):
    (tmp_path / CONFIG).write_text(text)
    with pytest.raises(UsageError, match="config.yaml (is damaged|belongs to)"):
        checkpoint.only_begun(tmp_path, CONFIGURED)
    (tmp_path / CONFIG).write_text(to_yaml(CONFIGURED))
    assert checkpoint.only_begun(tmp_path, CONFIGURED)


def test_a_runs_plan_that_is_none(tmp_path):
    directory = RunDirectory(tmp_path)
    content = memory_plan.content(memory_plan.Memory(2**30, 0), Plan.replayed(("full",), 2), CONFIGURED)
    directory.write(memory_plan.NAME, content)
    assert memory_plan.load(directory, CONFIGURED) == memory_plan.Memory(2**30, 0)
    for memory in (
        {"budget": -1, "reserve": 0},
        {"budget": "x", "reserve": 0},
        {"budget": float("inf"), "reserve": 0},
        [],
    ):
        directory.write(memory_plan.NAME, content | {"memory": memory})
        with pytest.raises(UsageError, match="plan.json is damaged"):
            memory_plan.load(directory, CONFIGURED)
    directory.write(memory_plan.NAME, "[" * 5000)
    with pytest.raises(UsageError, match="plan.json is damaged"):
        memory_plan.load(directory, CONFIGURED)


def test_metrics_that_are_a_folder_are_none(tmp_path):
    (tmp_path / "checkpoint-1" / "metrics.jsonl").mkdir(parents=True)
    directory = RunDirectory(tmp_path)
    directory.rewind_metrics(tmp_path / "checkpoint-1")
    assert directory.metrics.read_text() == ""
