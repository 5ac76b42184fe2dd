"""Every Triton kernel, compiled for GPUs that are not here: nothing spilled, and the instructions that were meant."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent
KERNELS = sorted(path.stem.removeprefix("launches_") for path in HERE.glob("launches_*.py"))
# Bytes of shared memory that one program may have, and the matrix instruction in fp16 and bf16.
CHIPS = {80: (166_912, "mma.sync"), 90: (232_448, "wgmma.mma_async"), 100: (232_448, "tcgen05.mma")}
TEST_ALL = os.environ.get("RFTCORE_TEST_ALL") == "1"


@pytest.fixture(scope="module")
def found():
    """By compiled.json, where it has what would be compiled; `make test-all` compiles everything."""
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, HERE / "ahead_of_time.py", *["--anew"] * TEST_ALL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_it_compiles_to_what_was_meant(found, kernels, capability):
    launches = {name: it for name, it in found["launches"].items() if name.startswith(f"{kernels} on sm_{capability}:")}
    shared, newest = CHIPS[capability]
    assert launches
    for name, kernel in launches.items():
        assert kernel["stack"] == 0, f"{name} spills: {kernel}"
        assert kernel["shared"] <= shared, f"{name}: {kernel}"
        assert not kernel["fp64"], f"{name}: {kernel}"
        assert kernel["wide_loads"] > 0, f"{name}: {kernel}"
        meant = found["meant"][name]
        if meant == "newest":
            assert kernel["matrix"] == newest, f"{name}: {kernel}"
        else:
            assert (kernel["matrix"] is not None) == (meant == "any"), f"{name}: {kernel}"


def test_what_is_kept_is_what_the_compiler_makes(found):
    """Of the Triton that the file names; another one's kernels were all compiled here."""
    kept = json.loads((HERE / "compiled.json").read_text())
    if found["triton"] != kept["triton"]:
        pytest.skip(f"compiled.json is of Triton {kept['triton']}, this is {found['triton']}")
    names = kept["launches"].keys() | found["launches"].keys()
    old = sorted(name for name in names if kept["launches"].get(name) != found["launches"].get(name))
    message = f"compiled.json is old, run `python {HERE / 'ahead_of_time.py'} --write`: {old}"
    assert not (TEST_ALL and old), message
    if old:
        warnings.warn(message, stacklevel=1)
