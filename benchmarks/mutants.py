"""Mutation testing: how many of a seeded sample of changes to ops, sampling and losses the tests notice.

python -m benchmarks.mutants --number 400 --seed 0

Each mutant is a fork of a process that has imported torch and diffusers; it imports the changed source from memory, and
runs the tests that run the changed lines, the quickest first. Which test runs which line is measured first. All of that
is kept under runs/mutants: a run that was stopped goes on, and after new tests `--survivors` runs again what survived.
What survives is judged by a person, in mutants_judged.json, with a reason: "equivalent", or "needs a GPU".
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mutations import Mutation, sites

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "benchmarks" / "results" / "mutants.json"
JUDGED = ROOT / "benchmarks" / "mutants_judged.json"
_CACHE = ROOT / "runs" / "mutants"
_PACKAGES = ("algorithms", "ops", "sampling")
# Tests of a package that stand elsewhere than in its folder of python_tests.
_ALSO = {"ops": ("test_build.py",)}
# What tests import and is not ours: paid for once.
_IMPORTED_ONCE = (
    "accelerate", "coverage", "diffusers", "hypothesis", "numpy", "peft", "pytest", "scipy.stats", "sklearn", "torch",
    "torch.utils.checkpoint", "torch._subclasses.fake_tensor", "torch.utils.flop_counter", "transformers", "triton",
    "diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.unets.unet_2d", "peft.tuners.lora",
)  # fmt: skip
# A mutant that allocates without end must not take the machine with it.
_MEMORY = 8 << 30


@dataclasses.dataclass
class Outcome:
    """What became of a mutant: "killed", "timeout", "survived" or "not run" (no test reaches its lines)."""

    result: str
    by: str = ""
    seconds: float = 0.0


class _MutatedFinder(importlib.machinery.SourceFileLoader):
    """Imports one module from a changed source, in memory."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        super().__init__(name, str(path))
        self._source = source

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=self)

    def get_code(self, fullname):
        return compile(self._source, self.path, "exec", dont_inherit=True)


class _Selection:
    """Runs these tests, in this order, and remembers which failed first."""

    def __init__(self, order: Sequence[str]) -> None:
        self._order = {test: i for i, test in enumerate(order)}
        self.failed = ""

    # After conftest.py has put its own order.
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        place = {item: self._order.get(item.nodeid, self._order.get(item.nodeid.partition("::")[0])) for item in items}
        items[:] = sorted((item for item in items if place[item] is not None), key=place.get)

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.failed:
            self.failed = report.nodeid


class _Coverage:
    """Which lines each test runs, and for how many seconds; what a shared fixture runs belongs to all of its file."""

    def __init__(self, measured) -> None:
        self._measured = measured
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.outcomes: dict[str, str] = {}

    def pytest_runtest_logstart(self, nodeid, location):
        self._measured.switch_context(nodeid)

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] += report.duration
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome


