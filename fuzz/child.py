"""The process that atheris drives: one target, until its time is over; findings are kept and it goes on."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import atheris

_ROOM = 4 * 2**30


def main() -> None:
    name, *arguments = sys.argv[1:]
    # The package as it lies here: what an editable install finds, atheris does not see into.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
    # Nothing is fetched: a name that is not here is answered at once.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with atheris.instrument_imports(include=["rftcore"]):
        target = importlib.import_module(f"fuzz.targets.{name}")
    from fuzz.guard import Guard

    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=base) as made:
        folder = Path(made) / "input"
        folder.mkdir()
        # The commands look for users' modules where they are called, and there are none.
        os.chdir(folder)
        guard = Guard(folder)
        if arguments and Path(arguments[-1]).is_file():
            guard.watch(lambda: target.check(Path(arguments[-1]).read_bytes(), folder))
            print("held")
            return
        for number, seed in enumerate(target.seeds()):
            Path(arguments[0], f"seed-{number:03}").write_bytes(seed)
        _limit_memory()
        results = Path(os.environ["FUZZ_RESULTS"])
        findings, executions, begun = _Findings(results / "findings"), 0, time.process_time()

        def one(data: bytes) -> None:
            nonlocal executions
            spent = time.process_time() - begun
            if spent > float(os.environ["FUZZ_SECONDS"]):
                (results / "figures.json").write_text(json.dumps({"seconds": round(spent), "executions": executions}))
                # libFuzzer counts seconds of the clock alone, and has nothing to put away.
                shutil.rmtree(made)
                os._exit(0)
            executions += 1
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            try:
                guard.watch(lambda: target.check(data, folder))
            except BaseException as error:  # noqa: BLE001  Whatever it is, it is a finding.
                findings.add(error, data)

        atheris.Setup([sys.argv[0], *arguments], one)
        atheris.Fuzz()


def _limit_memory() -> None:
    """So that an input that asks for all the memory there is gets an error, and the machine goes on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class _Findings:
    """One input of each kind of failure, the shortest; by its exception and where in the project it came from."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._shortest = folder, {}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, error: BaseException, data: bytes) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if f"{os.sep}rftcore{os.sep}" in frame.filename]
        where = f"{Path(own[-1].filename).name}:{own[-1].name}" if own else "the check"
        kind = f"{type(error).__name__} in {where}"
        if type(error).__name__ == "Broken":
            kind += f": {str(error)[:60]}"
        if kind in self._shortest and len(data) >= self._shortest[kind]:
            return
        self._shortest[kind] = len(data)
        name = hashlib.sha256(kind.encode()).hexdigest()[:12]
        (self._folder / name).write_bytes(data)
        text = "".join(traceback.format_exception(error, limit=-12))
        (self._folder / f"{name}.json").write_text(json.dumps({"kind": kind, "traceback": text[-6000:]}, indent=2))


if __name__ == "__main__":
    main()
