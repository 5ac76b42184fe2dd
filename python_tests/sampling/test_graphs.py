"""Segments of chains, run, captured and launched by an emulation of captured graphs: the same numbers, bit for bit."""

import copy
import gc
import pickle

import pytest
import torch
from models import UNETS, add_lora
from recorded import CaptureError, RecordedGraphs
from torch import nn

import rftcore
from rftcore.sampling.graphs import Graphs, Run, Segments

STEPS, STORED, REPLAYED = 5, 2, 2


class Toy:
    """A chain of `STEPS` steps x + f(x, t) / 8 whose last `STORED` are stored, and the `REPLAYED` before them replayed.

    It does what a sampler's chain has to do: it copies inputs to static tensors, makes its leaves inside of segments,
    gives each stored slot a state of its own, and accumulates gradients in static tensors.
    """

    def __init__(self, evaluate, parameters, shape):
        self.evaluate, self.parameters, self.shape = evaluate, parameters, shape
        # How often Python ran a segment's work.
        self.work = 0

    def __call__(self, run, x, backward=True):
        """The last state and the gradients of half its square: of the first differentiated state and the parameters."""
        dtype = x.dtype
        # Not slices of one tensor: what autograd saved of one would be out of date when another is written.
        states = run.keep("states", lambda: [torch.empty(self.shape, dtype=dtype) for _ in range(STEPS + 1)])
        times = run.keep("times", lambda: torch.arange(STEPS, dtype=dtype))
        now, t = run.keep("now", lambda: (torch.empty(self.shape, dtype=dtype), torch.empty((), dtype=dtype)))
        after = run.keep("after", lambda: torch.empty(self.shape, dtype=dtype))
        grad = run.keep("grad", lambda: torch.empty(self.shape, dtype=dtype))
        sums = run.keep("sums", lambda: [torch.empty_like(p) for p in self.parameters.values()])
        for total in sums:
            total.zero_()
        states[0].copy_(x)

        def sample():
            self.work += 1
            with torch.no_grad():
                after.copy_(now + self.evaluate(now, t, self.parameters) / 8)

        def leaves(x):
            return x.detach().requires_grad_(), {n: p.detach().requires_grad_() for n, p in self.parameters.items()}

        def store(step):
            self.work += 1
            x, parameters = leaves(states[step])
            with torch.enable_grad():
                following = x + self.evaluate(x, times[step], parameters) / 8
            states[step + 1].copy_(following.detach())
            return following, x, list(parameters.values())

        def differentiate(following, x, parameters):
            self.work += 1
            found = torch.autograd.grad(following, [x, *parameters], grad, retain_graph=run.retain)
            grad.copy_(found[0])
            for total, g in zip(sums, found[1:], strict=True):
                total.add_(g)

        def replay():
            x, parameters = leaves(now)
            with torch.enable_grad():
                following = x + self.evaluate(x, t, parameters) / 8
            differentiate(following, x, list(parameters.values()))

        def load(step):
            now.copy_(states[step])
            t.copy_(times[step])

        slots = {}
        for step in range(STEPS):
            if step < STEPS - STORED:
                load(step)
                run.run("step", sample)
                states[step + 1].copy_(after)
            else:
                slots[step] = run.run(("store", step), lambda step=step: store(step))
        last = states[-1].clone()
        if not backward:
            return last
        grad.copy_(last)
        for step in reversed(range(STEPS - STORED - REPLAYED, STEPS)):
            if step in slots:
                run.run(("differentiate", step), lambda step=step: differentiate(*slots[step]))
                del slots[step]
            else:
                load(step)
                run.run("replay", replay)
        run.finish()
        return [last, grad.clone(), *(total.clone() for total in sums)]


def mlp(dtype=torch.float64):
    width = 6
    layers = nn.Sequential(nn.Linear(width + 1, 16), nn.SiLU(), nn.Linear(16, width)).to(dtype)
    parameters = dict(layers.named_parameters())

    def evaluate(x, t, parameters):
        inputs = torch.cat([x, t.expand(len(x), 1)], 1)
        return torch.func.functional_call(layers, parameters, (inputs,))

    return Toy(evaluate, parameters, (3, width))


