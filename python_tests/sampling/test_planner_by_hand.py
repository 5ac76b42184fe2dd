"""Plans of a UNet of made-up numbers, whose bytes and FLOPs can be worked out by hand."""

import itertools

import pytest

from rftcore.blocks.costs import Item
from rftcore.sampling.plan import Plan
from rftcore.sampling.planner import Planner, _hull, _Point
from rftcore.sampling.simulation import Constants, Forward, Step

BATCH, MODES = 4, ("none", "full", "full", "full")
ITEMS = {"a": (40, 1.0), "b": (40, 3.0)}  # bytes of a batch, FLOPs a byte
FIXED = 100  # (2 T + 6) latents of 4 bytes, 3 outputs of 8, and 20 that are made once
GRADIENTS = 14 + 6  # of the parameters, and of what is made once


class Made:
    """Per image a forward of 100 FLOPs and 10 bytes; a step keeps 50, and takes 5 and 10 more at its peaks."""

    accelerated, trained_bytes = True, 14

    def latent_bytes(self, images):
        return images

    def output_bytes(self, images):
        return 2 * images

    def forward(self, images):
        return Forward(100 * images, 10 * images)

    def constants(self, images, steps):
        return Constants(kept=5 * images, wanted=5, sums=6, peak=10)

    def priced(self, images):
        return [("layer", Item(price, (name,), size * images // BATCH)) for name, (size, price) in ITEMS.items()][::-1]

    def step(self, images, level):
        again = [ITEMS[name] for names in level.values() for name in names]
        freed = sum(size for size, _ in again) * images // BATCH
        kept, twice = 50 * images - freed, sum(size * price for size, price in again) * images / BATCH
        # What is made again takes a quarter of its bytes at a time.
        return Step(kept, kept + 5 * images, kept + 10 * images + freed // 4, 100 * images, 200 * images + twice)


def planner(batch=BATCH, modes=MODES):
    return Planner(Made(), batch, modes)


def taken(plan, reserve=0):
    """The largest number of bytes at any time, walking along the chain and back."""
    simulation, live, peaks = Made(), FIXED, []
    levels = [None if i is None else plan.levels[i] for i in plan.stored]
    for level in levels:
        step = None if level is None else simulation.step(BATCH, level)
        peaks.append(live + (simulation.forward(BATCH).peak if step is None else step.forward_peak))
        live += 0 if step is None else step.kept
    peaks.append(live + reserve)
    for mode, level in reversed(list(zip(MODES, levels, strict=True))):
        if level is not None:
            step = simulation.step(BATCH, level)
            peaks.append(live + step.backward_peak - step.kept + GRADIENTS)
            live -= step.kept
        elif mode == "full":
            images = plan.replay_batch
            sliced = 0 if images == BATCH else 5 * images + 5
            peaks.append(live + simulation.step(images, plan.replay_level).peak + GRADIENTS + sliced)
    # What is made once is made first, and its gradient last.
    return max(*peaks, FIXED + GRADIENTS + 10)


def test_everything_that_fits_is_stored():
    """700 bytes kept, and 40 of the last step's backward with 20 of gradients on top; 400 FLOPs forward, 800 back."""
    plan = planner().plan(760)
    assert plan.stored == (None, 0, 0, 0) and plan.levels == ({},)
    assert (plan.peak_bytes, plan.stored_bytes, plan.extra_percent, plan.replays) == (760, 600, 0, 0)
    assert (plan.forward_flops, plan.plain_flops, plan.flops) == (400, 4 * 400 + 3 * 800, 4000)
    assert planner().plan(760, 60).peak_bytes == 760
    assert planner().plan(759).extra_percent > 0 and planner().plan(760, 61).extra_percent > 0


def test_the_least_by_hand():
    """One image that makes everything again: 30 kept, 10 and 5 more, 20 of gradients, 5 + 5 of what is made once."""
    assert planner().least(reserve=7) == {
        "a sampling step": FIXED + 40,
        "decoding and the reward": FIXED + 7,
        "what is made once of text and times": FIXED + GRADIENTS + 10,
        "a replay of one image": FIXED + GRADIENTS + 45 + 10,
    }
    plan = planner().plan(175)
    assert plan.stored == (None,) * 4 and plan.replay_level == {"layer": ("a", "b")} and plan.peak_bytes == 175
    # Replayed: a second forward, of 400 FLOPs, and 40 + 120 of what is made again.
    assert (plan.replay_batch, plan.replay_extra, plan.extra_percent) == (1, 140, 140)
    with pytest.raises(
        ValueError, match=r"chain of 4 images: a replay of one image takes.*make the resolution smaller"
    ):
        planner().plan(174)
    with pytest.raises(ValueError, match="decoding and the reward takes"):
        planner().plan(300, 201)


@pytest.mark.parametrize(
    ("budget", "images", "level"),
    [
        (360, 4, {}),  # 240 at a batch's peak
        (359, 2, {}),
        (255, 2, {}),  # 120, and 10 + 5 of what is made once
        (254, 1, {}),
        (190, 1, {}),  # 60 and 5 + 5
        (189, 1, {"layer": ("a",)}),  # 52 and 5 + 5
        (182, 1, {"layer": ("a",)}),
        (181, 1, {"layer": ("a", "b")}),
    ],
)
def test_replays_of_as_many_images_as_fit(budget, images, level):
    plan = planner().plan(budget)
    assert (plan.replay_batch, plan.replay_level) == (images, level)
    assert (
        plan.replay_extra == 100 + 100 * sum(ITEMS[name][0] * ITEMS[name][1] for name in level.get("layer", ())) / 400
    )


def test_every_budget_is_kept_to_and_well_spent():
    """Against all ways to store three steps, by a walk along the chain of its own."""
    made = planner()
    ways = list(itertools.product((None, 0, 1, 2), repeat=3))
    regrets, before = [], 1000.0
    for budget in range(175, 770, 7):
        plan = planner().plan(budget)
        assert taken(plan) <= plan.peak_bytes <= min(budget, taken(plan) + budget // 100)
        assert plan.kept_bytes == tuple(Made().step(BATCH, level).kept for level in plan.levels)
        replay = made._replay(budget, 0)
        others = [made._assembled(way, replay, budget, 0) for way in ways]
        best = min(other.extra_percent for other in others if taken(other) <= budget)
        regrets.append(plan.extra_percent - best)
        assert plan.extra_percent <= before + 1e-9
        before = plan.extra_percent
    # A step that is stored is a whole one, so what is left may be up to one that makes all of its 160 FLOPs again.
    assert max(regrets) <= 100 * 160 / 400 / 3 + 1e-9 and sorted(regrets)[len(regrets) // 2] == 0


def test_a_reserve_takes_the_place_of_stored_steps():
    for reserve in (0, 50, 150, 300):
        for budget in (400, 500, 620, 760):
            plan = planner().plan(budget, reserve)
            assert taken(plan, reserve) <= plan.peak_bytes <= budget and plan.reserve == reserve


def test_how_many_steps_can_be_stored():
    """At the least a step keeps 120; 100 are fixed, 60 and 20 are taken at a time in its backward."""
    assert [planner().longest(budget) for budget in (299, 300, 419, 420)] == [0, 1, 1, 2]
    assert planner().longest(420, reserve=100) == 1 and planner().longest(0) == 0


def test_without_a_gradient_the_sampling_is_all():
    plan = planner(modes=("none", "none")).plan(10_000)
    assert plan.replays == plan.differentiated == 0 and plan.plain_flops == plan.flops == 2 * 400
    # (2 T + 6) latents and what is made once, and a forward.
    assert plan.peak_bytes == 40 + 20 + 40


def test_flops_of_a_mixed_plan():
    """Of 3 steps one keeps all, one makes 40 FLOPs again, one is replayed whole: 440 of 3 * 400."""
    made = planner()
    plan = made._assembled([None, 1, 0], made._replay(10_000, 0), 10_000, 0)
    assert plan.stored == (None, None, 0, 1) and plan.levels == ({"layer": ("a",)}, {})
    assert plan.level_extra == (10, 0) and plan.extra_percent == pytest.approx(110 / 3)
    assert plan.flops == 4000 + 440


def test_the_hull_has_no_point_above_a_line_between_others():
    points = [_Point(0, 100, None), _Point(10, 95, 3), _Point(20, 20, 2), _Point(30, 25, 1), _Point(40, 0, 0)]
    assert _hull(points) == [points[0], points[2], points[4]]
    assert _hull([points[0], points[0]]) == [points[0]]
    steep_then_flat = [_Point(0, 100, 2), _Point(1, 90, 1), _Point(100, 0, 0)]
    assert _hull(steep_then_flat) == steep_then_flat


def test_plans_that_contradict_themselves_are_refused():
    with pytest.raises(ValueError, match="stored names level 1, and there are 1"):
        Plan(2, (0, 1), ({},), None, 1, 2)
    with pytest.raises(ValueError, match="stored names level -1"):
        Plan(2, (-1,), ({},), None, 1, 2)
    for images in (0, 3):
        with pytest.raises(ValueError, match=rf"replay_batch={images} must lie in \[1, batch=2\]"):
            Plan(2, (None,), (), None, images, 1)


def test_work_is_equal_for_plans_that_do_the_same():
    levels = ({"x": ("1",), "y": ("2",)}, {"y": ("2",), "x": ("1",)})
    one, same = (Plan(2, (0,), (level,), level, 1, 1, peak_bytes=i) for i, level in enumerate(levels))
    assert one.work == same.work and hash(one.work) == hash(same.work)
    other = Plan(2, (0,), (levels[0],), "block", 1, 1)
    assert other.work != one.work != Plan(2, (0,), (levels[0],), levels[0], 2, 1).work


def test_halving():
    """Of five stored steps the first three are given up, then the pieces of five images are of three, two and one."""
    plan = Plan(5, (None, 0, 0, 0, 0, 0), ({},), {}, 5, 5, peak_bytes=9)
    smaller = plan.smaller()
    assert smaller.stored == (None, None, None, None, 0, 0) and smaller.peak_bytes == 0
    sizes = []
    while (plan := plan.smaller()) is not None:
        sizes.append((plan.replays, plan.replay_batch, plan.replay_level))
    assert sizes == [(3, 5, {}), (4, 5, {}), (5, 5, {}), (5, 3, {}), (5, 2, {}), (5, 1, {}), (5, 1, "block")]


def test_a_plan_in_words():
    plan = Plan(2, (None, 1, 0), ({"x": ("1",)}, {}), {}, 1, 3, 2048, 1024, (100, 200), (10.0, 0.0), 100.0, 1000, 9000)
    words = str(plan)
    assert "3 of 3 steps differentiated, 2 images: 1 stored at 100" in words and "1 stored at 200" in words
    assert "1 replayed 1 images at a time" in words and "within" in words
    assert "36.7% of the differentiated forwards' FLOPs run twice" in words


@pytest.mark.parametrize("batch", [2, 5, 6, 7, 12])
def test_pieces_of_any_batch_are_the_largest_that_fit(batch):
    """A replay of i images takes 60 i at its peak, and a piece 5 i + 5 of what is made once besides."""
    sizes = {-(-batch // pieces) for pieces in range(2, batch + 1)}
    peaks = {batch: 60 * batch} | {images: 65 * images + 5 for images in sizes}
    made = planner(batch)
    for room in range(70, 60 * batch + 20, 5):
        replay = made._replay(made.fixed + GRADIENTS + room, 0)
        assert replay.again == 0 and replay.images == max(images for images, peak in peaks.items() if peak <= room)
        assert replay.peak == peaks[replay.images]


def test_a_batch_of_one_has_no_pieces():
    """14 latents of 1, 3 outputs of 2 and 5 made once; 30 kept, 10 and 5 more, 20 of gradients, and nothing besides."""
    assert planner(1).least()["a replay of one image"] == 25 + GRADIENTS + 45
