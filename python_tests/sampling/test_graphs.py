"""Segments of chains, run, captured and launched by an emulation of captured graphs: the same numbers, bit for bit."""

import pytest
import torch
from models import UNETS
from recorded import CaptureError, RecordedGraphs
from torch import nn
from toy_chains import REPLAYED, STEPS, STORED, assert_equal, assert_lives, inputs, mlp, none, plainly, train, unet

from rftcore.sampling.graphs import Run, Segments


def test_three_lives():
    """Of the first chain only the repeated step is captured, of the second each segment once; then Python rests."""
    toy, segments = mlp(), Segments(RecordedGraphs())
    sampled = STEPS - STORED
    calls = segments.recorder.calls
    for expected in (
        [
            "warm up",
            "prepare",
            *["capture", "launch"],
            *["launch"] * (sampled - 2),
            *["warm up"] * (2 * STORED + REPLAYED),
        ],
        [*["launch"] * sampled, "prepare", *["capture", "launch"] * (2 * STORED + 1), *["launch"] * (REPLAYED - 1)],
        ["launch"] * (STEPS + STORED + REPLAYED),
        ["launch"] * (STEPS + STORED + REPLAYED),
    ):
        x = inputs(toy)
        truth = plainly(toy, x)
        before, toy.work = len(calls), 0
        found = toy(segments.begin(), x)
        assert_equal(found, truth)
        assert calls[before:] == expected
        assert toy.work == expected.count("warm up") + expected.count("capture")
        train(toy)
    assert segments.captured == 2 + 2 * STORED


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[] if kind == "sd1" else pytest.mark.slow) for kind in UNETS]
)
def test_an_accelerated_unet(kind):
    toy, _ = unet(kind)
    assert_lives(toy, Segments(RecordedGraphs()), 3)


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        *(pytest.param(each, marks=pytest.mark.slow) for each in ({"accelerated": False}, {"recompute": "block"})),
    ],
    ids=str,
)
def test_a_unet_otherwise(options):
    toy, _ = unet(**options)
    assert_lives(toy, Segments(RecordedGraphs()), 3)


@pytest.mark.parametrize("accelerated", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_casts_that_autocast_keeps_are_none_of_a_segment(accelerated):
    """Each chain under one autocast, whose cache would hand the casts made while warming up to what is captured."""
    toy, segments = unet(accelerated=accelerated)[0], Segments(RecordedGraphs())
    for _ in range(3):
        x = inputs(toy)
        with torch.autocast("cpu", torch.bfloat16):
            found = toy(segments.begin(), x)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            expected = plainly(toy, x)
        assert_equal(found, expected)
        train(toy)


def test_what_a_capture_has_built_in_is_launched_on():
    """The emulation shows it: a scale that is changed under the same key."""
    toy, model = unet()
    segments = Segments(RecordedGraphs())
    assert_lives(toy, segments, 3)
    for layer in model.modules():
        if hasattr(layer, "scaling"):
            layer.scaling = {name: 2 * scale for name, scale in layer.scaling.items()}
    x = inputs(toy)
    stale = toy(segments.begin(), x)
    assert not torch.equal(stale[0], plainly(toy, x)[0])


@pytest.mark.parametrize("alive", [True, False])
def test_what_is_not_static_is_not_read_again(alive):
    """The emulation shows it: the tensor of the chain that was captured is read, or nothing that is there."""
    segments, inputs = Segments(RecordedGraphs()), []

    def chain(x):
        run = segments.begin()
        total = run.keep("total", lambda: torch.empty(()))
        run.run("sum", lambda: none(total.copy_(x.sum())))
        run.finish()
        return total

    for _ in range(2):
        x = torch.randn(4)
        assert torch.equal(chain(x), x.sum())
        inputs += [x] if alive else []
    del x
    if alive:
        assert torch.equal(chain(torch.randn(4)), inputs[1].sum())
    else:
        with pytest.raises(CaptureError, match="a tensor that is gone"):
            chain(torch.randn(4))


def test_addresses_may_change_hands_only_in_order():
    """A repeated segment is captured again after one that left something; without that it would write over it."""

    def chain(run):
        x = run.keep("x", lambda: torch.arange(64.0))
        y = run.keep("y", lambda: torch.empty(64))
        found = []
        for i in range(2):
            run.run("a", lambda: none(y.copy_((x + 1).mul(2).add(3))))
            found.append(run.run(("b", i), lambda: y * 2))
        run.run("c", lambda: none(y.copy_(found[0] + found[1])))
        run.finish()
        return y.clone()

    expected = chain(Run(None, None))
    segments = Segments(RecordedGraphs())
    for _ in range(4):
        assert torch.equal(chain(segments.begin()), expected)
    assert segments.captured == 5  # "a" twice

    class Careless(Run):
        def _again(self, name):
            return next((s for s in self._segments._sequence if s.name == name), None)

    segments = Segments(RecordedGraphs())
    for _ in range(2):
        found = chain(Careless(segments, None))
    assert segments.captured == 4
    assert not torch.equal(found, expected)


def test_a_segment_is_used_again_after_others_that_left_nothing():
    def chain(run):
        x = run.keep("x", lambda: torch.zeros(8))
        for _ in range(3):
            run.run("add", lambda: none(x.add_(1)))
            run.run("double", lambda: none(x.mul_(2)))
        run.finish()
        return x.clone()

    segments = Segments(RecordedGraphs())
    chain(segments.begin())
    chain(segments.begin())
    assert segments.captured == 2
    before = segments.begin().keep("x", list).clone()
    assert torch.equal(chain(segments.begin()), 8 * before + 14)


@pytest.mark.parametrize("fail_at", range(2 + 2 * STORED))
def test_a_failed_capture_loses_nothing(fail_at):
    """The chain goes on with what the captured part of it made, stored graphs included, and the key is left alone."""
    toy, recorder = mlp(), RecordedGraphs()
    segments = Segments(recorder)
    recorder.fail_at = fail_at
    for _ in range(4):
        x = inputs(toy)
        run = segments.begin()
        assert_equal(toy(run, x), plainly(toy, x))
        train(toy)
    assert recorder.calls.count("capture") == fail_at + 1
    names = ["step", *[("store", s) for s in (3, 4)], *[("differentiate", s) for s in (4, 3)], "replay"]
    assert run.plain
    assert run.reason.startswith(f"{names[fail_at]!r} could not be captured: CaptureError: operation failed")
    assert segments.captured == segments.bytes == 0


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (lambda x: x.mul_(x.sum().item()), "waits for a number"),
        (lambda x: x.mul_(torch.tensor(2.0)), "copied from the host"),
        (lambda x: x.add_(torch.rand(3)), "draws random numbers"),
    ],
    ids=["item", "host", "random"],
)
def test_what_cannot_be_captured_runs_as_it_is(work, reason):
    segments, results = Segments(RecordedGraphs()), []
    for _ in range(3):
        torch.manual_seed(0)
        run = segments.begin()
        x = run.keep("x", lambda: torch.ones(3))
        x.fill_(1)
        run.run("work", lambda: none(work(x)))
        run.finish()
        results.append(x.clone())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert reason in segments.refusal


