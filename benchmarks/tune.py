"""Times every backend of every op, and every tile size of its Triton kernels, and writes the table of winners.

    python -m benchmarks.tune --out rftcore/ops/tables

The table is `<out>/sm_XX.json`; once it lies in rftcore/ops/tables, the ops choose by it. Shapes that it does not name
are served in the order that `rftcore info` prints, with tile sizes by each kernel's heuristic.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import clock
from benchmarks.gpu import passes
from benchmarks.harness import environment
from benchmarks.workloads import Workload, workloads
from rftcore.ops import measured
from rftcore.ops.backends import OPS

_DTYPES = (torch.bfloat16, torch.float16)


def _grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


# The tile sizes that are tried, by the name under which a launch asks for its own.
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "geglu.Config": _grid(rows=(1, 4, 8), columns=(256, 512, 1024), num_warps=(4, 8)),
    "layer_norm.Config": _grid(rows=(1, 2, 4, 8), num_warps=(4, 8)),
    "gated_linear.Config": _grid(rows=(128,), columns=(64, 128), inner=(32, 64), num_warps=(8,), num_stages=(3, 4)),
    "lora_linear.ShrinkConfig": _grid(rows=(16, 32, 64), depth=(64, 128), num_warps=(4,), num_stages=(2, 3)),
    "lora_linear.StripConfig": _grid(rows=(128,), columns=(64,), parts=(1, 2, 3, 5)),
    "lora_linear.ProjectConfig": [
        *_grid(rows=(128,), columns=(64, 128), depth=(64,), num_stages=(3, 4), fused=(False, True), span=(False, True)),
        *_grid(rows=(64,), columns=(64, 128), depth=(64,), num_warps=(4,), num_stages=(4,), fused=(False, True)),
        *_grid(rows=(128,), columns=(256,), depth=(64,), num_stages=(3,), fused=(False,), span=(False, True)),
    ],
    "lora_linear_backward.LowRankConfig": _grid(rows=(16, 32, 64), depth=(64, 128), num_stages=(2, 3)),
    "lora_linear_backward.InputConfig": [
        *_grid(rows=(128,), columns=(64, 128, 256), depth=(64,), num_stages=(3, 4)),
        *_grid(rows=(64,), columns=(64, 128), depth=(64,), num_warps=(4,), num_stages=(4,)),
    ],
    "lora_linear_backward.AdaptersConfig": _grid(columns=(64, 128), rows=(32, 64), splits=(16, 64, 128)),
    "attention.Config:forward": _grid(kept=(64, 128), taken=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3)),
    "attention.Config:dq": _grid(kept=(64, 128), taken=(32, 64), num_warps=(4, 8), num_stages=(2, 3)),
    "attention.Config:dkdv": _grid(kept=(64, 128), taken=(16, 32, 64), num_warps=(4, 8), num_stages=(2, 3)),
    "cross_attention.Config:forward": _grid(queries=(64, 128), blocks=(1, 2, 4, 8), num_warps=(4, 8), num_stages=(2,)),
    "cross_attention.Config:backward": _grid(queries=(32, 64), blocks=(4, 8, 16), num_warps=(4, 8), num_stages=(2,)),
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """A backend with tile sizes for at most one kernel, and the seconds of both passes; infinite where it fails."""

    backend: str
    seconds: float
    config: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


def trials(workload: Workload, device: torch.device, repeats: int, deadline: float) -> Iterator[Trial]:
    """Every backend with its heuristic's tile sizes; then Triton's with every other candidate, a kernel at a time."""
    first = workload.inputs()
    size = sum(t.numel() * t.element_size() for t in first)
    sets = [first, *(workload.inputs() for _ in range(clock.turns(3 * size, device) - 1))]

    def timed(backend: str) -> float:
        try:
            both = passes(lambda tensors: workload.ours(tensors, backend), sets)
            return sum(clock.time_of(calls, device, repeats).seconds for calls in both)
        except Exception as error:  # noqa: BLE001  a candidate that cannot do it loses
            print(f"  {workload.op} {workload.shape} {backend}: {error!r}"[:300])
            return float("inf")

    backends = workload.backends(first)
    before = float("inf")
    for backend in backends:
        yield (trial := Trial(backend, timed(backend)))
        before = trial.seconds if backend == "triton" else before
    if "triton" not in backends:
        return
    with measured.asked() as names:
        timed("triton")
    best: dict[str, dict[str, Any]] = {}
    for name in sorted(names & CANDIDATES.keys()):
        found = []
        for sizes in CANDIDATES[name]:
            if time.monotonic() > deadline:
                return
            config = {**best, name: sizes}
            with contextlib.ExitStack() as stack:
                for launch, tried in config.items():
                    stack.enter_context(measured.trying(launch, tried))
                found.append(Trial("triton", timed("triton"), config))
            yield found[-1]
        fastest = min(found, key=lambda trial: trial.seconds)
        # The heuristic's own stays where no candidate beats what there was before.
        if fastest.seconds < before:
            best, before = fastest.config, fastest.seconds


def entry(found: list[Trial]) -> dict[str, Any]:
    """The table's row: the winner, its tile sizes where they beat the heuristic's, and each backend's best time."""
    won = min(found, key=lambda trial: trial.seconds)
    best: dict[str, float] = {}
    for trial in found:
        best[trial.backend] = min(best.get(trial.backend, float("inf")), 1e6 * trial.seconds)
    row: dict[str, Any] = {"backend": won.backend, "us": {name: round(us, 2) for name, us in best.items()}}
    return {**row, "config": won.config} if won.config else row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=480, help="no new measurement is begun after so long")
    parser.add_argument("--only", help="the ops whose names contain this")
    parser.add_argument("--small", action="store_true", help="tiny shapes: to see that it runs, not how fast")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the table")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with clock.side_stream(torch.device(arguments.device)):
        _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    deadline = time.monotonic() + arguments.seconds
    winners: dict[str, dict[str, Any]] = {}
    name = measured.architecture(device) if device.type == "cuda" else device.type
    path = arguments.out / f"{name}.json"
    arguments.out.mkdir(parents=True, exist_ok=True)
    for dtype in _DTYPES:
        for workload in workloads(dtype, device, arguments.small):
            op = OPS[workload.op]
            if (arguments.only and arguments.only not in workload.op) or op.key is None:
                continue
            if time.monotonic() > deadline:
                break
            found = list(trials(workload, device, arguments.repeats, deadline))
            row = winners.setdefault(workload.op, {})
            key = op.key(*workload.question(workload.inputs()))
            row[key] = entry(found)
            print(f"| {workload.op} | {key} | {row[key]} |")
            # After each: a run that is cut off leaves what it measured.
            path.write_text(json.dumps({"environment": environment(), "winners": winners}, indent=1) + "\n")


if __name__ == "__main__":
    main()
