"""Plans say what a chain takes, fit their budget, and spend it where it saves most."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from planned import MODES, arguments_of, conditioning_of, planner_of, sampler_of, unet_of

import rftcore
from rftcore.blocks import once, recompute
from rftcore.counting import FLOPs, PeakBytes
from rftcore.sampling import simulation
from rftcore.sampling.denoiser import Denoiser
from rftcore.sampling.plan import Plan
from rftcore.sampling.planner import Planner, make_plan
from rftcore.sampling.simulation import decoding


@pytest.mark.parametrize("kind", ["sd1", pytest.param("sdxl", marks=pytest.mark.slow), "unconditional"])
def test_a_steps_bytes_and_flops_are_the_real_ones(kind):
    unet, guided = unet_of(kind), kind != "unconditional"
    planner, denoiser, plain = planner_of(unet, kind), Denoiser(unet), None
    conditioning = conditioning_of(kind, 2 * (1 + guided))
    text, added = conditioning.get("prompt_embeds"), {n: t for n, t in conditioning.items() if n != "prompt_embeds"}
    made = once.compute(unet, torch.tensor([7]), text, added).at(0)
    made = {name: tensor.detach().requires_grad_(tensor.requires_grad) for name, tensor in made.items()}
    for count in (0, planner.most // 3, planner.most):
        x = torch.randn(2, 4, 8, 8, requires_grad=True)
        wanted = [x, *(t for t in (*made.values(), *denoiser.trainable().values()) if t.requires_grad)]
        for _ in range(2):  # the first call makes what later ones find
            with once.given(unet, made), recompute(unet, planner.level(count)), PeakBytes() as live:
                output = denoiser(x, torch.tensor(7), conditioning, guided=guided)
            kept = live.live
            with FLOPs() as backward:
                torch.autograd.grad(output.sum(), wanted, allow_unused=True)
        simulated = planner.step(count)
        assert kept == pytest.approx(simulated.kept, rel=0.01)
        # What is between two levels is not simulated but added up.
        assert planner.kept(count) == pytest.approx(simulated.kept, rel=0.02)
        plain = plain or backward.total
        assert backward.total == simulated.backward_flops
        assert backward.total - plain == pytest.approx(planner._extra[count], rel=0.02, abs=1)


def test_the_sampler_makes_the_same_plan():
    unet, budget = unet_of(), 10**6
    sampler = sampler_of(unet, "sd1", memory_budget=budget)
    sampler(**arguments_of("sd1", 3), latents=torch.randn(3, 4, 8, 8))
    assert sampler.plan == planner_of(unet, batch=3).plan(budget)


@pytest.fixture(scope="module")
def planner():
    return planner_of(unet_of(), batch=3, modes=("none", *["full"] * 6))


@pytest.mark.slow
def test_more_memory_is_never_slower_and_all_of_it_is_kept_to(planner):
    least, everything = max(planner.least().values()), planner.plan(2**40).peak_bytes
    plans = [planner.plan(round(least + share / 6 * (everything - least))) for share in range(7)]
    extra = [plan.extra_percent for plan in plans]
    assert extra == sorted(extra, reverse=True)
    assert extra[0] >= 100 and extra[-1] == 0
    for plan in plans:
        assert plan.peak_bytes <= plan.budget
        assert plan.stored_bytes == sum(plan.kept_bytes[level] for level in plan.stored if level is not None)
        # Those that are replayed come first, then those that keep less.
        kept = [0 if level is None else plan.kept_bytes[level] for level in plan.stored]
        assert kept == sorted(kept) and plan.stored[0] is None


def test_no_single_level_for_all_steps_is_better(planner):
    """Of those that fit, none makes less again."""
    everything = planner.plan(2**40)
    for share in (0.3, 0.5, 0.8):
        budget = round(share * everything.peak_bytes)
        plan = planner.plan(budget)
        for count in range(0, planner.most + 1, 7):
            replay = planner._replay(budget, 0)
            for stored in range(7):
                other = planner._assembled([None] * (6 - stored) + [count] * stored, replay, budget, 0)
                if other.peak_bytes <= budget:
                    # A step that is stored is a whole one.
                    assert plan.extra_percent <= other.extra_percent + 2, (share, count, stored)


def test_the_least_budget_is_the_least(planner):
    least = max(planner.least().values())
    assert planner.plan(least).replay_batch == 1
    with pytest.raises(
        ValueError, match="is too small for a chain of 3 images: a sampling step takes .* Raise it, or make"
    ):
        planner.plan(round(0.99 * least))
    alone = planner_of(unet_of(), batch=1)
    assert alone.plan(max(alone.least().values())).replay_level
    with pytest.raises(ValueError, match="a replay of one image takes .* Raise it, or make the resolution"):
        alone.plan(round(0.94 * max(alone.least().values())))


def test_a_budget_that_is_too_small_is_told_soon(monkeypatch):
    """What the largest part takes is looked for, and by few steps, each of which is a second's work for SD1.5."""
    counted, count = [], simulation._count
    monkeypatch.setattr(simulation, "_count", lambda *arguments: counted.append(1) or count(*arguments))
    anew = simulation.Simulation(Denoiser(unet_of()), conditioning_of("sd1", 1), 8, 8, guided=True)
    with pytest.raises(ValueError, match="decoding and the reward takes 1.0. GiB"):
        Planner(anew, 1, MODES).plan(10**8, 2**30)
    assert not counted
    with pytest.raises(ValueError, match="a replay of one image takes"):
        Planner(anew, 1, MODES).plan(400_000)
    assert 1 < len(counted) <= 12


