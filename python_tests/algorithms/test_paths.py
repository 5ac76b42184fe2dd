"""The gradient paths: their modes, how often each is drawn, and their gradients against chains written by hand."""

import collections
import math

import pytest
import torch
from diffusers import DDIMScheduler
from models import UNETS, add_lora

from rftcore.algorithms import paths
from rftcore.sampling import CheckpointedSampler, Plan

T, GUIDANCE = 6, 3.0


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def backprop_steps(path):
    """K of a path whose last K steps are full and whose others are constant."""
    k = path.modes.count("full")
    assert path.modes == ("none",) * (len(path.modes) - k) + ("full",) * k
    assert path.stop is None and path.output == "latents"
    return k


def check_frequencies(drawn, probabilities):
    """Every value of `drawn` within 5 binomial standard deviations of its probability, and no other value."""
    counts, n = collections.Counter(drawn), len(drawn)
    assert set(counts) <= {value for value, p in probabilities.items() if p > 0}
    for value, p in probabilities.items():
        assert abs(counts[value] - n * p) <= 5 * math.sqrt(n * p * (1 - p)), (value, counts[value], n * p)


def test_draft_modes():
    assert paths.draft(3).modes == ("full", "full", "full")
    assert paths.draft_k(3, 1).modes == ("none", "none", "full")
    assert paths.draft_k(3, 3) == paths.draft(3)


def test_alignprop_released_keeps_each_step_with_its_own_probability():
    """lo, hi = 1, 8 at T = 6: step i is kept where b <= i, b of 1..8: 0, 1/8, 2/8, ... 5/8, each drawn alone."""
    generator, n = seeded(), 4000
    kept = []
    for _ in range(n):
        path = paths.alignprop_released(6, 1, 8, generator)
        assert set(path.modes) <= {"full", "detach_eps"} and path.stop is None and path.output == "latents"
        kept.append([mode == "full" for mode in path.modes])
    for i in range(6):
        check_frequencies([row[i] for row in kept], {True: i / 8, False: 1 - i / 8})
    # One threshold a rollout would keep both steps with probability 4/8.
    check_frequencies([row[4] and row[5] for row in kept], {True: 4 / 8 * 5 / 8, False: 1 - 4 / 8 * 5 / 8})


def test_alignprop_released_probabilities_are_clipped():
    """lo, hi = 1, 3 at T = 6: 0 before step 1, 1 from step 3 on."""
    generator = seeded()
    for _ in range(50):
        modes = paths.alignprop_released(6, 1, 3, generator).modes
        assert modes[0] == "detach_eps" and modes[3:] == ("full",) * 3


