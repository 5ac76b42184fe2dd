"""Every algorithm on digits, with several seeds: reward, held-out judge and drift against reward queries and seconds.

python -m benchmarks.algorithms [--seeds 0 1 2] [--only draft ddpo] [--jobs 2] [--output runs/algorithms]

Each run is a process of its own, of one thread. One that is finished is not repeated, one that was stopped goes on from
its last checkpoint: the same command, given again, carries on.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import algorithms_plot, best_of_n
from benchmarks.algorithms_claims import Curve, claims, raises_reward
from benchmarks.harness import RESULTS, environment, report, table
from rftcore.training import recipes
from rftcore.training.parsing import load_config

NAME = "algorithms"
PREFIX = "digits_"
# In the order of the table; each is the recipe digits_<name>.
ROWS = (
    "draft",
    "draft_k",
    "draft_lv",
    "draft_plus",
    "alignprop",
    "alignprop_released",
    "refl",
    "drtune",
    "ddpo",
    "ddpo_all_steps",
    "ddpo_sf",
    "dpok",
    "rwr",
    "rwr_sparse",
    "sft",
    "sft_kl_o",
)
# The recipes were tuned on seed 100 and the evaluation noise that they name.
EVALUATION_SEED = 2000
EVALUATIONS = 8
# One sampler for every row, so that all begin at one reward: policy gradients need noise in each step.
COMMON = {
    "sampling.eta": 1.0,
    "eval.seed": EVALUATION_SEED,
    "eval.num_validation_images": 2,
    "eval.batch_size": 40,
    "eval.lora_scales": "[]",
    "cpu_threads": 1,
}


def command(row: str, seed: int, folder: Path) -> list[str]:
    """The command line of one run, or of what is left of it."""
    recipe = PREFIX + row
    algorithm = recipes.algorithm(recipe)
    train = load_config(algorithm, recipe).train
    # Rounded up to whole epochs, which evaluations lie between.
    every = -(-train.max_train_steps // (EVALUATIONS * train.updates_per_epoch)) * train.updates_per_epoch
    options = {**COMMON, "seed": seed, "output_dir": folder, "eval.validation_steps": every}
    if any(folder.glob("checkpoint-*")):
        options["resume_from_checkpoint"] = "latest"
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "rftcore", "train", algorithm, "--config", recipe, *flags]


def curve(folder: Path) -> Curve:
    """A run's evaluations, from its metrics.jsonl. Seconds are those of its epochs, without loading and evaluations."""
    points: dict[str, list[float]] = {name: [] for name in Curve._fields}
    used = {"queries": 0, "samples": 0, "unet_evaluations": 0, "seconds": 0.0}
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        if "count/reward_queries" in line:
            used["queries"] = line["count/reward_queries"]
            used["samples"] = line["count/samples"]
            used["unet_evaluations"] = line["count/unet_evaluations"]
            used["seconds"] += line["time/epoch_s"]
        if "eval/reward/digits" in line:
            for name, value in used.items():
                points[name].append(round(value, 3))
            points["reward"].append(line["eval/reward/digits"])
            points["held_out"].append(line["eval/reward/digits_held_out"])
            points["drift"].append(line["eval/drift/eps"])
    return Curve(**points)


class Runs:
    """Carries out the missing runs, several at a time, and stops them all where one fails or the user interrupts."""

    def __init__(self, output: Path, jobs: int) -> None:
        self.output, self.jobs = output, jobs
        self._children: set[subprocess.Popen] = set()
        self._lock, self._stopped = threading.Lock(), False

    def folder(self, row: str, seed: int) -> Path:
        return self.output / row / str(seed)

    def carry_out(self, wanted: list[tuple[str, int]]) -> None:
        """Raises: RuntimeError naming the log of a run that failed."""
        missing = [(row, seed) for row, seed in wanted if not (self.folder(row, seed) / "results.json").is_file()]
        print(f"{len(wanted)} runs, {len(missing)} of them to be done", flush=True)
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                for number, _ in enumerate(pool.map(lambda run: self._run(*run), missing), start=1):
                    print(f"{number} of {len(missing)} done", flush=True)
            except BaseException:
                self._stop()
                raise

    def _run(self, row: str, seed: int) -> None:
        folder = self.folder(row, seed)
        log = folder.with_suffix(".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        arguments = best_of_n.command(seed, folder, COMMON) if row == best_of_n.ROW else command(row, seed, folder)
        if not any(folder.glob("checkpoint-*")):
            _clear(folder)
        single = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with self._lock:
            if self._stopped:
                return
            with open(log, "ab") as file:
                child = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **single})
            self._children.add(child)
        status = child.wait()
        with self._lock:
            self._children.discard(child)
            if status and not self._stopped:
                raise RuntimeError(f"{' '.join(arguments)} ended with status {status}; see {log}")

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for child in self._children:
                child.send_signal(signal.SIGTERM)


