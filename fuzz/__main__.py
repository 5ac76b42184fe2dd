"""Runs targets, one process at a time, and adds what came of each to the record."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
TARGETS = ("prompts", "loras", "configs", "commands", "checkpoints", "tensors", "records", "rewards")
_LARGEST = {"prompts": 4096, "configs": 2048, "tensors": 4096, "loras": 2048}


def main() -> int:
    """Returns 1 where something was found."""
    options = argparse.ArgumentParser(prog="python -m fuzz", description="Fuzzes what reads files and configs.")
    options.add_argument("targets", nargs="*", help=f"of {', '.join(TARGETS)}; none: all of them")
    options.add_argument("--seconds", type=int, default=300, help="of the processor, for each target")
    options.add_argument("--work", type=Path, default=Path("runs/fuzz"), help="where corpora and findings are kept")
    options.add_argument("--record", type=Path, help="a JSON file that each target's figures are added to")
    given = options.parse_args()
    found = 0
    for name in given.targets or TARGETS:
        if name not in TARGETS:
            options.error(f"there is no target {name!r}; known: {', '.join(TARGETS)}")
        figures = _run(name, given.seconds, given.work / name)
        found += len(figures["findings"])
        print(json.dumps(figures), flush=True)
        if given.record is not None:
            record = json.loads(given.record.read_text()) if given.record.exists() else {"rounds": [], "mended": []}
            record["rounds"].append(figures)
            given.record.write_text(json.dumps(record, indent=2) + "\n")
    return int(found > 0)


def _run(name: str, seconds: int, work: Path) -> dict:
    corpus, findings = (work / part for part in ("corpus", "findings"))
    for folder in (corpus, findings):
        folder.mkdir(parents=True, exist_ok=True)
    for old in (*findings.iterdir(), *work.glob("figures.json")):
        old.unlink()
    kept = len(list(corpus.iterdir()))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "FUZZ_RESULTS": str(work.resolve()),
        "FUZZ_SECONDS": str(seconds),
    }
    command = [sys.executable, "-m", "fuzz.child", name, str(corpus.resolve())]
    command += ["-timeout=600", "-rss_limit_mb=0", f"-max_len={_LARGEST.get(name, 512)}"]
    command += [f"-artifact_prefix={work.resolve()}/"]
    paths = [str(HERE.parent.resolve()), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    with open(work / "log.txt", "w", encoding="utf-8") as log:
        # What an input prints is of no interest, and what libFuzzer tells is.
        status = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=log).returncode
    log = (work / "log.txt").read_text(encoding="utf-8", errors="replace")
    branches = [int(number) for number in re.findall(r"cov: (\d+)", log)]
    figures = work / "figures.json"
    return {
        "target": name,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        **(json.loads(figures.read_text()) if figures.exists() else {"failed": status}),
        "branches_at_the_start": _at_start(log),
        "branches": max(branches, default=0),
        "corpus_at_the_start": kept,
        "corpus": len(list(corpus.iterdir())),
        "findings": sorted(json.loads(path.read_text())["kind"] for path in findings.glob("*.json")),
    }


def _at_start(log: str) -> int:
    begun = re.search(r"INITED\s+cov: (\d+)", log)
    return int(begun[1]) if begun else 0


def _commit() -> str:
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
