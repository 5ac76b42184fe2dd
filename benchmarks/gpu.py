"""Ceilings of a GPU, every op against stock PyTorch, SDPA and torch.compile, and the UNet's step; `gpu.sh` calls it.

    python -m benchmarks.gpu --part ceilings ops models [--out FILE]

Each time stands beside the floor that the counted bytes and FLOPs have at the ceilings measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import clock, gpu_models
from benchmarks.harness import environment, table
from benchmarks.workloads import Work, Workload, workloads

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def ceilings(device: torch.device, repeats: int, small: bool) -> dict[str, float]:
    """Bytes a second of a copy, read and written; FLOPs a second of a bf16 product."""
    count, size = (2**20, 256) if small else (2**29, 8192)
    x, y = (torch.empty(count, dtype=torch.uint8, device=device) for _ in range(2))
    copying = clock.time_of([lambda: y.copy_(x)], device, repeats).seconds
    a, b, c = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(3))
    product = clock.time_of([lambda: torch.mm(a, b, out=c)], device, repeats).seconds
    return {"bytes_per_s": 2 * count / copying, "flops_per_s": 2 * size**3 / product}


def floor(work: Work, ceiling: dict[str, float]) -> float:
    """Seconds that `work` takes at least."""
    return max(work.bytes / ceiling["bytes_per_s"], work.flops / ceiling["flops_per_s"])


def passes(
    function: Callable, sets: Sequence[Sequence[torch.Tensor]]
) -> tuple[list[Callable[[], object]], list[Callable[[], object]]]:
    """Calls of the forward without a graph, and of the backward of one graph each, a call a set of inputs."""
    forward = [_without_graph(function, inputs) for inputs in sets]
    backward = []
    for inputs in sets:
        outputs = function(inputs)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        outputs = [y for y in outputs if y.requires_grad]
        leaves = [t for t in inputs if t.requires_grad]
        grads = [torch.randn_like(y) for y in outputs]
        backward.append(lambda y=outputs, x=leaves, g=grads: torch.autograd.grad(y, x, g, retain_graph=True))
    return forward, backward


def _without_graph(function, inputs):
    def call():
        with torch.no_grad():
            return function(inputs)

    return call


def candidates(workload: Workload, inputs, compiled: bool) -> dict[str, Callable]:
    """Everything that can do this work here, by name: our backends, the stock chain, and torch.compile's of it."""
    found = {"stock": workload.stock}
    if compiled:
        found["torch.compile"] = torch.compile(workload.stock, dynamic=False)
    for backend in workload.backends(inputs):
        found[backend] = lambda tensors, backend=backend: workload.ours(tensors, backend)
    return found


def measure(workload: Workload, ceiling, device, repeats, compiled, deadline) -> list[dict[str, Any]]:
    """A row for each candidate and pass; a candidate that fails has its error in place of a time."""
    first = workload.inputs()
    size = sum(t.numel() * t.element_size() for t in first)
    sets = [first, *(workload.inputs() for _ in range(clock.turns(3 * size, device) - 1))]
    rows = []

    def add(name, which, work, calls):
        taken, captured = clock.time_of(calls, device, repeats)
        least = floor(work, ceiling)
        rows.append(
            {
                "op": workload.op, "shape": workload.shape, "pass": which, "candidate": name,
                "us": 1e6 * taken, "captured": captured,
                "GB/s": work.bytes / taken / 1e9, "TFLOP/s": work.flops / taken / 1e12, "of_floor": least / taken,
            }
        )  # fmt: skip

    for which, work in (("forward", workload.forward), ("backward", workload.backward)):
        half = max(work.bytes // 2, 1)
        pairs = [torch.empty(2, half, dtype=torch.uint8, device=device) for _ in range(clock.turns(2 * half, device))]
        add("copy of as many bytes", which, work._replace(flops=0), [lambda p=p: p[0].copy_(p[1]) for p in pairs])
        del pairs
    for name, prepare in workload.references.items():
        add(name, "forward", workload.forward, [prepare(inputs) for inputs in sets])
    for name, function in candidates(workload, first, compiled).items():
        if time.monotonic() > deadline:
            rows.append({"op": workload.op, "shape": workload.shape, "candidate": name, "error": "no time left"})
            continue
        try:
            forward, backward = passes(function, sets)
            add(name, "forward", workload.forward, forward)
            add(name, "backward", workload.backward, backward)
        except Exception as error:  # noqa: BLE001  a candidate that cannot do it is a result
            rows.append({"op": workload.op, "shape": workload.shape, "candidate": name, "error": repr(error)[:300]})
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a workload and pass: the best of ours, and what it is beside stock, torch.compile and its floor."""
    found = []
    others = ("stock", "torch.compile", "copy of as many bytes", "base product")
    keys = dict.fromkeys((row["op"], row["shape"], row["pass"]) for row in rows if "us" in row)
    for op, shape, which in keys:
        times = {
            row["candidate"]: row
            for row in rows
            if (row["op"], row["shape"], row.get("pass")) == (op, shape, which) and "us" in row
        }
        ours = {name: row for name, row in times.items() if name not in others}
        if not ours:
            continue
        best = min(ours, key=lambda name: ours[name]["us"])
        taken = ours[best]["us"]
        relative = {f"{name} / ours": times[name]["us"] / taken for name in others if name in times}
        found.append(
            {"op": op, "shape": shape, "pass": which, "best": best, "us": taken, "of_floor": ours[best]["of_floor"],
             **relative}
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--part", nargs="+", choices=["ceilings", "ops", "models"], default=["ceilings", "ops", "models"]
    )
    parser.add_argument("--only", help="the ops whose names contain this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--small", action="store_true", help="tiny shapes: to see that it runs, not how fast")
    parser.add_argument("--seconds", type=float, default=400, help="no new measurement is begun after so long")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with clock.side_stream(torch.device(arguments.device)):
        _run(arguments)


def _run(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    deadline = time.monotonic() + arguments.seconds
    ceiling = ceilings(device, arguments.repeats, arguments.small)
    print(f"copy {ceiling['bytes_per_s'] / 1e9:.0f} GB/s, bf16 product {ceiling['flops_per_s'] / 1e12:.1f} TFLOP/s")
    content: dict[str, Any] = {"environment": environment(), "ceilings": ceiling}
    settings = {name: str(value) for name, value in vars(arguments).items() if name != "out"}
    content["settings"] = settings
    if "ops" in arguments.part:
        rows: list[dict[str, Any]] = []
        for workload in workloads(_DTYPES[arguments.dtype], device, arguments.small):
            if arguments.only is None or arguments.only in workload.op:
                rows += measure(workload, ceiling, device, arguments.repeats, not arguments.no_compile, deadline)
                _write(arguments.out, {**content, "ops": rows})
        content["ops"] = rows
        print(table(summary(rows)))
    if "models" in arguments.part:
        content["models"] = gpu_models.measure(
            device, arguments.repeats, not arguments.no_compile, arguments.small, deadline, ceiling["flops_per_s"]
        )
        print(table(content["models"]))
    _write(arguments.out, content)


def _write(path: Path, content: dict[str, Any]) -> None:
    """After every workload: a run that is cut off leaves what it measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
