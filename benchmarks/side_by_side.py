"""Ours beside stock diffusers + PEFT, its recipes and torch.compile: what `rftcore bench` says of every model and work.

python -m benchmarks.side_by_side [--only 37m/draft/all ...] [--minutes 40] [--threads 2] [--counted]
python -m benchmarks.side_by_side --check      # of what is written: nothing of pure PyTorch is faster and smaller

A part that is run replaces its rows in benchmarks/results/side_by_side.json; the others stay. Without --only: those with
a clock; with --counted those without, which no other load on the machine disturbs.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS
from rftcore.bench.pareto import describe
from rftcore.bench.record import write
from rftcore.bench.run import Result, bench
from rftcore.commands.bench import text
from rftcore.commands.bench_options import BenchOptions

PATH = RESULTS / "side_by_side.json"
# What must hold, by name of the part.
JUDGED = "37m/draft/all"
_STOCK = "stock*"


@dataclass(frozen=True)
class Part:
    """A comparison.

    Attributes:
        minutes: that it takes about, on two quiet cores.
        options: of `rftcore bench`.
    """

    name: str
    minutes: float
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def counted(self) -> bool:
        return bool(self.options.get("count_only"))

    def made(self, threads: int | None) -> BenchOptions:
        model, work, *rest = self.name.split("/")
        named = {"backprop_steps": rest[0]} if work == "draft" else {}
        return BenchOptions(model=model, work=work, threads=threads, **named, **self.options)


def _parts() -> tuple[Part, ...]:
    bf16 = {"dtype": "bf16", "methods": f"{_STOCK},fp32_lora*,autocast*,rftcore*"}
    compiled = {"methods": f"{_STOCK},compile*,rftcore*"}
    once: dict[str, Any] = {"repeats": 1, "gradient_error": "no"}
    shares = "compile,compile@0.5,compile+steps"
    # The bytes of each stock point, and the least; in those of plain stock it keeps all, as `rftcore` does.
    at_points = "rftcore,rftcore@stock+blocks,rftcore@stock+steps,rftcore@stock+steps+blocks,rftcore@least"
    counted: dict[str, Any] = {
        "count_only": True,
        "dtype": "bf16",
        "methods": f"{_STOCK},fp32_lora*,autocast*,rftcore*",
    }
    few = {**counted, "steps": 5, "methods": f"{_STOCK},{at_points}"}
    return (
        Part("37m/draft/all", 22, once | {"methods": f"{_STOCK},{shares},{at_points}"}),
        Part("37m/draft/5", 6, once | {"methods": f"{_STOCK},rftcore,rftcore@stock+blocks,rftcore@least"}),
        Part("37m/draft/1", 4.5, once | {"methods": f"{_STOCK},rftcore,rftcore@stock+blocks,rftcore@least"}),
        Part("37m/train_step", 2, {"repeats": 2, "gradient_error": "no"}),
        Part("37m/sampling", 2, once | {"methods": "stock,rftcore*"}),
        Part("digits/train_step", 3, compiled),
        Part("digits/draft/1", 2),
        Part("digits/draft/5", 2),
        Part("digits/draft/all", 5, compiled),
        Part("digits/ddpo", 2),
        Part("digits/dpok", 2),
        Part("digits/sampling", 1.5, {"methods": "stock,compile,rftcore*"}),
        Part("digits/draft/all/bf16", 4, bf16),
        Part("sd15/train_step/256", 4, once | {"resolution": 256, "methods": f"{_STOCK},rftcore,rftcore@stock+blocks"}),
        Part("37m/ddpo", 4, counted | {"steps": 2}),
        Part("37m/dpok", 4, counted | {"steps": 2}),
        Part("37m/draft/all/bf16", 12, counted),
        Part("sd15/train_step", 3, counted),
        Part("sd15/draft/1", 6, few),
        Part("sd15/draft/all", 10, few),
        Part("sdxl/train_step", 8, counted),
        Part("sdxl/draft/1", 15, few),
    )  # fmt: skip


PARTS = {part.name: part for part in _parts()}


def merged(content: Mapping[str, Any], part: str, result: Result) -> dict[str, Any]:
    """The content of the JSON with the part's rows in the place of its earlier ones, in the order of PARTS."""
    rows = [row for row in content.get("rows", []) if row["part"] != part]
    settings = result.settings
    named = {name: settings[name] for name in ("model", "work", "dtype", "batch", "steps")}
    if settings["work"] == "draft":
        named["backprop_steps"] = settings["backprop_steps"]
    rows += [{"part": part, **named, **row} for row in result.rows]
    order = list(PARTS)
    rows.sort(key=lambda row: order.index(row["part"]) if row["part"] in order else len(order))
    about = {"environment": result.environment, "settings": settings, "pareto": result.pareto}
    return {
        "environment": {**result.environment, "command": "python -m benchmarks.side_by_side"},
        "settings": {"parts": list(PARTS)},
        "rows": rows,
        "parts": {**content.get("parts", {}), part: about},
    }


def read(path: Path = PATH) -> dict[str, Any]:
    """What is written already."""
    return json.loads(path.read_text()) if path.exists() else {}


def check(content: Mapping[str, Any]) -> bool:
    """Says of every part with a clock how ours stands, and gives whether the judged one holds."""
    for name, about in content.get("parts", {}).items():
        if about["pareto"] is not None:
            print(f"{name}\n{describe(about['pareto'])}")
    judged = content.get("parts", {}).get(JUDGED)
    return bool(judged and judged["pareto"] and judged["pareto"]["holds"])


def _chosen(patterns: Sequence[str] | None, counted: bool) -> list[Part]:
    if not patterns:
        return [part for part in PARTS.values() if part.counted == counted]
    found = [part for part in PARTS.values() if any(fnmatch.fnmatch(part.name, pattern) for pattern in patterns)]
    if not found:
        raise SystemExit(f"--only {' '.join(patterns)} names no part; known: {', '.join(PARTS)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", nargs="+", metavar="PART", help="names or patterns of parts")
    parser.add_argument("--counted", action="store_true", help="the parts without a clock")
    parser.add_argument("--minutes", type=float, default=40, help="no part is begun that would end later")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="runs nothing; fails where the judged part does not hold")
    options = parser.parse_args()
    if options.check:
        raise SystemExit(0 if check(read()) else 1)
    start = time.monotonic()
    for part in _chosen(options.only, options.counted):
        spent = (time.monotonic() - start) / 60
        if spent + part.minutes > options.minutes:
            print(
                f"{part.name}: left out, {spent:.0f} of {options.minutes:g} minutes are spent, it takes {part.minutes:g}"
            )
            continue
        print(f"{part.name}: about {part.minutes:g} minutes", flush=True)
        command = f"python -m benchmarks.side_by_side --only {part.name} --threads {options.threads}"
        result = bench(part.made(options.threads), command=command, tell=lambda line: print(f"  {line}", flush=True))
        write(PATH, merged(read(), part.name, result))
        print(text(result), flush=True)


# Workers import the main module once more.
if __name__ == "__main__":
    main()
