"""Every Triton kernel, compiled for GPUs that are not here: nothing spilled, and the instructions that were meant."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent
MODULES = sorted(path.stem for path in HERE.glob("launches_*.py"))
# Bytes of shared memory that one program may have, and the matrix instruction in fp16 and bf16.
CHIPS = {80: (166_912, "mma.sync"), 90: (232_448, "wgmma.mma_async"), 100: (232_448, "tcgen05.mma")}


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("module", MODULES)
def test_it_compiles_to_what_was_meant(module, capability):
    found = compiled(module, capability)
    shared, newest = CHIPS[capability]
    assert found
    for name, kernel in found.items():
        assert kernel["stack"] == 0, f"{name} spills: {kernel}"
        assert kernel["shared"] <= shared, f"{name}: {kernel}"
        assert not kernel["fp64"], f"{name}: {kernel}"
        assert kernel["wide_loads"] > 0, f"{name}: {kernel}"
        if kernel["meant"] == "newest":
            assert kernel["matrix"] == newest, f"{name}: {kernel}"
        else:
            assert (kernel["matrix"] is not None) == (kernel["meant"] == "any"), f"{name}: {kernel}"


def compiled(module, capability):
    """Triton keeps what it compiled, by a hash of the sources: a second run is quick."""
    paths = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, HERE / "ahead_of_time.py", module, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
