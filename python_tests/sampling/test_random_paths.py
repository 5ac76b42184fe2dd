"""Gradient paths that are drawn anew for every chain: planned from what is known, captured only if they come again."""

import random

import pytest
import torch
from models import UNETS, add_lora
from recorded import RecordedGraphs

import rftcore
from rftcore.sampling import GradientPath, Plan, chain, plans
from rftcore.sampling.captures import Captures
from rftcore.sampling.recent import Recent
from rftcore.sampling.simulation import Simulation, Unpredictable

STEPS, BATCH = 8, 2


@pytest.fixture
def make_sampler(make_unet, make_scheduler):
    def make(unet=None, **options):
        unet = unet or rftcore.accelerate(make_unet(dtype=torch.float32))
        return rftcore.CheckpointedSampler(
            unet, make_scheduler(), **{"num_inference_steps": STEPS, "guidance_scale": 2.0, **options}
        )

    return make


@pytest.fixture
def given(conditioning):
    return {**conditioning("sd1", BATCH, dtype=torch.float32), "latents": torch.randn(BATCH, 4, 8, 8)}


def drawn(count, seed=0):
    """AlignProp's paths: of every step but the last one the UNet's output is cut at random."""
    draw = random.Random(seed)
    modes = (tuple(draw.choice(["full", "detach_eps"]) for _ in range(STEPS - 1)) for _ in range(count))
    return [GradientPath((*each, "full")) for each in modes]


def test_a_shape_is_simulated_once_for_all_paths(make_sampler, given, monkeypatch):
    made, steps, count = [], [], Simulation.__init__
    monkeypatch.setattr(Simulation, "__init__", lambda self, *a, **k: (made.append(self), count(self, *a, **k))[1])
    counted = Simulation.step
    monkeypatch.setattr(Simulation, "step", lambda self, *a: steps.append(a) or counted(self, *a))
    sampler = make_sampler()
    for path in drawn(6):
        sampler(**given, gradient_path=path)
        assert sampler.plan.differentiated == path.modes.count("full") and not sampler.plan.replays
    assert len(made) == 1 and len(made[0]._steps) == 1 and len(made[0]._forwards) == 1
    # Another batch is another shape.
    sampler(**{name: tensor[:1] for name, tensor in given.items()}, gradient_path=drawn(1)[0])
    assert len(made) == 2


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.4, 0.7])
def test_plans_do_not_depend_on_the_paths_before(share, make_sampler, given):
    """A run that is resumed has seen other paths than the one that was never interrupted."""
    alone = make_sampler(reserve=0)
    alone(**given)
    budget = int(share * alone.plan.peak_bytes)
    unet, paths = alone.denoiser.module, drawn(5, seed=1)
    together, backwards = (make_sampler(unet, memory_budget=budget) for _ in range(2))
    for sampler, order in ((together, paths), (backwards, paths[::-1])):
        sampler.made = {}
        for path in order:
            sampler(**given, gradient_path=path)
            sampler.made[path] = sampler.plan
    assert together.made == backwards.made
    assert any(plan.extra_percent for plan in together.made.values())
    fresh = make_sampler(unet, memory_budget=budget)
    fresh(**given, gradient_path=paths[-1])
    assert fresh.plan == together.made[paths[-1]]


