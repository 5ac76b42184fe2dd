"""One comparison: counts, settles ours' plans, times all methods in turns, and writes a row for each."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from rftcore.bench.methods import Method, method, needed, select
from rftcore.bench.models import shapes
from rftcore.bench.pareto import pareto
from rftcore.bench.record import environment
from rftcore.bench.rounds import Worker, in_turns
from rftcore.bench.sides import Settled
from rftcore.bench.worker import Failed
from rftcore.blocks.budget import bytes_of
from rftcore.commands.bench_options import BenchOptions
from rftcore.errors import UsageError

Row = dict[str, Any]
_USABLE = 0.9
# TFLOPs of a stock run whose fp64 twin is still small work.
_SMALL_TFLOP = 0.3
# Of the memory there is, what workers that wait may hold together; larger ones are started anew for each turn.
_WAITING = 0.25


@dataclass(frozen=True)
class Result:
    """Rows in the order of the methods, and what they say of time against memory; None where nothing was timed."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row]
    pareto: dict[str, Any] | None

    def content(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def bench(
    options: BenchOptions,
    methods: Sequence[Method] | None = None,
    *,
    command: str = "rftcore bench",
    tell: Callable[[str], None] = print,
) -> Result:
    """Runs one comparison.

    Args:
        methods: instead of those that `options.methods` names.
        command: as it stands in the result.
        tell: is told what is done next.

    Raises: UsageError.
    """
    options = _settled_options(options)
    chosen = list(methods) if methods is not None else select(options.methods, options.work, options.images)
    run = _Run(options, chosen, tell)
    try:
        return run.result(command)
    finally:
        run.close()


def _settled_options(options: BenchOptions) -> BenchOptions:
    """Without what the machine decides. Raises: UsageError."""
    options.validate()
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no CUDA device here; give cpu or auto")
    if options.dtype == "fp16" and device == "cpu":
        raise UsageError("--dtype fp16 with --device cpu, which has no fp16 convolutions to compare; give bf16 or fp32")
    parts = shapes(options.model)
    scale = parts.scale * 2 ** (len(parts.unet["block_out_channels"]) - 1)
    if options.resolution and options.resolution % scale:
        raise UsageError(f"--resolution {options.resolution} must be a multiple of {scale} for {options.model}")
    if options.memory_limit is not None:
        try:
            bytes_of(options.memory_limit)
        except ValueError as error:
            raise UsageError(
                f"--memory_limit {options.memory_limit} must be a number of bytes with its unit, such as 12GiB"
            ) from error
    return dataclasses.replace(options, device=device, threads=options.threads or torch.get_num_threads())


class _Run:
    def __init__(self, options: BenchOptions, chosen: Sequence[Method], tell: Callable[[str], None]) -> None:
        self._options, self._chosen, self._tell = options, chosen, tell
        available = psutil.virtual_memory().available
        self._available = available
        self._limit = bytes_of(options.memory_limit) if options.memory_limit else int(_USABLE * available)
        self._counted: dict[str, Row] = {}
        self._settled: dict[str, Settled] = {}
        self._workers: dict[str, Worker] = {}
        self._statuses: dict[str, str] = {}

    def result(self, command: str) -> Result:
        options = self._options
        self._count()
        rows = {each.name: self._first_columns(each) for each in self._chosen}
        found = None
        ceiling = None
        if not options.count_only:
            ceiling = self._alone("ceiling")
            self._time(rows)
            ceiling = max(self._figure(ceiling), self._figure(self._alone("ceiling")))
            self._rates(rows, ceiling)
            self._gradient_errors(rows)
            found = pareto(list(rows.values()))
        # Those that others' bytes were taken from stand in no row where they were not asked for.
        settings = dataclasses.asdict(options) | {"batch": options.images, "backprop_steps": options.differentiated}
        if ceiling is not None:
            settings["ceiling_tflop_per_s"] = ceiling / 1e12
        seen = environment(command, options.threads, options.device)
        return Result(seen, settings, [_ordered(row) for row in rows.values()], found)

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()

    def _count(self) -> None:
        """Exact columns of all methods; ours after those whose bytes they have."""
        counter: Worker | None = None
        others = [each for each in self._chosen if not each.planned]
        extra = needed(list(self._chosen))
        planned = [each for each in self._chosen if each.planned]
        for each in [*extra, *others, *planned]:
            reason = each.refusal(self._options.dtype)
            if reason is None and each.compiled is not None:
                # Its operations are not PyTorch's.
                continue
            if reason is not None:
                self._statuses[each.name] = reason
                continue
            if counter is None or counter.dead:
                counter = self._worker()
            self._tell(f"counting {each.name}")
            settled = None
            if each.planned:
                settled = counter.call("settle", each, self._counted)
                if isinstance(settled, Failed):
                    self._statuses[each.name] = settled.status
                    continue
                self._settled[each.name] = settled
            counted = counter.call("count", each, settled)
            if isinstance(counted, Failed):
                # What cannot be counted may run.
                self._counted[each.name] = {"uncounted": counted.status}
            else:
                self._counted[each.name] = counted
        if counter is not None:
            counter.close()

    def _first_columns(self, each: Method) -> Row:
        row: Row = {"method": each.name, "status": self._statuses.get(each.name, "ok")}
        if self._options.count_only and each.compiled is not None:
            row["status"] = "compiled code's operations are not counted"
        row |= self._counted.get(each.name, {})
        if self._options.count_only and "uncounted" in row:
            row["status"] = row.pop("uncounted")
        settled = self._settled.get(each.name)
        if settled is not None and settled.budget is not None:
            row["budget_mib"] = settled.budget / 2**20
        plain = self._counted.get("stock", {}).get("tflop")
        if plain and "tflop" in row:
            row["extra_flop_percent"] = 100 * (row["tflop"] / plain - 1)
        return row

    def _time(self, rows: dict[str, Row]) -> None:
        """Seconds and memory, in turns."""
        names = [name for name, row in rows.items() if row["status"] == "ok"]
        by_name = {each.name: each for each in self._chosen}
        weights: dict[str, int] = {}

        def prepared(name: str) -> Worker | Failed:
            if name not in self._workers or self._workers[name].dead:
                self._tell(f"preparing {name}")
                worker = self._workers[name] = self._worker()
                answer = worker.call("prepare", by_name[name], self._settled.get(name))
                if isinstance(answer, Failed):
                    worker.close()
                    return answer
                weights[name] = answer
            return self._workers[name]

        def turn(name: str) -> Any:
            worker = prepared(name)
            if isinstance(worker, Failed):
                return worker
            answer = worker.call("run")
            if not isinstance(answer, Failed):
                self._tell(f"{name}: {answer['seconds']:.3g} s")
            # Too large to wait for the next round beside the others; on a GPU it would be in their way.
            if weights[name] * len(names) > _WAITING * self._available or self._options.device == "cuda":
                worker.close()
            return answer

        for name, answers in in_turns(names, self._options.repeats, turn).items():
            rows[name] |= _measured(answers, self._options.images)

    def _rates(self, rows: dict[str, Row], ceiling: float) -> None:
        for row in rows.values():
            if row.get("median_s") and "tflop" in row:
                row["tflop_per_s"] = row["tflop"] / row["median_s"]
                if ceiling:
                    row["ceiling_percent"] = 100 * row["tflop_per_s"] * 1e12 / ceiling

    def _gradient_errors(self, rows: dict[str, Row]) -> None:
        """Relative to stock's gradients in fp64."""
        options = self._options
        tflop = next((row["tflop"] for row in rows.values() if "tflop" in row), None)
        small = tflop is not None and tflop <= _SMALL_TFLOP
        if (
            options.work == "sampling"
            or options.gradient_error == "no"
            or not (small or options.gradient_error == "yes")
        ):
            return
        self._tell("stock in fp64")
        # Each step from its state again: the fewest bytes at the same numbers.
        exact = self._alone("truth", dataclasses.replace(method("stock"), steps=options.work == "draft"))
        if isinstance(exact, Failed):
            self._tell(f"stock in fp64: {exact.status}")
            return
        by_name = {each.name: each for each in self._chosen}
        for name, row in rows.items():
            if row["status"] != "ok":
                continue
            worker = self._workers.get(name)
            if worker is None or worker.dead:
                worker = self._workers[name] = self._worker()
                worker.call("prepare", by_name[name], self._settled.get(name))
            found = worker.call("gradients")
            if isinstance(found, Failed):
                row["status"] = found.status
            else:
                row["gradient_error"] = float((found - exact).norm() / exact.norm())

    def _alone(self, name: str, *arguments: Any) -> Any:
        """A task of a process of its own."""
        worker = self._worker()
        try:
            return worker.call(name, *arguments)
        finally:
            worker.close()

    def _worker(self) -> Worker:
        return Worker(self._options, self._limit, self._options.timeout)

    @staticmethod
    def _figure(answer: Any) -> float:
        return 0.0 if isinstance(answer, Failed) else float(answer)


def _measured(answers: Sequence[Any], images: int) -> Row:
    """Columns of a method's turns; a status where one of them failed."""
    if answers and isinstance(answers[-1], Failed):
        return {"status": answers[-1].status}
    seconds = [answer["seconds"] for answer in answers]
    median = statistics.median(seconds)
    row: Row = {"median_s": median, "min_s": min(seconds), "max_s": max(seconds), "samples_per_s": images / median}
    for name in ("rss_mib", "cuda_mib"):
        if name in answers[0]:
            row[name] = max(answer[name] for answer in answers)
    return row


_COLUMNS = (
    "method", "status", "median_s", "min_s", "max_s", "samples_per_s", "peak_mib", "rss_mib", "cuda_mib", "saved_mib",
    "tflop", "extra_flop_percent", "tflop_per_s", "ceiling_percent", "gradient_error", "budget_mib", "plan",
)  # fmt: skip


def _ordered(row: Row) -> Row:
    return {name: row[name] for name in (*_COLUMNS, *row) if name in row}
