"""Time against memory: every method a point, ours a curve over budgets, a panel for each number of differentiated steps.

python -m benchmarks.side_by_side_plot      # from benchmarks/results/side_by_side.json
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.algorithms_plot import why_not
from benchmarks.harness import RESULTS
from benchmarks.side_by_side import read
from rftcore.bench.methods import OURS

PANELS = {"1": "K = 1", "5": "K = 5", "all": "K = all"}
MODELS = {"37m": "37 M UNet, 10 steps, batch 1, fp32", "digits": "digits, 10 steps, batch 4, fp32"}

Row = Mapping[str, Any]
# A method's colour, and the marker of its checkpoints.
_COLOURS = {"stock": "tab:gray", "fp32_lora": "tab:olive", "autocast": "tab:purple", "compile": "tab:orange"}
_MARKERS = {"": "o", "+steps": "s", "+blocks": "^", "+steps+blocks": "D", "+steps+blocks+images": "P"}


def draw(rows: Sequence[Row], model: str, path: Path) -> Path:
    """Writes a PNG of a model's DRaFT rows that were timed."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure, axes = plt.subplots(1, len(PANELS), figsize=(16, 5.5), squeeze=False)
    for panel, (count, title) in zip(axes[0], PANELS.items(), strict=True):
        seen = [row for row in rows if row["part"] == f"{model}/draft/{count}" and "median_s" in row]
        for row in seen:
            if not row["method"].startswith(OURS):
                _point(panel, row)
        curve = sorted((_memory(row)[0], row["median_s"]) for row in seen if row["method"].startswith(OURS))
        if curve:
            panel.plot(*zip(*curve, strict=True), color="tab:blue", marker="o", label="rftcore, over budgets", zorder=3)
        panel.set_title(f"{MODELS.get(model, model)}: {title}", fontsize="medium")
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_ylim(0, 1.08 * max((row["median_s"] for row in seen), default=1))
        panel.set_xlabel("peak MiB beyond the weights")
        panel.set_ylabel("seconds of a training step")
        panel.grid(alpha=0.3, which="both")
    named = {
        label: handle for panel in axes[0] for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="lower center", ncols=5, fontsize="small")
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _point(panel: Any, row: Row) -> None:
    base, plus, rest = row["method"].partition("+")
    mib, counted = _memory(row)
    colour = _COLOURS.get(base.partition("@")[0], "black")
    # What cannot be counted is hollow: it stands at what the process took.
    style = {
        "color": colour,
        "marker": _MARKERS.get(plus + rest, "x"),
        "markerfacecolor": colour if counted else "none",
    }
    panel.plot([mib], [row["median_s"]], linestyle="", label=row["method"] + ("" if counted else " (RSS)"), **style)


def _memory(row: Row) -> tuple[float, bool]:
    """MiB, and whether they were counted."""
    if "peak_mib" in row:
        return row["peak_mib"], True
    return row.get("rss_mib", row.get("cuda_mib", float("nan"))), False


def main() -> None:
    if reason := why_not():
        raise SystemExit(reason)
    rows = read().get("rows", [])
    for model in MODELS:
        if any(row["part"].startswith(f"{model}/draft/") and "median_s" in row for row in rows):
            path = draw(rows, model, RESULTS / f"side_by_side_{model}.png")
            print(f"written to {path.relative_to(RESULTS.parent.parent)}")


if __name__ == "__main__":
    main()