def _in_fork(work: Callable[[], Any], limit: float) -> tuple[Any, float]:
    """What `work` gives in a fork of this process, as JSON, and its seconds; "died", or None where it took too long.

    Too long is `limit` seconds of the processor's time, whatever else the machine does, or waiting 20 times as long.
    """
    reader, writer = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if not child:
        try:
            os.setsid()
            os.close(reader)
            resource.setrlimit(resource.RLIMIT_CPU, (round(limit), round(limit) + 1))
            resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY, _MEMORY))
            log = os.open(_CACHE / f"log-{os.getppid()}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1), os.dup2(log, 2)
            with os.fdopen(writer, "w") as file:
                try:
                    answer = {"done": work()}
                except BaseException:  # noqa: BLE001  the parent raises it
                    answer = {"error": traceback.format_exc()}
                json.dump(answer, file)
        finally:
            os._exit(0)
    os.close(writer)
    os.set_blocking(reader, False)
    received, open_ = b"", True
    while open_ and time.monotonic() - start < 20 * limit:
        time.sleep(0.02)
        try:
            while chunk := os.read(reader, 1 << 20):
                received += chunk
            open_ = False
        except BlockingIOError:
            pass
    os.close(reader)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    seconds = time.monotonic() - start
    if open_ or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return None, seconds
    answer = json.loads(received or b'{"done": "died"}')
    if "error" in answer:
        raise RuntimeError(f"in a fork: {answer['error']}")
    return answer["done"], seconds


def _pytest(files: Sequence[str], plugin: Any) -> int:
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=line", *files], [plugin]))


def _run(mutation: Mutation, source: str, order: Sequence[str]) -> dict[str, str]:
    path = ROOT / mutation.file
    name = mutation.file.removesuffix(".py").replace("/", ".")
    sys.meta_path.insert(0, _MutatedFinder(name, path, source))
    selection = _Selection(order)
    code = _pytest(list(dict.fromkeys(test.partition("::")[0] for test in order)), selection)
    if code == 0:
        return {"result": "survived", "by": ""}
    if code == 5:
        raise RuntimeError(f"no test was collected of {order[:3]}")
    return {"result": "killed", "by": selection.failed or "import"}


def _lines_of(test_file: str) -> dict[str, Any]:
    """Runs one file of tests and gives, per passing test, its seconds and the lines it runs."""
    import coverage

    measured = coverage.Coverage(data_file=None, config_file=False, include=[str(ROOT / "rftcore" / "*")])
    measured.start()
    watcher = _Coverage(measured)
    pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", test_file], [watcher])
    measured.stop()
    data = measured.get_data()
    lines: dict[str, dict[str, list[int]]] = collections.defaultdict(dict)
    imported: dict[str, list[int]] = {}
    for path in data.measured_files():
        name = str(Path(path).relative_to(ROOT))
        by_test = collections.defaultdict(list)
        for line, contexts in data.contexts_by_lineno(path).items():
            for context in contexts:
                by_test[context].append(line)
        imported[name] = by_test.pop("", [])
        for test, reached in by_test.items():
            lines[test][name] = reached
    passed = [test for test, outcome in watcher.outcomes.items() if outcome == "passed"]
    return {
        "imported": imported,
        "failed": [test for test, outcome in watcher.outcomes.items() if outcome == "failed"],
        "tests": {test: {"seconds": watcher.seconds[test], "lines": lines[test]} for test in passed},
    }


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def _test_lines(tested: str, limit: float) -> dict[str, Any]:
    """What each file of a package's tests runs, measured once for each state of that file and of rftcore."""
    folder = ROOT / "python_tests" / tested
    package = _digest(sorted((ROOT / "rftcore").rglob("*.py")))
    found = {}
    helpers = [path for path in folder.glob("*.py") if not path.name.startswith("test_")]
    helpers += (ROOT / "python_tests").glob("*.py")
    files = [*sorted(folder.glob("test_*.py")), *(ROOT / "python_tests" / name for name in _ALSO.get(tested, ()))]
    for file in (str(path.relative_to(ROOT)) for path in files):
        key = hashlib.sha256((package + _digest([ROOT / file, *sorted(helpers)])).encode()).hexdigest()
        kept = _CACHE / f"{key[:24]}.json"
        if not kept.exists() and not limit:
            found[file] = None
            continue
        if not kept.exists():
            result, seconds = _in_fork(lambda file=file: _lines_of(file), limit)
            print(f"lines of {file}: {seconds:.0f} s", flush=True)
            if not isinstance(result, dict):
                print(f"  not measured: {result or f'it ran past {limit:.0f} s'}")
                found[file] = None
                continue
            kept.write_text(json.dumps(result))
        found[file] = json.loads(kept.read_text())
        for test in found[file]["failed"]:
            print(f"  left out, it fails without a mutation: {test}")
    return found


def _order(mutation: Mutation, found: dict[str, Any], budget: float) -> tuple[list[str], float]:
    """The tests to run and their seconds: by file, those that run the changed lines before the rest of their file.

    A file's later tests see what its first computed and kept, so all of a file belongs to what one of it runs. A file
    whose lines are not known is run whole, first where it has the module's name, else last.
    """
    stem = Path(mutation.file).stem
    whole = [file for file, kept in found.items() if kept is None]
    found = {file: kept for file, kept in found.items() if kept is not None}
    named = [file for file in whole if stem in Path(file).stem]
    order, seconds = _measured_order(mutation, found, stem, budget)
    if not seconds:
        named = whole
    return named + order, seconds + budget * bool(named)


def _measured_order(mutation: Mutation, found: dict[str, Any], stem: str, budget: float) -> tuple[list[str], float]:
    wanted = set(range(mutation.first, mutation.last + 1))
    if mutation.body:
        wanted = set(range(mutation.body[0], mutation.body[1] + 1))
    # A line that runs when the module is imported belongs to every test that uses the module, and not to the one alone
    # that was the first of its file to do so.
    any_line = any(wanted & set(kept["imported"].get(mutation.file, ())) for kept in found.values())
    direct = {
        file: [
            test
            for test, facts in kept["tests"].items()
            if (reached := facts["lines"].get(mutation.file)) and (any_line or wanted & set(reached))
        ]
        for file, kept in found.items()
    }
    files = sorted(
        (file for file in direct if direct[file]),
        key=lambda f: (stem not in Path(f).stem, sum(found[f]["tests"][t]["seconds"] for t in direct[f])),
    )
    first, rest = [], []
    for file in files:
        tests = found[file]["tests"]
        by_time = sorted(tests, key=lambda t: tests[t]["seconds"])
        first += [test for test in by_time if test in direct[file]]
        rest += [test for test in by_time if test not in direct[file]]
    order, total = [], 0.0
    for test in first + rest:
        cost = next(found[f]["tests"][test]["seconds"] for f in files if test in found[f]["tests"])
        if order and total + cost > budget:
            continue
        order.append(test)
        total += cost
    return order, total


def _sample(seed: int, number: int) -> tuple[list[Mutation], dict[str, int], dict[str, str]]:
    """`number` mutants, one a place, the places drawn in proportion to each file's; a variant of each at random."""
    draw = random.Random(seed)
    paths = [path for package in _PACKAGES for path in sorted((ROOT / "rftcore" / package).glob("*.py"))]
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in paths}
    places = {file: found for file, source in sources.items() if (found := sites(file, source))}
    total = sum(map(len, places.values()))
    chosen = []
    for file, found in places.items():
        # At least three of every file, however short.
        count = min(len(found), max(3, round(number * len(found) / total)))
        for variants in sorted(draw.sample(found, count), key=lambda v: (v[0].line, v[0].column)):
            draw.shuffle(variants)
            fits = next((mutation for mutation in variants if mutation.compiles(sources[file])), None)
            if fits is not None:
                chosen.append(fits)
    return chosen, {file: len(found) for file, found in places.items()}, sources


