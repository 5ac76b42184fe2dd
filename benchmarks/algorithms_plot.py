"""Curves of the algorithms: reward and held-out judge against reward queries and against seconds."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.algorithms_claims import DIRECT, Curve

_X = {"queries": "reward queries", "seconds": "seconds of training, one thread"}
_Y = {"reward": "reward on held-out prompts, nats", "held_out": "held-out judge, share"}


def why_not() -> str | None:
    """Why nothing can be drawn, if nothing can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    return None


def draw(curves: Mapping[str, Sequence[Curve]], yardstick: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Writes a PNG of means over the seeds, with bands of a standard deviation; direct gradients' lines are solid."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(13, 9), sharey="row")
    colours = plt.get_cmap("tab20").colors
    for row, (y, y_title) in enumerate(_Y.items()):
        for column, (x, x_title) in enumerate(_X.items()):
            panel = axes[row][column]
            for number, (name, seen) in enumerate(curves.items()):
                xs = [statistics.fmean(values) for values in zip(*(getattr(c, x) for c in seen), strict=True)]
                columns = list(zip(*(getattr(c, y) for c in seen), strict=True))
                mean = [statistics.fmean(values) for values in columns]
                spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in columns]
                style = {"color": colours[number % 20], "linestyle": "-" if name in DIRECT else "--"}
                # The first point lies at no queries, which a log axis has no place for.
                panel.plot(xs[1:], mean[1:], label=name, **style)
                low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
                panel.fill_between(xs[1:], low[1:], high[1:], color=style["color"], alpha=0.12, linewidth=0)
            if yardstick and x == "queries":
                points = [each["points"] for each in yardstick]
                xs = [point["n"] for point in points[0]]
                mean = [
                    statistics.fmean(values) for values in zip(*([p[y] for p in each] for each in points), strict=True)
                ]
                panel.plot(xs, mean, color="black", linestyle=":", marker=".", label="best of n, queries an image")
            panel.set_xscale("log")
            panel.set_xlabel(x_title)
            panel.set_ylabel(y_title)
            panel.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=6, fontsize="small")
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
