"""Tables of what was fastest decide on a GPU; without an entry, the order that is written down."""

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rftcore.ops import jit, measured
from rftcore.ops.backends import OPS, Op


def op_of(order, refusing=()):
    reasons = {name: lambda x, name=name: ["it refuses"] if name in refusing else [] for name in order}
    return Op("test_op", reasons, lambda device, dtype: (), lambda x: f"{x.dtype} {measured.bucket(x.shape[0])}")


@pytest.fixture
def on_gpu(monkeypatch, tmp_path):
    """A fake tensor of 5 rows on a GPU, and the table's row for it."""
    path = tmp_path / "sm_90.json"
    won = {"backend": "second", "config": {"geglu.Config": {"rows": 1, "columns": 512, "num_warps": 8}}}
    path.write_text(json.dumps({"winners": {"test_op": {"torch.float16 8": won}}}))
    monkeypatch.setattr(measured, "table", lambda architecture: measured.read(path))
    with FakeTensorMode():
        yield torch.empty(5, dtype=torch.float16, device="cuda")


def test_the_winner_comes_first(on_gpu):
    assert op_of(["first", "second"]).choose("auto", on_gpu) == "second"


def test_a_winner_that_cannot_serve_is_passed_over(on_gpu):
    assert op_of(["first", "second"], refusing=["second"]).choose("auto", on_gpu) == "first"


def test_an_explicit_request_is_not_overruled(on_gpu):
    assert op_of(["first", "second"]).choose("first", on_gpu) == "first"


def test_without_an_entry_the_order_decides(on_gpu):
    assert op_of(["first", "second"]).choose("auto", on_gpu.new_empty(9)) == "first"
    assert op_of(["first", "second"]).choose("auto", torch.empty(5, dtype=torch.float16)) == "first"


def test_a_table_is_of_its_gpu_alone(on_gpu):
    assert measured.winner("test_op", "torch.float16 8", on_gpu.device).backend == "second"
    assert all(measured.winner("test_op", "torch.float16 8", torch.device(name)) is None for name in ("cpu", "meta"))


def test_tile_sizes_come_with_the_winner_or_are_being_tried(on_gpu):
    won = op_of(["first", "second"]).winner(on_gpu)
    assert jit.config("geglu.Config", won) == jit.kernels("geglu").Config(1, 512, 8)
    assert jit.config("geglu.Config", None) is None
    with measured.trying("geglu.Config", {"rows": 2, "columns": 256, "num_warps": 4}):
        assert jit.config("geglu.Config", won).rows == 2
    assert jit.config("geglu.Config", won).rows == 1


def test_counts_share_a_row_up_to_the_next_power_of_two():
    assert [measured.bucket(n) for n in (0, 1, 2, 3, 4, 5, 8192)] == [1, 1, 2, 4, 4, 8, 8192]


def test_committed_tables_name_ops_and_backends_that_exist():
    for path in measured._TABLES.glob("*.json"):
        for name, rows in measured.read(path).items():
            for won in rows.values():
                assert won.backend in OPS[name].not_supported_reasons
                for kernel, sizes in won.config.items():
                    jit.config(kernel, measured.Winner("triton", {kernel: sizes}))


def test_the_table_of_an_architecture_is_its_file(monkeypatch, tmp_path):
    monkeypatch.setattr(measured, "_TABLES", tmp_path)
    rows = {"op": {"key": {"backend": "fast"}, "other": {"backend": "slow", "config": {"kernel": {"rows": 2}}}}}
    (tmp_path / "sm_test.json").write_text(json.dumps({"winners": rows}))
    found = measured.table.__wrapped__("sm_test")
    assert found == {"op": {"key": ("fast", {}), "other": ("slow", {"kernel": {"rows": 2}})}}
    assert measured.table.__wrapped__("sm_without_a_file") == {}


def test_on_a_cpu_nothing_was_measured():
    assert measured.winner("geglu", "any", torch.device("cpu")) is None
    if not torch.cuda.is_available():
        assert measured.architecture(torch.device("cuda")) == "unknown"


def test_who_listens_hears_which_kernels_were_asked_for():
    with measured.asked() as outer:
        measured.tile_sizes("first", None)
        with measured.asked() as inner:
            assert measured.tile_sizes("second", measured.Winner("b", {"second": {"rows": 4}})) == {"rows": 4}
        measured.tile_sizes("third", None)
    measured.tile_sizes("fourth", None)
    assert (outer, inner) == ({"first", "second", "third"}, {"second"})


@pytest.mark.parametrize(
    ("available", "hip", "name"), [(True, None, "sm_90"), (True, "6.0", "unknown"), (False, None, "unknown")]
)
def test_architectures_are_of_nvidias_gpus(monkeypatch, available, hip, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", hip)
    assert measured.architecture.__wrapped__(torch.device("cuda")) == name
