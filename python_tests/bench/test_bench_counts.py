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


@pytest.mark.parametrize("work", ["train_step", "draft", "ddpo", "dpok"])
def test_gradients_of_ours_are_as_near_to_fp64_as_stocks(work):
    options = asked(work=work, warmup="none")
    exact = Tasks(options).truth(method("stock"))
    settled = Counter(options).settle(method("rftcore@least"), {})

    def error(name, settled=None):
        return float((gradients(options, name, settled) - exact).norm() / exact.norm())

    stock = error("stock")
    assert 1e-9 < stock < 1e-3
    assert error("rftcore@least", settled) <= 2 * stock
    blocks = "stock+steps+blocks" if work == "draft" else "stock+blocks"
    assert error(blocks) <= 2 * stock


def test_stocks_gradients_in_fp64_are_ours_in_fp64():
    options = asked(backprop_steps="1")
    exact = Tasks(options).truth(method("stock"))
    ours = Tasks(options).truth(Method("ours", sampler=True, score=True, unet="none", decoder="none"))
    assert (ours - exact).norm() < 1e-9 * exact.norm()


@pytest.mark.parametrize("name", ["stock+steps", "rftcore"])
def test_what_is_counted_without_data_is_what_a_run_takes(name, monkeypatch):
    options = asked()
    monkeypatch.setattr(counted, "SMALL", ())
    counter = Counter(options)
    settled = counter.settle(method(name), {}) if method(name).planned else None
    row = counter.count(method(name), settled)
    side = make_side(method(name), problem_for(method(name), options), 2, 2, settled)
    with PeakBytes() as live:
        side.run("draft")
    assert live.peak / 2**20 == pytest.approx(row["peak_mib"], rel=1e-3)


def test_ours_stays_within_the_bytes_it_was_given():
    options = asked(steps=4)
    counter = Counter(options)
    stock = {name: counter.count(method(name)) for name in ("stock", "stock+steps")}
    assert stock["stock+steps"]["peak_mib"] < stock["stock"]["peak_mib"] / 2
    assert stock["stock+steps"]["tflop"] > 1.2 * stock["stock"]["tflop"]
    ours = method("rftcore@stock+steps")
    settled = counter.settle(ours, stock)
    row = counter.count(ours, settled)
    assert settled.budget == int(stock["stock+steps"]["peak_mib"] * 2**20)
    assert row["peak_mib"] <= stock["stock+steps"]["peak_mib"] and row["tflop"] < stock["stock+steps"]["tflop"]
    assert "4 of 4 steps differentiated" in row["plan"]
    with pytest.raises(Impossible, match="too small"):
        counter.settle(method("rftcore@10kiB".replace("k", "K")), stock)


def test_what_a_loss_holds_is_counted_where_it_is_formed():
    counter = Counter(asked(work="train_step"))
    kept, again = (counter.count(method(name)) for name in ("stock", "stock+blocks"))
    assert again["saved_mib"] < 0.5 * kept["saved_mib"] and kept["saved_mib"] < kept["peak_mib"]
    ours = method("rftcore@stock+blocks")
    row = counter.count(ours, counter.settle(ours, {"stock+blocks": again}))
    assert row["saved_mib"] <= again["saved_mib"]


def test_a_warm_up_leaves_the_run_as_it_is():
    options = asked(steps=3, backprop_steps="2")
    settled = Counter(options).settle(method("rftcore"), {})
    cold = gradients(asked(steps=3, backprop_steps="2", warmup="none"), "rftcore", settled)
    torch.testing.assert_close(gradients(options, "rftcore", settled), cold, rtol=0, atol=0)
