"""Autocast as ops ask for it: the dtype in force, none within `disabled`, and what is lowered."""

import contextlib

import pytest
import torch

from rftcore.ops import autocast

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_in_force(dtype):
    assert autocast.active(CPU) is None
    with torch.autocast("cpu", dtype=dtype):
        assert autocast.active(CPU) == dtype
        # A device that autocast does not know.
        assert autocast.active(META) is None
        with torch.autocast("cpu", enabled=False):
            assert autocast.active(CPU) is None


def test_nothing_is_cast_within_disabled():
    a = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with autocast.disabled(CPU):
            assert (a @ a).dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16
    assert isinstance(autocast.disabled(META), contextlib.nullcontext)


def test_what_is_lowered():
    """As PyTorch's own matrix product under autocast: all but fp64."""
    for stored in (torch.float64, torch.float32, torch.bfloat16):
        a = torch.ones(2, 2, dtype=stored)
        assert autocast.lowered(a, None) == stored
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert autocast.lowered(a, torch.bfloat16) == (a @ a).dtype
