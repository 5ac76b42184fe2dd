"""The GPU's benchmark and its table of winners are made, here of tiny shapes: what it measures needs a GPU."""

import json
import sys

import pytest
import torch

from benchmarks import gpu, tune
from benchmarks.clock import Taken
from rftcore.ops import jit, measured


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run(program, *arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark", "--device", "cpu", "--small", "--repeats", "1", *arguments])
        program.main()

    return run


def test_every_op_is_timed_against_its_floor(run, tmp_path):
    out = tmp_path / "gpu.json"
    run(gpu, "--dtype", "fp32", "--no-compile", "--out", str(out))
    content = json.loads(out.read_text())
    assert not [row for row in content["ops"] + content["models"] if "error" in row]
    ops = {row["op"] for row in content["ops"]}
    assert ops == {"group_norm_silu", "geglu", "sampler_step", "lora_linear", "gated_linear", "attention"}
    for op in ops:
        candidates = {row["candidate"] for row in content["ops"] if row["op"] == op}
        assert {"stock", "copy of as many bytes"} < candidates
    assert all(row["us"] > 0 and row["of_floor"] > 0 for row in content["ops"])
    assert {row["model"] for row in content["models"]} == {"SD1.5 UNet", "VAE decoder"}


def test_what_has_no_time_left_says_so(run, tmp_path):
    out = tmp_path / "gpu.json"
    run(gpu, "--part", "ops", "--seconds", "0", "--no-compile", "--out", str(out))
    assert {row["error"] for row in json.loads(out.read_text())["ops"] if "us" not in row} == {"no time left"}


def test_the_table_of_winners_can_be_read(run, tmp_path):
    run(tune, "--only", "geglu", "--out", str(tmp_path))
    key = "torch.float16 8 x 64"
    won = measured.read(tmp_path / "cpu.json")["geglu"][key].backend
    times = json.loads((tmp_path / "cpu.json").read_text())["winners"]["geglu"][key]["us"]
    assert times.keys() == {"cpu", "triton", "torch"} and times[won] == min(times.values())


def test_the_table_of_winners_names_every_op(run, tmp_path, monkeypatch):
    """Each under a key of its own shape and dtype; nothing is timed."""
    monkeypatch.setattr(tune, "trials", lambda workload, *others: [tune.Trial("cpu", 1e-6)])
    run(tune, "--out", str(tmp_path))
    winners = measured.read(tmp_path / "cpu.json")
    counts = {op: len(entries) for op, entries in winners.items()}
    assert counts == dict.fromkeys(("group_norm_silu", "geglu", "gated_linear"), 2) | {"lora_linear": 4, "attention": 4}


def test_candidates_are_tile_sizes_of_kernels_that_exist():
    for name, candidates in tune.CANDIDATES.items():
        for sizes in candidates:
            assert jit.config(name, measured.Winner("triton", {name: sizes})) is not None


def test_the_fastest_tile_sizes_are_kept(monkeypatch):
    """The time of a launch is what its tile sizes say."""
    monkeypatch.setattr(tune, "passes", lambda function, sets: ([lambda: function(sets[0])], []))
    monkeypatch.setattr(tune.clock, "time_of", lambda calls, *others: Taken(calls[0]() if calls else 0.0, False))
    monkeypatch.setitem(tune.CANDIDATES, "a.Config", [{"rows": 3}, {"rows": 1}, {"rows": 2}])
    monkeypatch.setitem(tune.CANDIDATES, "b.Config", [{"rows": 9}, {"rows": 8}])

    class Workload:
        op, shape = "geglu", ""
        inputs = list
        backends = staticmethod(lambda inputs: ["cpu", "triton"])

        @staticmethod
        def ours(tensors, backend):
            sizes = [measured.tile_sizes(name, None) or {"rows": 4} for name in ("a.Config", "b.Config")]
            return 50 if backend == "cpu" else sum(size["rows"] for size in sizes)

    found = list(tune.trials(Workload, torch.device("cpu"), 1, float("inf")))
    row = tune.entry(found)
    assert row["backend"] == "triton" and row["config"] == {"a.Config": {"rows": 1}}
    assert row["us"] == {"cpu": 50e6, "triton": 5e6}
