"""Columns of the rows: gradients against fp64, bytes against a real run, plans against their budgets."""

import pytest
import torch

from rftcore.bench import counted
from rftcore.bench.counted import Counter, Impossible, problem_for
from rftcore.bench.methods import Method, method
from rftcore.bench.sides import make_side
from rftcore.bench.worker import Tasks
from rftcore.commands.bench_options import BenchOptions
from rftcore.counting import PeakBytes


def asked(**options):
    return BenchOptions(**{"model": "tiny", "work": "draft", "steps": 2, "device": "cpu", **options})


def gradients(options, name, settled=None):
    tasks = Tasks(options)
    tasks.prepare(method(name), settled)
    return tasks.gradients()


@pytest.fixture(scope="module")
def drafts():
    """A counter that has planned chains already: that is what takes its time."""
    return Counter(asked())


@pytest.mark.parametrize(
    "work", ["draft", "ddpo", *(pytest.param(each, marks=pytest.mark.slow) for each in ("train_step", "dpok"))]
)
def test_gradients_of_ours_are_as_near_to_fp64_as_stocks(work, drafts):
    options = asked(work=work, warmup="none")
    exact = Tasks(options).truth(method("stock"))
    ours, counter = ("rftcore@stock+steps", drafts) if work == "draft" else ("rftcore@least", Counter(options))
    settled = counter.settle(method(ours), {"stock+steps": drafts.count(method("stock+steps"))})

    def error(name, settled=None):
        return float((gradients(options, name, settled) - exact).norm() / exact.norm())

    stock = error("stock")
    assert 1e-9 < stock < 1e-3
    assert error(ours, settled) <= 2 * stock
    if work in ("train_step", "draft"):
        assert error("stock+steps+blocks" if work == "draft" else "stock+blocks") <= 2 * stock


def test_stocks_gradients_in_fp64_are_ours_in_fp64():
    options = asked(backprop_steps="1")
    exact = Tasks(options).truth(method("stock"))
    ours = Tasks(options).truth(Method("ours", sampler=True, score=True, replayed=True, unet="none", decoder="none"))
    assert (ours - exact).norm() < 1e-9 * exact.norm()


@pytest.mark.parametrize("name", [pytest.param("stock+steps", marks=pytest.mark.slow), "rftcore"])
def test_what_is_counted_without_data_is_what_a_run_takes(name, drafts, monkeypatch):
    options = asked()
    settled = drafts.settle(method(name), {}) if method(name).planned else None
    side = make_side(method(name), problem_for(method(name), options), 2, 2, settled)
    with PeakBytes() as live:
        side.run("draft")
    monkeypatch.setattr(counted, "SMALL", ())
    row = Counter(options).count(method(name), settled)
    assert live.peak / 2**20 == pytest.approx(row["peak_mib"], rel=1e-3)
    assert row["peak_mib"] == pytest.approx(drafts.count(method(name), settled)["peak_mib"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stock", "rftcore"])
def test_a_policys_epoch_is_counted_without_data_too(name, monkeypatch):
    rows = []
    for with_data in (counted.SMALL, ()):
        monkeypatch.setattr(counted, "SMALL", with_data)
        counter = Counter(asked(work="dpok"))
        settled = counter.settle(method(name), {}) if method(name).planned else None
        rows.append(counter.count(method(name), settled))
    assert rows[0] == pytest.approx(rows[1], rel=1e-3)


def test_ours_stays_within_the_bytes_it_was_given(drafts):
    stock = {name: drafts.count(method(name)) for name in ("stock", "stock+steps")}
    assert stock["stock+steps"]["peak_mib"] < 0.75 * stock["stock"]["peak_mib"]
    assert stock["stock+steps"]["tflop"] > 1.2 * stock["stock"]["tflop"]
    ours = method("rftcore@stock+steps")
    settled = drafts.settle(ours, stock)
    row = drafts.count(ours, settled)
    assert settled.budget == int(stock["stock+steps"]["peak_mib"] * 2**20)
    assert row["peak_mib"] <= stock["stock+steps"]["peak_mib"] and row["tflop"] < stock["stock+steps"]["tflop"]
    assert "2 of 2 steps differentiated" in row["plan"]
    with pytest.raises(Impossible, match="too small"):
        drafts.settle(method("rftcore@10KiB"), stock)


def test_what_a_loss_holds_is_counted_where_it_is_formed():
    counter = Counter(asked(work="train_step"))
    kept, again = (counter.count(method(name)) for name in ("stock", "stock+blocks"))
    assert again["saved_mib"] < 0.5 * kept["saved_mib"] and kept["saved_mib"] < kept["peak_mib"]
    ours = method("rftcore@stock+blocks")
    row = counter.count(ours, counter.settle(ours, {"stock+blocks": again}))
    assert row["saved_mib"] <= again["saved_mib"]


def test_a_warm_up_leaves_the_run_as_it_is(drafts):
    settled = drafts.settle(method("rftcore"), {})
    cold, warm = (gradients(asked(warmup=warmup), "rftcore", settled) for warmup in ("none", "short"))
    torch.testing.assert_close(warm, cold, rtol=0, atol=0)