def _judgement(judged: Sequence[dict[str, str]], mutation: Mutation, change: tuple[str, str]) -> dict[str, str] | None:
    for entry in judged:
        if (entry["file"], entry["before"], entry["after"]) == (mutation.file, *change):
            return entry
    return None


def _rows(mutants: Sequence[dict[str, Any]], places: dict[str, int]) -> list[dict[str, Any]]:
    """A row a file and one for all. The score leaves out what is equivalent and what needs a GPU."""
    rows = []
    for file in [*places, "all"]:
        of_file = [m for m in mutants if file in ("all", m["file"])]
        count = collections.Counter(m["result"] for m in of_file)
        caught = count["killed"] + count["timeout"]
        counted = len(of_file) - count["equivalent"] - count["needs a GPU"]
        rows.append({
            "file": file,
            "places": sum(places.values()) if file == "all" else places[file],
            "sampled": len(of_file),
            "killed": count["killed"],
            "timeout": count["timeout"],
            "survived": count["survived"] + count["not run"],
            "equivalent": count["equivalent"],
            "needs a GPU": count["needs a GPU"],
            "score": round(caught / counted, 3) if counted else None,
        })  # fmt: skip
    return rows


def _commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--number", type=int, default=400, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=30.0, help="of tests a mutant, at most")
    parser.add_argument(
        "--file_seconds", type=float, default=600.0, help="a file of tests may take while it is measured; 0: none is"
    )
    parser.add_argument("--only", default="", help="mutants whose file contains this; prints, and writes no record")
    parser.add_argument("--survivors", action="store_true", help="run those again that survived before")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after these, with those run until then")
    parser.add_argument("--lines_only", action="store_true", help="measure which test runs which line, and stop")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    os.environ["TRITON_INTERPRET"] = "1"
    os.chdir(ROOT)
    _CACHE.mkdir(parents=True, exist_ok=True)
    for name in _IMPORTED_ONCE:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    if loaded := [name for name in sys.modules if name.startswith("rftcore")]:
        raise SystemExit(f"{loaded[0]} is imported already: a fork could not change it")
    mutations, places, sources = _sample(arguments.seed, arguments.number)
    mutations = [mutation for mutation in mutations if arguments.only in mutation.file]
    packages = sorted({Path(mutation.file).parent.name for mutation in mutations})
    found = {package: _test_lines(package, arguments.file_seconds) for package in packages}
    if arguments.lines_only:
        return
    judged = json.loads(JUDGED.read_text()) if JUDGED.exists() else []
    # Wherever it is stopped, what was run is a sample of all files.
    random.Random(arguments.seed).shuffle(mutations)
    mutants = []
    start = time.monotonic()
    for i, mutation in enumerate(mutations):
        if time.monotonic() - start > 60 * arguments.minutes:
            break
        source = sources[mutation.file]
        change = mutation.change(source)
        verdict = _judgement(judged, mutation, change)
        again = arguments.survivors and verdict is None
        outcome = _outcome(mutation, source, found[Path(mutation.file).parent.name], arguments.seconds, again)
        entry = {
            "file": mutation.file, "line": mutation.line, "operator": mutation.operator,
            "before": change[0], "after": change[1], "result": outcome.result, "by": outcome.by,
        }  # fmt: skip
        if outcome.result in ("survived", "not run") and verdict:
            entry |= {"result": verdict["verdict"], "by": verdict["reason"]}
        mutants.append(entry)
        where = f"{i + 1}/{len(mutations)} {mutation.file}:{mutation.line} {mutation.operator}"
        print(f"{where}: {entry['result']} {entry['by'][:90]} {outcome.seconds:.1f} s", flush=True)
        if entry["result"] in ("survived", "not run"):
            print(f"  - {change[0]}\n  + {change[1]}", flush=True)
    if not arguments.only:
        _save(arguments, mutants, places)
    for row in _rows(mutants, places):
        if row["sampled"]:
            print(row)