def unet(kind="sd1", accelerated=True, dtype=torch.float32, **options):
    model = add_lora(UNETS[kind]().to(dtype).eval())
    if accelerated:
        rftcore.accelerate(model, **options)
    text = torch.randn(2, 5, 12, dtype=dtype)
    added = {"text_embeds": torch.randn(2, 10, dtype=dtype), "time_ids": torch.randint(0, 9, (2, 6)).to(dtype)}
    kwargs = {"encoder_hidden_states": text} if kind != "unconditional" else {}
    kwargs |= {"added_cond_kwargs": added} if kind == "sdxl" else {}
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def evaluate(x, t, parameters):
        return torch.func.functional_call(model, parameters, (x, t), {**kwargs, "return_dict": False})[0]

    return Toy(evaluate, parameters, (2, 4, 8, 8)), model


def none(_):
    """For work that returns nothing."""


def plainly(toy, x):
    return toy(Run(None, None), x)


def train(toy):
    """What an optimizer does between two chains."""
    with torch.no_grad():
        for parameter in toy.parameters.values():
            parameter.mul_(0.9).add_(0.01)


def assert_equal(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def inputs(toy):
    return torch.randn(toy.shape, dtype=next(iter(toy.parameters.values())).dtype)


def assert_lives(toy, segments, chains=4):
    """Chains in all lives, each with other inputs and parameters, equal to one without graphs."""
    for _ in range(chains):
        x = inputs(toy)
        assert_equal(toy(segments.begin(), x), plainly(toy, x))
        train(toy)
        assert segments.refusal is None


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


@pytest.mark.parametrize("kind", UNETS)
def test_an_accelerated_unet(kind):
    toy, _ = unet(kind)
    assert_lives(toy, Segments(RecordedGraphs()), 3)


@pytest.mark.parametrize(
    "options", [{"accelerated": False}, {"recompute": "block"}, {"dtype": torch.bfloat16}], ids=str
)
def test_a_unet_otherwise(options):
    toy, _ = unet(**options)
    assert_lives(toy, Segments(RecordedGraphs()), 3)


@pytest.mark.parametrize("accelerated", [True, False])
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


def test_a_chain_that_is_finished():
    toy, segments = mlp(), Segments(RecordedGraphs())
    for _ in range(3):
        run = segments.begin()
        toy(run, inputs(toy))
        with pytest.raises(RuntimeError, match="'replay' was asked for after its chain had finished"):
            run.run("replay", lambda: None)
        run.finish()


def test_a_chain_that_waits_for_its_backward_keeps_its_graphs():
    """Chains that begin meanwhile run without, whatever life it is in."""
    toy, segments = mlp(), Segments(RecordedGraphs())
    for _ in range(4):
        first, second = inputs(toy), inputs(toy)
        expected = plainly(toy, first), plainly(toy, second)

        class Interrupted(Run):
            def run(self, name, work):
                if name == ("differentiate", STEPS - 1):
                    other = segments.begin()
                    assert other.plain
                    assert "waits for its backward pass" in other.reason
                    assert_equal(toy(other, second), expected[1])
                return super().run(name, work)

        run = segments.begin()
        run.__class__ = Interrupted
        assert_equal(toy(run, first), expected[0])
        train(toy)


def test_chains_that_are_given_up():
    """One while it is captured costs a second capture, two end it; one that is launched costs nothing."""
    toy, segments = mlp(), Segments(RecordedGraphs())
    assert_lives(toy, segments, 1)
    toy(segments.begin(), inputs(toy), backward=False)
    assert_lives(toy, segments, 2)
    captures = segments.recorder.calls.count("capture")
    for _ in range(3):
        toy(segments.begin(), inputs(toy), backward=False)
        assert_lives(toy, segments, 1)
    assert segments.recorder.calls.count("capture") == captures

    segments = Segments(RecordedGraphs())
    assert_lives(toy, segments, 1)
    for _ in range(2):
        toy(segments.begin(), inputs(toy), backward=False)
        gc.collect()
    x, run = inputs(toy), segments.begin()
    assert "given up" in run.reason
    assert_equal(toy(run, x), plainly(toy, x))


def test_a_chain_that_fails_gives_up():
    """Its graphs are the next chain's, although its error, and by that the chain, is still held."""
    toy, segments, errors = mlp(), Segments(RecordedGraphs()), []
    assert_lives(toy, segments, 1)
    for _ in range(2):
        run = segments.begin()
        try:
            toy(run, inputs(toy), backward=False)
            raise ValueError("a reward that is not finite")
        except ValueError as error:
            errors.append((error, run))
            run.give_up()
        run.give_up()
        if segments.refusal is None:
            assert_lives(toy, segments, 2)
    assert segments.refusal is None
    assert "launch" in segments.recorder.calls[-1]


def test_a_copy_begins_without_graphs():
    toy, graphs = mlp(), Graphs(RecordedGraphs, size=1)
    for _ in range(2):
        toy(graphs.begin("a"), inputs(toy))
    for other in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert graphs.bytes > other.bytes == 0
        x = inputs(toy)
        assert_equal(toy(other.begin("a"), x), plainly(toy, x))


def test_memory_of_stored_slots_is_used_again():
    """Everything but what segments returned is free after the chain, and later chains take nothing."""
    toy, recorder = unet()[0], RecordedGraphs()
    segments = Segments(recorder)
    assert_lives(toy, segments, 2)
    pool, results = recorder.bytes, recorder.live
    # Of each slot a state and its alias.
    assert results <= STORED * 2 * 2 * 4 * 64 * 4
    assert_lives(toy, segments, 2)
    assert (recorder.bytes, recorder.live) == (pool, results)
    assert segments.bytes == pool

    # Slots whose graphs stay, as if each had a pool of its own.
    kept, held = RecordedGraphs(), []
    segments = Segments(kept)

    class Hoarding(Run):
        def run(self, name, work):
            result = super().run(name, work)
            held.append(result)
            return result

    for _ in range(2):
        run = segments.begin()
        run.__class__ = Hoarding
        toy(run, inputs(toy))
    assert kept.live > 10 * results
    assert kept.bytes > pool


def test_graphs_of_two_keys_are_kept():
    made = []

    def make():
        made.append(RecordedGraphs())
        return made[-1]

    toy, graphs = mlp(), Graphs(make)

    def chain(key, reasons=()):
        x = inputs(toy)
        run = graphs.begin(key, reasons)
        assert_equal(toy(run, x), plainly(toy, x))
        return run

    for key in ("a", "b") * 3:
        chain(key)
    assert len(made) == 2
    assert graphs.bytes == sum(recorder.bytes for recorder in made) > 0
    chain("c")  # instead of "a"
    chain("b")
    assert len(made) == 3
    chain("a")
    assert len(made) == 4
    run = chain("b", ["it has hooks", "dropout is active"])
    assert run.plain
    assert run.reason == "it has hooks; dropout is active"
    assert len(made) == 4


def test_a_refused_key_is_remembered():
    made = []

    def make():
        made.append(RecordedGraphs())
        made[-1].fail_at = 0
        return made[-1]

    toy, graphs = mlp(), Graphs(make)
    for key in ("a", "b", "c", "d") * 2:
        toy(graphs.begin(key), inputs(toy))
    assert len(made) == 4
    assert all(recorder.calls.count("capture") == 1 for recorder in made)


def test_a_chain_outlives_its_key():
    """Its graphs stay as long as it is not finished, though other keys have taken their place."""
    toy, graphs = mlp(), Graphs(RecordedGraphs, size=1)
    for _ in range(2):
        toy(graphs.begin("a"), inputs(toy))
    run, x = graphs.begin("a"), inputs(toy)
    toy(graphs.begin("b"), inputs(toy))
    assert_equal(toy(run, x), plainly(toy, x))
    assert "launch" in run._segments.recorder.calls


def test_the_emulation_refuses_what_cuda_refuses():
    recorder = RecordedGraphs()
    with pytest.raises(CaptureError, match=r"accumulates into \.grad"):
        recorder.capture(lambda: torch.ones(3, requires_grad=True).sum().backward())
