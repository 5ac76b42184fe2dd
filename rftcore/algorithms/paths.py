"""Where each reward-gradient algorithm lets the gradient flow: the family, told apart by where it is stopped.

T is the sampler's num_inference_steps; steps are counted from 0, the one with most noise. What is random is drawn once
a call, for a whole batch, from a `torch.Generator` on the CPU: generators of one seed draw the same in every process.
"""

from __future__ import annotations

import math

import torch

from rftcore.sampling import GradientPath
from rftcore.sampling.gradient_path import is_whole


def draft(T: int) -> GradientPath:
    """The exact gradient through all T steps.

    Raises: ValueError unless T >= 1.
    Source: DRaFT (arXiv 2309.17400).
    """
    _check("T", T, 1)
    return GradientPath.last(None, T)


def draft_k(T: int, k: int) -> GradientPath:
    """The exact gradient through the last k steps; DRaFT-LV's sample is draft_k(T, 1).

    Raises: ValueError unless 1 <= k <= T.
    Source: DRaFT-K (arXiv 2309.17400).
    """
    _check("T", T, 1)
    _check("k", k, 1, T)
    return GradientPath.last(k, T)


def alignprop_released(T: int, lo: int, hi: int, generator: torch.Generator) -> GradientPath:
    """AlignProp as its first code and TRL had it: every step draws anew whether its UNet output is detached.

    Step i draws b from lo..hi, both included, and keeps its gradient where b <= i: with the probability
    (i + 1 - lo) / (hi - lo + 1), clipped to [0, 1]. The released lo, hi are 0, 50 at T = 50. Another truncation than
    the paper's (`alignprop_paper`), as its authors say in AlignProp#15.

    Returned as drawn, also where nothing is kept (`GradientPath.reaches_model` is False, such a rollout trains
    nothing): 1e-21 of all draws at the released setting, 2/3 at lo = T - 1, hi = T + 1.

    Raises: ValueError unless T >= 1, 0 <= lo < T and lo <= hi, or for a generator that is not on the CPU.
    Source: AlignProp (arXiv 2310.03739), the released code.
    """
    _check("T", T, 1)
    _check("lo", lo, 0, T - 1)
    _check("hi", hi, lo)
    b = torch.randint(lo, hi + 1, (T,), generator=_on_cpu(generator)).tolist()
    return GradientPath(tuple("full" if b[i] <= i else "detach_eps" for i in range(T)))


def alignprop_paper(T: int, generator: torch.Generator) -> GradientPath:
    """AlignProp as its paper has it: the last K steps, K uniform on 1..T, drawn once a rollout.

    The paper's U(0, T) is read without K = 0, which would train nothing. With the steps before the last K wholly
    constant: detaching only their UNet outputs gives the parameters the same gradient.

    Raises: ValueError unless T >= 1, or for a generator that is not on the CPU.
    Source: AlignProp (arXiv 2310.03739); the bounds are not verified there.
    """
    _check("T", T, 1)
    return GradientPath.last(_between(1, T, generator), T)


def alignprop_gaussian(T: int, mean: float, std: float, generator: torch.Generator) -> GradientPath:
    """AlignProp as its repository has it now: the last K = T - b steps, b gaussian, drawn once a rollout.

    b is the index of the first step that keeps its gradient: N(mean, std) rounded towards zero, drawn again until
    1 <= b < T. The released mean, std are 42, 5 at T = 50: K is 9.09 on average (not 8: b is rounded down, and the 5%
    beyond T are drawn again).

    Raises: ValueError unless T >= 2, 1 <= mean < T and 0 <= std <= T, or for a generator that is not on the CPU.
    Source: AlignProp's repository, `sd_pipeline.py`, backprop_strategy="gaussian".
    """
    _check("T", T, 2)
    if not 1 <= mean < T:
        raise ValueError(f"mean={mean} must lie in [1, T={T}): the index of a step, 0 the one with most noise.")
    if not 0 <= std <= T:
        raise ValueError(f"std={std} must lie in [0, T={T}], in steps.")
    generator = _on_cpu(generator)
    b = 0
    while not 1 <= b < T:
        b = math.trunc(mean + std * torch.randn((), dtype=torch.float64, generator=generator).item())
    return GradientPath.last(T - b, T)


def refl(T: int, first: int, last: int, generator: torch.Generator) -> GradientPath:
    """ReFL: no gradient up to a step uniform on first..last, both included, which has one, and gives its predicted x_0.

    That step's x_t is a constant, and the chain ends with it. Released: T = 40, first, last = 30, 39.

    Raises: ValueError unless T >= 1 and 0 <= first <= last < T, or for a generator that is not on the CPU.
    Source: ReFL (arXiv 2304.05977), the released code.
    """
    _check("T", T, 1)
    _check("first", first, 0, T - 1)
    _check("last", last, first, T - 1)
    step = _between(first, last, generator)
    return GradientPath(("none",) * step + ("detach_x",), stop=step + 1, output="x0")


def drtune(T: int, steps: int, earliest_stop: int, generator: torch.Generator) -> GradientPath:
    """DRTune: a few equally spaced steps are trained, with the UNet's input detached at every step.

    The chain is stopped after N steps, N uniform on earliest_stop..T, and gives its predicted x_0: a stop in the last
    40% is earliest_stop = T - round(0.4 T) + 1, 31 at T = 50. Of these N the trained ones are N // steps apart, from
    an offset drawn uniformly from all that fit, so that every rollout trains all of them. Their modes are
    "detach_input"; the others' are "detach_eps", for x_t's linear path goes on through them.

    Published with 3 steps. Spacing and offset are those of FlowBP's code of DRTune; the paper's own are not verified.

    Raises: ValueError unless T >= 1, 1 <= steps <= T and steps <= earliest_stop <= T, or for a generator that is not
        on the CPU.
    Source: DRTune (arXiv 2405.00760); FlowBP's code of it.
    """
    _check("T", T, 1)
    _check("steps", steps, 1, T)
    _check("earliest_stop", earliest_stop, steps, T)
    N = _between(earliest_stop, T, generator)
    stride = N // steps
    offset = _between(0, N - 1 - (steps - 1) * stride, generator)
    trained = range(offset, offset + steps * stride, stride)
    modes = tuple("detach_input" if i in trained else "detach_eps" for i in range(N))
    return GradientPath(modes, stop=N, output="x0")


def _check(name: str, value: int, least: int, most: int | None = None) -> None:
    if not is_whole(value) or value < least or (most is not None and value > most):
        allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}={value!r} must be a whole number {allowed}.")


def _between(least: int, most: int, generator: torch.Generator) -> int:
    """Uniform on least..most, both included."""
    return int(torch.randint(least, most + 1, (), generator=_on_cpu(generator)))


def _on_cpu(generator: torch.Generator) -> torch.Generator:
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        raise ValueError(
            f"generator={generator!r} must be a torch.Generator on the CPU, seeded alike in every process: "
            "torch.Generator().manual_seed(seed)."
        )
    return generator