def _outcome(mutation: Mutation, source: str, found: dict[str, Any], budget: float, again: bool) -> Outcome:
    """Of this mutant, kept for this state of its file; `again` runs it although it is kept, where it survived."""
    kept = _CACHE / f"mutant-{hashlib.sha256(repr((source, mutation)).encode()).hexdigest()[:24]}.json"
    if kept.exists():
        known = Outcome(**json.loads(kept.read_text()))
        if not (again and known.result in ("survived", "not run")):
            return known
    order, seconds = _order(mutation, found, budget)
    outcome = Outcome("not run")
    if order:
        mutated = mutation.applied(source)
        limit = 3 * seconds + 20
        result, taken = _in_fork(lambda: _run(mutation, mutated, order), limit)
        if result is None:
            # Of a file that was never measured nobody knows how long it takes.
            known_time = all("::" in test for test in order)
            outcome = Outcome("timeout" if known_time else "survived", f"{limit:.0f} s", taken)
        elif result == "died":
            outcome = Outcome("killed", "the process died", taken)
        else:
            outcome = Outcome(**result, seconds=taken)
    kept.write_text(json.dumps(dataclasses.asdict(outcome)))
    return outcome


def _save(arguments: argparse.Namespace, mutants: Sequence[dict[str, Any]], places: dict[str, int]) -> None:
    # Its import of torch's companions is what the forks share; rftcore stays out of this process.
    from benchmarks import harness

    settings = {name: getattr(arguments, name) for name in ("seed", "number", "seconds")}
    mutants = sorted(mutants, key=lambda m: (m["file"], m["line"], m["operator"], m["after"]))
    content = {
        "environment": harness.environment(),
        "settings": settings | {"commit": _commit(), "cosmic_ray": importlib.metadata.version("cosmic-ray")},
        "rows": _rows(mutants, places),
        "mutants": list(mutants),
    }  # fmt: skip
    RECORD.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
