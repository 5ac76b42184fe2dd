"""Whose graphs are whose: of chains that finish, wait, are given up or fail, and of several keys."""

import copy
import gc
import pickle

import pytest
import torch
from recorded import CaptureError, RecordedGraphs
from toy_chains import STEPS, STORED, assert_equal, assert_lives, inputs, mlp, plainly, train, unet

from rftcore.sampling.graphs import Graphs, Run, Segments


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
