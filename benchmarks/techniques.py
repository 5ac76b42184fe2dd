"""From stock to ours, one technique a row: what each adds in time, bytes and FLOPs, on top of those above it.

python -m benchmarks.techniques [--model 37m] [--resolution 256] [--steps 4] [--batch 2] [--repeats 2] [--threads 2]

DRaFT through all steps: sampling, decoding, reward, backward.
"""

from __future__ import annotations

import argparse
import dataclasses

from benchmarks import harness
from rftcore.bench.methods import Method
from rftcore.bench.run import bench
from rftcore.commands.bench_options import MODELS, BenchOptions

_START = "stock+steps+blocks"
_OURS = Method("", sampler=True, score=True, fp32_lora=True, unet="none", decoder="none")

# Each has all that those above it have, but for what it puts in another's place.
TECHNIQUES = (
    ("stock, checkpoints around steps and in blocks", Method("", steps=True, blocks=True)),
    (
        'accelerate(unet, "block") and accelerate(vae, "block"), instead of checkpoints in blocks',
        Method("", steps=True, unet="block", decoder="block"),
    ),
    ("nothing of the blocks made again: accelerate(...)", Method("", steps=True, unet="none", decoder="none")),
    (
        "CheckpointedSampler, every step replayed: the step in one pass, text and time once a chain",
        Method("", sampler=True, replayed=True, unet="none", decoder="none"),
    ),
    ("score, image by image", Method("", sampler=True, replayed=True, unet="none", decoder="none", score=True)),
    ("steps stored as planned, in the bytes of the first row", dataclasses.replace(_OURS, budget=_START)),
    ("in the bytes of checkpoints around steps", dataclasses.replace(_OURS, budget="stock+steps")),
    ("in all the bytes there are", dataclasses.replace(_OURS, budget="all")),
    ("or in the least bytes: replays of one image, values made again", dataclasses.replace(_OURS, budget="least")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="37m", choices=MODELS)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    given = vars(parser.parse_args())
    options = BenchOptions(work="draft", gradient_error="no", **given)
    methods = [dataclasses.replace(each, name=name) for name, each in TECHNIQUES]
    result = bench(options, methods, command=harness.command(), tell=lambda line: print(f"  {line}", flush=True))
    rows, before = [], None
    for row in result.rows:
        made = {"technique": row.pop("method"), **row}
        if "median_s" in made:
            if before is not None:
                made["times_the_row_above"] = before / made["median_s"]
            before = made["median_s"]
        rows.append(made)
    first = next((row["median_s"] for row in rows if "median_s" in row), None)
    for row in rows:
        if first is not None and "median_s" in row:
            row["times_the_first"] = first / row["median_s"]
    harness.report("techniques", rows, result.settings)


# Workers import the main module once more.
if __name__ == "__main__":
    main()
