"""What the papers claim of their algorithms, asked of the curves; what does not reproduce stays, with what was seen."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

DIRECT = ("draft", "draft_k", "draft_lv", "draft_plus", "alignprop", "alignprop_released", "refl", "drtune")
ONLINE = ("ddpo", "dpok")
# DRaFT-LV asks for the reward of a sample several times.
_COUNTED = {"queries": "reward queries", "samples": "samples"}


class Curve(NamedTuple):
    """A run's evaluations in their order, the first before training."""

    queries: Sequence[float]
    samples: Sequence[float]
    unet_evaluations: Sequence[float]
    seconds: Sequence[float]
    reward: Sequence[float]
    held_out: Sequence[float]
    drift: Sequence[float]


def crossing(c: Curve, level: float, of: str) -> float:
    """What `of` was when the reward first reached a level, between evaluations on a straight line.

    Raises: ValueError where it never did.
    """
    values = getattr(c, of)
    if c.reward[0] >= level:
        return values[0]
    for i in range(1, len(c.reward)):
        if c.reward[i] >= level:
            share = (level - c.reward[i - 1]) / (c.reward[i] - c.reward[i - 1])
            return values[i - 1] + share * (values[i] - values[i - 1])
    raise ValueError(f"the reward never reached {level}; its best was {max(c.reward)}")


def reward_at(c: Curve, queries: float) -> float:
    """The reward after so many queries, between evaluations on a straight line."""
    for i in range(1, len(c.queries)):
        if c.queries[i] >= queries:
            share = (queries - c.queries[i - 1]) / (c.queries[i] - c.queries[i - 1])
            return c.reward[i - 1] + share * (c.reward[i] - c.reward[i - 1])
    return c.reward[-1]


def common_level(*groups: Sequence[Curve]) -> float | None:
    """The highest reward that every run of all groups reached; None where one never rose above where all began."""
    level = min(max(c.reward) for group in groups for c in group)
    return level if level > max(c.reward[0] for group in groups for c in group) else None


def raises_reward(curves: Sequence[Curve]) -> bool:
    """Whether the last reward lies above the first in every run, and in the mean by two standard deviations of it."""
    changes = [c.reward[-1] - c.reward[0] for c in curves]
    spread = statistics.stdev(changes) if len(changes) > 1 else 0.0
    return min(changes) > 0 and statistics.fmean(changes) > 2 * spread


def claims(curves: Mapping[str, Sequence[Curve]]) -> list[dict[str, Any]]:
    """A row for each claim whose algorithms are there: what was seen, and whether it is as claimed."""
    found = [_raises_reward(curves)] if curves else []
    if "ddpo" in curves:
        found += [_fewer(curves, name, "ddpo", 10) for name in DIRECT if name in curves]
    if {"draft_lv", "refl"} <= curves.keys():
        found += [_fewer(curves, "draft_lv", "refl", 1, of) for of in ("queries", "samples")]
    if {"dpok", "ddpo"} <= curves.keys():
        found.append(_less_drift(curves, "dpok", "ddpo"))
    found += [
        _higher_at_equal_queries(curves, online, offline)
        for online in ONLINE
        for offline in ("sft", "sft_kl_o")
        if {online, offline} <= curves.keys()
    ]
    return found


def _raises_reward(curves: Mapping[str, Sequence[Curve]]) -> dict[str, Any]:
    not_so = [name for name, seen in curves.items() if not raises_reward(seen)]
    seen = f"not {', '.join(not_so)}" if not_so else f"all {len(curves)}"
    return _row("every algorithm raises the trained reward beyond seed noise", seen, not not_so)


def _fewer(
    curves: Mapping[str, Sequence[Curve]], fast: str, slow: str, times: float, of: str = "queries"
) -> dict[str, Any]:
    """At the highest reward that all runs of both reached, the ratio of the mean numbers of queries, or samples."""
    factor = f"{times:g} times " if times != 1 else ""
    title = f"{fast} needs {factor}fewer {_COUNTED[of]} than {slow} for one reward"
    level = common_level(curves[fast], curves[slow])
    if level is None:
        return _row(title, "no reward above the first that all runs of both reach", False)
    used = {name: [crossing(c, level, of) for c in curves[name]] for name in (fast, slow)}
    ratio = statistics.fmean(used[slow]) / statistics.fmean(used[fast])
    seen = f"{ratio:.1f} times fewer at {level:.2f}: {_mean(used[fast], '.0f')} against {_mean(used[slow], '.0f')}"
    return _row(title, seen, ratio >= times if times != 1 else ratio > 1)


def _less_drift(curves: Mapping[str, Sequence[Curve]], held: str, free: str) -> dict[str, Any]:
    title = f"{held}'s KL keeps its drift below {free}'s at one reward"
    level = common_level(curves[held], curves[free])
    if level is None:
        return _row(title, "no reward above the first that all runs of both reach", False)
    drift = {name: [crossing(c, level, "drift") for c in curves[name]] for name in (held, free)}
    seen = f"at {level:.2f}: {_mean(drift[held], '.4f')} against {_mean(drift[free], '.4f')}"
    return _row(title, seen, statistics.fmean(drift[held]) < statistics.fmean(drift[free]))


def _higher_at_equal_queries(curves: Mapping[str, Sequence[Curve]], better: str, worse: str) -> dict[str, Any]:
    queries = min(c.queries[-1] for name in (better, worse) for c in curves[name])
    at = {name: [reward_at(c, queries) for c in curves[name]] for name in (better, worse)}
    seen = f"after {queries:.0f} queries: {_mean(at[better], '.2f')} against {_mean(at[worse], '.2f')}"
    as_claimed = statistics.fmean(at[better]) > statistics.fmean(at[worse])
    return _row(f"online {better} beats KL-regularised {worse}", seen, as_claimed)


def _row(claim: str, seen: str, as_claimed: bool) -> dict[str, Any]:
    return {"claim": claim, "seen": seen, "reproduces": "yes" if as_claimed else "no"}


def _mean(values: Sequence[float], spec: str) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{spec}} ± {spread:{spec}}"