def test_alignprop_released_as_published():
    """(i + 1) / 51 at T = 50: 25 steps on average, the last one kept 50 times of 51."""
    generator, n = seeded(), 2000
    kept = torch.tensor([
        [mode == "full" for mode in paths.alignprop_released(50, 0, 50, generator).modes] for _ in range(n)
    ])  # fmt: skip
    p = torch.arange(1, 51, dtype=torch.float64) / 51
    assert ((kept.double().mean(0) - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def test_a_rollout_that_trains_nothing_can_be_seen():
    """lo, hi = 2, 4 at T = 3: only the last step may be kept, with probability 1/3."""
    generator = seeded()
    drawn = [paths.alignprop_released(3, 2, 4, generator) for _ in range(600)]
    check_frequencies([path.reaches_model for path in drawn], {True: 1 / 3, False: 2 / 3})
    assert all(path.reaches_model == (path.modes[2] == "full") for path in drawn)


def test_alignprop_paper_is_uniform_from_1_to_T():
    generator = seeded()
    drawn = [backprop_steps(paths.alignprop_paper(5, generator)) for _ in range(2000)]
    check_frequencies(drawn, dict.fromkeys(range(1, 6), 1 / 5))
    assert backprop_steps(paths.alignprop_paper(1, generator)) == 1


def test_alignprop_gaussian_as_published():
    """b = trunc(N(42, 5)) given 1 <= b < 50, K = 50 - b: P(K) ~ Phi((b + 1 - 42) / 5) - Phi((b - 42) / 5)."""

    def below(b):
        return (1 + math.erf((b - 42) / 5 / math.sqrt(2))) / 2

    weights = {50 - b: below(b + 1) - below(b) for b in range(1, 50)}
    total = sum(weights.values())
    probabilities = {k: weight / total for k, weight in weights.items()}
    mean = sum(k * p for k, p in probabilities.items())
    assert mean == pytest.approx(9.0887, abs=1e-4)
    generator, n = seeded(), 4000
    drawn = [backprop_steps(paths.alignprop_gaussian(50, 42, 5, generator)) for _ in range(n)]
    # Where 5 deviations of a rare value are less than one draw, the bound would forbid it.
    common = {k: p for k, p in probabilities.items() if n * p > 1}
    for k, p in common.items():
        assert abs(drawn.count(k) - n * p) <= 5 * math.sqrt(n * p * (1 - p)), k
    variance = sum((k - mean) ** 2 * p for k, p in probabilities.items())
    assert abs(sum(drawn) / n - mean) <= 5 * math.sqrt(variance / n)


def test_alignprop_gaussian_without_spread():
    """b = trunc(3.7) = 3 of T = 5: steps 3 and 4 keep their gradient."""
    assert paths.alignprop_gaussian(5, 3.7, 0, seeded()).modes == ("none", "none", "none", "full", "full")


def test_refl_is_uniform_on_the_late_steps():
    generator = seeded()
    drawn = [paths.refl(40, 30, 39, generator) for _ in range(2000)]
    check_frequencies([path.stop for path in drawn], dict.fromkeys(range(31, 41), 1 / 10))
    for path in drawn:
        assert path.modes == ("none",) * (path.stop - 1) + ("detach_x",) and path.output == "x0"
    only = paths.refl(4, 2, 2, generator)
    assert (only.modes, only.stop, only.output) == (("none", "none", "detach_x"), 3, "x0")


def test_drtune_modes_of_small_chains():
    """T = 4, 2 steps, no early stop: 2 apart, from 0 or 1. T = 3, 1 step: any of the steps taken."""
    generator, i, e = seeded(), "detach_input", "detach_eps"
    drawn = [paths.drtune(4, 2, 4, generator) for _ in range(600)]
    assert all(path.stop == 4 and path.output == "x0" for path in drawn)
    check_frequencies([path.modes for path in drawn], {(i, e, i, e): 1 / 2, (e, i, e, i): 1 / 2})
    expected = {(i, e): 1 / 4, (e, i): 1 / 4, (i, e, e): 1 / 6, (e, i, e): 1 / 6, (e, e, i): 1 / 6}
    check_frequencies([paths.drtune(3, 1, 2, generator).modes for _ in range(1200)], expected)
    assert paths.drtune(2, 2, 2, generator).modes == (i, i)


def test_drtune_as_published():
    """T = 50, 3 steps, a stop in the last 40%: N of 31..50, 3 trained N // 3 apart, every offset that fits."""
    generator = seeded()
    drawn = [paths.drtune(50, 3, 31, generator) for _ in range(4000)]
    check_frequencies([path.stop for path in drawn], dict.fromkeys(range(31, 51), 1 / 20))
    offsets = collections.defaultdict(set)
    for path in drawn:
        trained = [step for step, mode in enumerate(path.modes) if mode == "detach_input"]
        stride = path.stop // 3
        assert trained == [trained[0], trained[0] + stride, trained[0] + 2 * stride]
        assert set(path.modes) == {"detach_input", "detach_eps"} and path.reaches_model
        offsets[path.stop].add(trained[0])
    assert offsets == {N: set(range(N - 2 * (N // 3))) for N in range(31, 51)}


DRAWN = {
    "alignprop_released": lambda generator: paths.alignprop_released(50, 0, 50, generator),
    "alignprop_paper": lambda generator: paths.alignprop_paper(50, generator),
    "alignprop_gaussian": lambda generator: paths.alignprop_gaussian(50, 42, 5, generator),
    "refl": lambda generator: paths.refl(40, 30, 39, generator),
    "drtune": lambda generator: paths.drtune(50, 3, 31, generator),
}


@pytest.mark.parametrize("name", DRAWN)
def test_generators_of_one_seed_draw_the_same(name):
    """Whatever the process did with torch's own generator; and a rollout's draw is not the one before."""
    first, second = seeded(7), seeded(7)
    ours = [DRAWN[name](first) for _ in range(20)]
    torch.manual_seed(123)
    theirs = [DRAWN[name](second) for _ in range(20)]
    assert ours == theirs
    assert len(set(ours)) > 1


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("generator", [None, 7])
def test_generators_are_checked(name, generator):
    with pytest.raises(ValueError, match=f"generator={generator} must be a torch.Generator on the CPU"):
        DRAWN[name](generator)


@pytest.mark.parametrize(("make", "message"), [
    (lambda: paths.draft(0), "T=0 must be a whole number of at least 1"),
    (lambda: paths.draft(2.5), "T=2.5 "),
    (lambda: paths.draft_k(4, 0), "k=0 must be a whole number from 1 to 4"),
    (lambda: paths.draft_k(4, 5), "k=5 "),
    (lambda: paths.alignprop_released(4, 4, 5, seeded()), "lo=4 must be a whole number from 0 to 3"),
    (lambda: paths.alignprop_released(4, -1, 5, seeded()), "lo=-1 "),
    (lambda: paths.alignprop_released(4, 2, 1, seeded()), "hi=1 must be a whole number of at least 2"),
    (lambda: paths.alignprop_paper(0, seeded()), "T=0 "),
    (lambda: paths.alignprop_gaussian(1, 1, 0, seeded()), "T=1 must be a whole number of at least 2"),
    (lambda: paths.alignprop_gaussian(50, 50, 5, seeded()), r"mean=50 must lie in \[1, T=50\)"),
    (lambda: paths.alignprop_gaussian(50, math.nan, 5, seeded()), "mean=nan "),
    (lambda: paths.alignprop_gaussian(50, 42, -1, seeded()), r"std=-1 must lie in \[0, T=50\]"),
    (lambda: paths.alignprop_gaussian(50, 42, math.inf, seeded()), "std=inf "),
    (lambda: paths.refl(40, 40, 40, seeded()), "first=40 must be a whole number from 0 to 39"),
    (lambda: paths.refl(40, 30, 40, seeded()), "last=40 must be a whole number from 30 to 39"),
    (lambda: paths.refl(40, 30, 29, seeded()), "last=29 "),
    (lambda: paths.drtune(50, 0, 31, seeded()), "steps=0 must be a whole number from 1 to 50"),
    (lambda: paths.drtune(50, 3, 2, seeded()), "earliest_stop=2 must be a whole number from 3 to 50"),
    (lambda: paths.drtune(50, 3, 51, seeded()), "earliest_stop=51 "),
])  # fmt: skip
def test_numbers_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class Rollout:
    """A tiny guided UNet's DDIM chain, by `CheckpointedSampler` and written out in plain autograd."""

    def __init__(self):
        self.unet = add_lora(UNETS["sd1"]().double().eval())
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        self.scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        )  # fmt: skip
        self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.double()
        self.scheduler.final_alpha_cumprod = self.scheduler.final_alpha_cumprod.double()
        self.positive, self.negative = torch.randn(2, 2, 5, 12, dtype=torch.float64)
        self.noise, self.weight = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)

    def gradient(self, end):
        return torch.autograd.grad((self.weight * end.tanh()).sum(), self.parameters)

    def by_sampler(self, path):
        sampler = CheckpointedSampler(
            self.unet, self.scheduler, num_inference_steps=T, guidance_scale=GUIDANCE, gradient_path=path,
            plan=Plan.replayed(path.modes, 2),
        )  # fmt: skip
        return self.gradient(sampler(self.positive, self.negative, latents=self.noise).latents)

    def by_hand(self, see, keep, stop=None):
        """see(i, x): the x_t that the UNet is given at step i; keep(i, eps): the eps that the step is made with."""
        self.scheduler.set_timesteps(T)
        prompts = torch.cat([self.negative, self.positive])
        x = self.noise
        for i, t in enumerate(self.scheduler.timesteps.tolist()):
            seen = see(i, x)
            negative, positive = self.unet(torch.cat([seen, seen]), t, prompts, return_dict=False)[0].chunk(2)
            eps = keep(i, negative + GUIDANCE * (positive - negative))
            a_t = self.scheduler.alphas_cumprod[t]
            previous = t - 1000 // T
            a_p = self.scheduler.alphas_cumprod[previous] if previous >= 0 else self.scheduler.final_alpha_cumprod
            x_0 = (x - (1 - a_t).sqrt() * eps) / a_t.sqrt()
            if i + 1 == stop:
                return self.gradient(x_0)
            x = a_p.sqrt() * x_0 + (1 - a_p).sqrt() * eps
        return self.gradient(x)


def check_equal(found, expected):
    assert any(theirs.abs().max() > 0 for theirs in expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11 * float(theirs.abs().max()))


def test_alignprop_released_gradient():
    """eps.detach() at the steps that were drawn, x_t's linear path kept."""
    rollout, path = Rollout(), paths.alignprop_released(T, 0, T, seeded(1))
    kept = [i for i in range(T) if path.modes[i] == "full"]
    assert 1 < len(kept) < T and kept != list(range(kept[0], T))  # not one block
    expected = rollout.by_hand(lambda i, x: x, lambda i, eps: eps if i in kept else eps.detach())
    check_equal(rollout.by_sampler(path), expected)


@pytest.mark.parametrize("draw", [
    lambda generator: paths.alignprop_paper(T, generator),
    lambda generator: paths.alignprop_gaussian(T, 4, 1, generator),
])  # fmt: skip
def test_alignprop_once_a_rollout_gradient(draw):
    """eps.detach() for i < T - K, as the repository has it: the same as steps that are wholly constant."""
    rollout, path = Rollout(), draw(seeded(3))
    b = T - backprop_steps(path)
    assert 0 < b < T
    expected = rollout.by_hand(lambda i, x: x, lambda i, eps: eps if i >= b else eps.detach())
    check_equal(rollout.by_sampler(path), expected)


def test_refl_gradient():
    """no_grad up to the step, then x_0 of its x_t, a constant."""
    rollout, path = Rollout(), paths.refl(T, 2, 4, seeded())
    step = path.stop - 1
    expected = rollout.by_hand(
        lambda i, x: x.detach(), lambda i, eps: eps if i == step else eps.detach(), stop=path.stop
    )
    check_equal(rollout.by_sampler(path), expected)


def test_drtune_gradient():
    """The UNet is given x_t.detach() at every step, eps.detach() where it is not trained; ends with x_0."""
    rollout, generator, ends = Rollout(), seeded(), set()
    for _ in range(6):
        path = paths.drtune(T, 2, 4, generator)
        trained = [i for i, mode in enumerate(path.modes) if mode == "detach_input"]
        expected = rollout.by_hand(
            lambda i, x: x.detach(), lambda i, eps: eps if i in trained else eps.detach(), stop=path.stop
        )
        check_equal(rollout.by_sampler(path), expected)
        ends.add((path.stop < T, trained[-1] + 1 < path.stop))
    assert {early for early, _ in ends} == {late for _, late in ends} == {True, False}
