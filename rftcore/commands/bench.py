"""`rftcore bench`: ours beside pure PyTorch, as a table and as JSON."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from rftcore.bench.pareto import describe
from rftcore.bench.record import table, write
from rftcore.bench.run import Result, bench
from rftcore.commands.bench_options import BenchOptions
from rftcore.errors import UsageError

# Too long for a terminal; the JSON has them.
_HIDDEN = ("plan", "min_s", "max_s")


def run(options: BenchOptions) -> str:
    """Measures, writes the JSON where one was asked for, and gives the text to print.

    Raises: UsageError for options that do not fit, or an output that cannot be written.
    """
    path = Path(options.output) if options.output else None
    if path is not None and path.is_dir():
        raise UsageError(f"--output {path} is a folder; give a file for the JSON, such as {path / 'bench.json'}")
    command = " ".join(["rftcore", *map(shlex.quote, sys.argv[1:])])
    result = bench(options, command=command, tell=lambda line: print(line, file=sys.stderr, flush=True))
    if path is not None:
        write(path, result.content())
    return text(result) + (f"\nwritten to {path}" if path is not None else "")


def text(result: Result) -> str:
    """The result for people."""
    settings, seen = result.settings, result.environment
    chain = "" if settings["work"] == "train_step" else f", {settings['steps']} steps"
    if settings["work"] == "draft":
        chain += f", {settings['backprop_steps']} of them differentiated"
    lines = [
        f"{settings['model']}, {settings['work']}, batch {settings['batch']}{chain}, {settings['dtype']}",
        f"{seen['device']}, {seen['threads']} threads, torch {seen['versions']['torch']}, {seen['date']}",
        "",
        table([{name: value for name, value in row.items() if name not in _HIDDEN} for row in result.rows]),
    ]
    if result.pareto is not None and any(row["method"].startswith("rftcore") for row in result.rows):
        lines += ["", describe(result.pareto)]
    return "\n".join(lines)