def test_a_gradient_of_a_parameter_itself_cannot_be_captured():
    """Its accumulator belongs to the stream where the parameter was used first, which no capture may wait for."""
    layer, segments = nn.Linear(3, 3), Segments(RecordedGraphs())
    for _ in range(2):
        run = segments.begin()
        total = run.keep("total", lambda: torch.zeros(3, 3))
        run.run("work", lambda: none(total.add_(torch.autograd.grad(layer(total).sum(), layer.weight)[0])))
        run.finish()
    assert "legacy stream" in segments.refusal


def test_an_error_of_the_work_itself_is_raised():
    """The one that it raises when it runs, and again in the next chain."""
    segments = Segments(RecordedGraphs())
    warm = segments.begin()
    warm.run("work", lambda: None)
    warm.finish()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            segments.begin().run("work", lambda: 1 / 0)


def test_another_order_is_an_error_and_captured_anew():
    toy, segments = mlp(), Segments(RecordedGraphs())
    assert_lives(toy, segments, 3)
    run = segments.begin()
    run.run("step", lambda: None)
    with pytest.raises(
        RuntimeError, match=r"'replay' was asked for where the captured chain has 'step' or \('store', 3\)"
    ):
        run.run("replay", lambda: None)
    assert segments.captured == 0
    assert_lives(toy, segments, 2)
    assert segments.captured == 2 + 2 * STORED


def test_another_beginning_is_captured_anew():
    """Where the chains of a key begin otherwise before all of them is captured."""
    segments, found = Segments(RecordedGraphs()), []

    def chain(names):
        run = segments.begin()
        x = run.keep("x", lambda: torch.ones(4))
        x.fill_(1)
        for name in names:
            run.run(name, {"double": lambda: none(x.mul_(2)), "add": lambda: none(x.add_(1))}[name])
        run.finish()
        found.append(x[0].item())

    chain(["double", "double", "add"])
    for _ in range(3):
        chain(["add", "add", "double", "add"])
    assert found == [5, 7, 7, 7]
    assert segments.refusal is None
    # "double", which leaves nothing, is still the first chain's.
    assert segments.captured == segments.recorder.calls.count("capture") == 2


def test_another_beginning_that_leaves_something():
    """What was captured before would write over it, and is captured anew."""
    segments, x = Segments(RecordedGraphs()), torch.randn(64)

    def chain(keeps):
        run = segments.begin()
        given, out = run.keep("static", lambda: [torch.empty(64), torch.empty(64)])
        given.copy_(x)
        kept = run.run("keep", lambda: given * 3) if keeps else given
        for _ in range(2):
            run.run("step", lambda: none(out.copy_((given + 1).mul(2).add(3))))
        run.run("use", lambda: none(out.add_(kept)))
        run.finish()
        return out.clone()

    chain(False)
    for _ in range(3):
        assert torch.allclose(chain(True), 5 * x + 5)
    assert segments.captured == 3


@pytest.mark.parametrize("leaves", [False, True])
def test_what_is_made_once_before_a_repeated_segment(leaves):
    """Where it leaves nothing but static tensors, the repeated one is captured in the first chain, and stays."""
    segments = Segments(RecordedGraphs())

    def chain(run, x):
        given, made, out = run.keep("static", lambda: [torch.empty(8) for _ in range(3)])
        given.copy_(x)

        def once():
            # Larger than what follows, so that addresses would be shared.
            doubled = (given.expand(64, 8) * 2)[0]
            made.copy_(doubled)
            return doubled if leaves else None

        doubled = run.run("once", once)
        for _ in range(4):
            run.run("step", lambda: none(out.copy_(torch.tanh((doubled if leaves else made) + out * 0) + 1)))
        for _ in range(3):
            run.run("other", lambda: none(out.mul_(2)))
        run.finish()
        return out.clone()

    calls = segments.recorder.calls
    for captures in [0, 3, 0, 0] if leaves else [2, 1, 0, 0]:
        before, x = len(calls), torch.randn(8)
        assert torch.equal(chain(segments.begin(), x), 8 * (torch.tanh(2 * x) + 1))
        assert calls[before:].count("capture") == captures
    assert segments.captured == 3