def test_the_reserve_is_left_free_of_stored_steps(planner):
    without = planner.plan(planner.plan(2**40).peak_bytes)
    reserve = without.peak_bytes // 2
    plan = planner.plan(without.peak_bytes, reserve)
    assert plan.extra_percent > without.extra_percent == 0
    assert planner.fixed + plan.stored_bytes + reserve <= without.peak_bytes
    with pytest.raises(ValueError, match="decoding and the reward takes"):
        planner.plan(without.peak_bytes, 2 * without.peak_bytes)


def test_smaller_plans_end(planner):
    plan, seen = planner.plan(2**40), []
    while plan is not None:
        seen.append((plan.stored.count(None), plan.replay_batch, plan.replay_level == "block"))
        plan = plan.smaller()
    assert seen == [
        (1, 3, False),
        (4, 3, False),
        (6, 3, False),
        (7, 3, False),
        (7, 2, False),
        (7, 1, False),
        (7, 1, True),
    ]


def test_a_plan_survives_json(planner):
    for plan in (planner.plan(10**6), Plan.replayed(MODES, 2, ["why"])):
        assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    with pytest.raises(ValueError, match="not a Plan"):
        Plan.from_dict({"batch": 2})


TEXT = conditioning_of("sd1", 1)


def make(unet, **options):
    settings = {"batch": 2, "height": 8, "width": 8, "guided": True, "modes": MODES, "budget": 2**40}
    return make_plan(Denoiser(unet), TEXT, **{**settings, **options})


def hooked(unet):
    unet.mid_block.resnets[0].register_forward_hook(lambda *_: pytest.fail("a hook was called"))


class Syncing(AttnProcessor):
    def __call__(self, attn, hidden_states, *args, **kwargs):
        return super().__call__(attn, hidden_states * (1 + float(hidden_states.sum() > 0)), *args, **kwargs)


def replaced(unet):
    unet.mid_block.forward = lambda *_: pytest.fail("a forward was called")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "mid_block.resnets.0 has hooks"),
        (replaced, "mid_block has a forward of its own"),
        (lambda unet: unet.set_attn_processor(Syncing()), "does not run on tensors without data"),
    ],
)
def test_what_cannot_be_predicted_is_replayed(change, reason):
    unet = unet_of()
    change(unet)
    plan = make(unet)
    assert plan.replays == 3 and plan.replay_level is None and plan.replay_batch == 2
    assert reason in plan.reasons[0]


def test_compiled_unets_are_replayed():
    assert "compiled" in make(torch.compile(unet_of())).reasons[0]


def test_planning_leaves_the_unet_and_the_random_numbers_alone():
    unet = rftcore.accelerate(unet_of(), "qkv").train()
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    state, serving = torch.get_rng_state(), unet.conv_in.forward.place.serving
    with PeakBytes() as live, torch.autocast("cpu", dtype=torch.bfloat16):
        plan = make(unet, budget=10**6)
    assert live.peak == 0 and plan.peak_bytes
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert unet.conv_in.forward.place.serving is serving
    assert (serving.recompute, serving.drops, serving.given, serving.refusals) == ("qkv", None, None, {})


def test_autocast_is_planned_for():
    unet = unet_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = make(unet)
    assert lower.peak_bytes < 0.8 * make(unet).peak_bytes


def test_decoding_is_the_counted_one():
    vae = AutoencoderKL(block_out_channels=(16, 32), norm_num_groups=4, latent_channels=4, **_STAGES).requires_grad_(
        False
    )
    for level in (None, "none", "block"):
        if level:
            rftcore.accelerate(vae, level)
        latents = torch.randn(2, 4, 8, 8, requires_grad=True)
        for _ in range(2):
            with PeakBytes() as live:
                rftcore.score(vae, latents, lambda images, *_: images.mean((1, 2, 3)), ["a", "b"])
        assert live.peak == pytest.approx(decoding(vae, 8, 8).peak, rel=0.1)


_STAGES = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