@pytest.mark.slow
def test_the_budget_and_the_reserve_of_a_plan_give_it_again(make_sampler, given):
    """What a resumed run plans all its paths with."""
    first = make_sampler(reserve="4MiB")
    first(**given)
    assert first.plan.reserve == 4 * 2**20
    again = make_sampler(first.denoiser.module, memory_budget=first.plan.budget, reserve=first.plan.reserve)
    again(**given)
    assert again.plan == first.plan
    assert Plan.from_dict(first.plan.to_dict()) == first.plan
    # Of a given budget nothing is left free but what is asked for.
    peak = make_sampler(first.denoiser.module, reserve=0)
    peak(**given)
    budget = peak.plan.peak_bytes
    assert [_percent(make_sampler(first.denoiser.module, memory_budget=budget, reserve=reserve), given) > 0
            for reserve in (None, budget // 2)] == [False, True]  # fmt: skip


def _percent(sampler, given):
    sampler(**given)
    return sampler.plan.extra_percent


def test_what_cannot_be_counted_is_not_tried_again(make_sampler, given, monkeypatch):
    tried = []

    def simulate(*_, **__):
        tried.append(1)
        raise Unpredictable("it cannot be copied")

    monkeypatch.setattr(plans, "Simulation", simulate)
    sampler = make_sampler()
    for path in drawn(3):
        sampler(**given, gradient_path=path)
        assert sampler.plan.reasons == ("it cannot be copied",)
        assert sampler.plan.replays == path.modes.count("full")
    assert len(tried) == 1


def test_plans_are_kept_up_to_a_number(make_sampler, given, monkeypatch):
    monkeypatch.setattr(plans, "_PATHS", 3)
    sampler, paths = make_sampler(), drawn(5)
    for path in paths:
        sampler(**given, gradient_path=path)
    assert len(sampler._plans._made) == 3
    last = sampler.plan
    sampler(**given, gradient_path=paths[-1])
    assert sampler.plan is last


def test_what_was_used_last_is_kept():
    recent = Recent(2)
    for key in "abacad":
        recent.get(key, key.upper)
    assert ["a" in recent, "b" in recent, "c" in recent, "d" in recent] == [True, False, False, True]
    assert recent.get("a", None) == "A" and len(recent.emptied()) == 0


@pytest.fixture
def captured(make_sampler):
    """A sampler without graphs and one with emulated ones, and all recorders that it made."""
    unet, recorders = rftcore.accelerate(add_lora(UNETS["sd1"]().eval())), []

    def recorder(_):
        recorders.append(RecordedGraphs())
        return recorders[-1]

    plain, with_graphs = make_sampler(unet, capture=False), make_sampler(unet)
    with_graphs._captures = Captures(with_graphs.denoiser, True, recorder, "cpu")
    return plain, with_graphs, recorders


def run(sampler, given, path):
    module = sampler.denoiser.module
    module.zero_grad()
    latents = sampler(**given, gradient_path=path).latents
    latents.square().sum().backward()
    return [latents.detach(), *(p.grad.clone() for p in module.parameters() if p.requires_grad)]


@pytest.mark.slow
def test_paths_that_come_once_are_not_captured(captured, given):
    plain, sampler, recorders = captured
    with torch.no_grad():
        for _ in range(3):
            sampler(**given)
    assert sampler.uncaptured is None and len(recorders) == 1
    calls = list(recorders[0].calls)
    for path in drawn(4, seed=2):
        for ours, theirs in zip(run(sampler, given, path), run(plain, given, path), strict=True):
            assert torch.equal(ours, theirs)
        assert "its gradient path is new" in sampler.uncaptured
    assert len(recorders) == 1 and len(sampler._captures._graphs._segments) == 1
    # What the others' validation launches is still there.
    with torch.no_grad():
        sampler(**given)
    assert recorders[0].calls[len(calls) :].count("capture") == 0


@pytest.mark.slow
def test_a_path_that_comes_again_is_captured_and_lets_the_one_before_go(captured, given):
    plain, sampler, recorders = captured
    paths = drawn(2, seed=3)
    for path in paths:
        for chains in range(4):
            for ours, theirs in zip(run(sampler, given, path), run(plain, given, path), strict=True):
                assert torch.equal(ours, theirs)
            assert (sampler.uncaptured is None) == (chains > 0)
        assert "capture" in recorders[-1].calls and "launch" in recorders[-1].calls
        assert len(sampler._captures._graphs._segments) == 1
    assert len(recorders) == len(paths)


def test_the_samplers_own_path_is_captured_as_ever(captured, given):
    _, sampler, recorders = captured
    run(sampler, given, None)
    assert sampler.uncaptured is None and len(recorders) == 1
    run(sampler, given, sampler.gradient_path)
    assert len(recorders) == 1


def test_graphs_are_anothers_where_the_plan_does_other_work():
    replayed = Plan.replayed(["full"] * 2, 2)
    assert replayed.work == Plan.replayed(["full"] * 2, 2, reasons=["why"], budget=7).work
    assert len({replayed.work, replayed.smaller().work, Plan.replayed(["full"] * 2, 3).work}) == 3


@pytest.mark.parametrize(("modes", "start", "needed"), [
    ("eefe", False, "nnfe"), ("eefe", True, "eefe"), ("neef", True, "nnnf"), ("eief", False, "nief"),
    ("exef", True, "nxef"), ("ffff", False, "ffff"), ("eeee", True, "eeee"), ("fnef", True, "nnnf"),
])  # fmt: skip
def test_linear_steps_that_lead_to_nothing(modes, start, needed):
    names = {"e": "detach_eps", "f": "full", "n": "none", "i": "detach_input", "x": "detach_x"}
    path = GradientPath(tuple(names[mode] for mode in modes)).needed(start)
    assert path.modes == tuple(names[mode] for mode in needed)
    assert path.needed(start) == path and path.effective_modes == path.modes


def test_they_are_not_run_and_gradients_are_the_same_bit_for_bit(make_unet, make_sampler, given, monkeypatch):
    sampler = make_sampler(make_unet(dtype=torch.float32))
    path = GradientPath(("detach_eps",) * 5 + ("full", "detach_eps", "full"))
    parameters = [p for p in sampler.denoiser.module.parameters() if p.requires_grad]
    backwards, step = [], chain.Chain._step_backward
    monkeypatch.setattr(chain.Chain, "_step_backward", lambda self, *a: backwards.append(a[0]) or step(self, *a))
    found = []
    for start in (True, False):
        backwards.clear()
        noise = given["latents"].clone().requires_grad_(start)
        latents = sampler(**{**given, "latents": noise}, gradient_path=path).latents
        found.append(torch.autograd.grad(latents.square().sum(), parameters))
        assert sorted(backwards) == list(range(0 if start else 5, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_evaluations_are_the_counted_ones(guidance, make_unet, make_sampler, given):
    unet, rows = make_unet(dtype=torch.float32), []
    unet.conv_in.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    whole = GradientPath(("full",) * STEPS)
    stopped = GradientPath(("none",) * 4 + ("detach_input",), stop=5, output="x0")
    half = Plan(BATCH, (None,) * 6 + (0, 0), (None,), None, 1, STEPS)
    sampler = make_sampler(unet, guidance_scale=guidance)
    assert sampler.evaluations == 0 and sampler.branches == guidance
    # With a hook nothing can be predicted, and everything is replayed.
    halved = make_sampler(unet, guidance_scale=guidance, plan=half)
    for made, path, evaluations in ((sampler, whole, 2 * STEPS), (sampler, stopped, 6), (halved, whole, STEPS + 6)):
        rows.clear()
        made(**given, gradient_path=path).latents.sum().backward()
        assert made.evaluations * BATCH == sum(rows) == evaluations * guidance * BATCH
        with torch.no_grad():
            made(**given, gradient_path=path)
        assert made.evaluations == len(path.modes) * guidance