def _clear(folder: Path) -> None:
    """Removes what a run left that was stopped before its first checkpoint."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def row_of(name: str, curves: list[Curve]) -> dict[str, Any]:
    """The table's row of one algorithm: means and standard deviations over the seeds."""
    before, after = [c.reward[0] for c in curves], [c.reward[-1] for c in curves]
    held_out = [c.held_out[-1] for c in curves]
    return {
        "algorithm": name,
        "reward before": statistics.fmean(before),
        "reward after": statistics.fmean(after),
        "sd": _sd(after),
        "held-out before": statistics.fmean(c.held_out[0] for c in curves),
        "held-out after": statistics.fmean(held_out),
        "held-out sd": _sd(held_out),
        "drift": statistics.fmean(c.drift[-1] for c in curves),
        "reward queries": round(statistics.fmean(c.queries[-1] for c in curves)),
        "UNet evaluations": round(statistics.fmean(c.unet_evaluations[-1] for c in curves)),
        "seconds": statistics.fmean(c.seconds[-1] for c in curves),
        "rises beyond seed noise": "yes" if raises_reward(curves) else "no",
    }


def best_of_n_row(n: int, seen: list[dict[str, Any]]) -> dict[str, Any]:
    """The yardstick's row: choosing among n images of the pretrained model, for each image that is wanted."""
    at = [next(point for point in each["points"] if point["n"] == n) for each in seen]
    rewards, held_out = [point["reward"] for point in at], [point["held_out"] for point in at]
    first = [each["points"][0] for each in seen]
    return {
        "algorithm": f"best of {n}, no training",
        "reward before": statistics.fmean(point["reward"] for point in first),
        "reward after": statistics.fmean(rewards),
        "sd": _sd(rewards),
        "held-out before": statistics.fmean(point["held_out"] for point in first),
        "held-out after": statistics.fmean(held_out),
        "held-out sd": _sd(held_out),
        "drift": 0.0,
        "reward queries": f"{n} an image",
    }


def _sd(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=[*ROWS, best_of_n.ROW], help="these rows; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--output", type=Path, default=Path("runs/algorithms"), help="where the runs are kept")
    options = parser.parse_args()
    rows, seeds = options.only or [*ROWS, best_of_n.ROW], options.seeds
    # As Ctrl-C does: the runs are told, and save where they are.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    runs = Runs(options.output, options.jobs)
    runs.carry_out([(row, seed) for seed in seeds for row in rows])

    curves = {row: [curve(runs.folder(row, seed)) for seed in seeds] for row in rows if row != best_of_n.ROW}
    yardstick = []
    if best_of_n.ROW in rows:
        yardstick = [json.loads((runs.folder(best_of_n.ROW, seed) / "results.json").read_text()) for seed in seeds]
    lines = [row_of(row, seen) for row, seen in curves.items()]
    lines += [best_of_n_row(n, yardstick) for n in best_of_n.SHOWN] if yardstick else []
    found = claims(curves)
    print(table(lines), "", table(found), sep="\n")
    if options.only:
        print("not written: a part of the rows is no benchmark")
        return
    settings = {"recipes": [PREFIX + row for row in rows if row in ROWS], "seeds": seeds, "common": COMMON}
    content = {
        "environment": {**environment(), "threads": 1},
        "settings": {**settings, "jobs": options.jobs},
        "rows": lines,
        "claims": found,
        "best_of_n": yardstick,
        "curves": {row: [c._asdict() for c in seen] for row, seen in curves.items()},
    }
    (RESULTS / f"{NAME}.json").write_text(json.dumps(content, indent=1) + "\n")
    report(f"{NAME}_claims", found, settings)
    if reason := algorithms_plot.why_not():
        print(reason)
    else:
        print(f"written to {algorithms_plot.draw(curves, yardstick, RESULTS / f'{NAME}.png')}")


if __name__ == "__main__":
    main()
