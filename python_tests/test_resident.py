"""What a process is said to hold is its own."""

import subprocess
import sys

import pytest

from rftcore import resident

MIB = 2**20
_CHILD = "from rftcore import resident; print(resident.largest())"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a system has getrusage alone")
def test_a_child_of_a_large_process_is_a_small_one():
    held = bytearray(300 * MIB)
    before = resident.largest()
    child = int(subprocess.run([sys.executable, "-c", _CHILD], check=True, capture_output=True, text=True).stdout)
    assert len(held) < before and child < before - 100 * MIB


@pytest.mark.skipif(not resident.count_anew(), reason="the system cannot count anew")
def test_the_largest_is_seen_after_it_is_gone_and_counted_anew():
    resident.count_anew()
    before = resident.now()
    held = bytearray(200 * MIB)
    del held
    assert 190 * MIB < resident.largest() - before < 230 * MIB
    assert resident.count_anew() and resident.largest() - before < 30 * MIB
