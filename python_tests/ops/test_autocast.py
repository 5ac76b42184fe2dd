"""Autocast as ops ask for it: the dtype in force, none within `disabled`, and what is lowered."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rftcore.ops import autocast
from rftcore.ops.lora_linear import _norm_dtype, project

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


def test_the_dtype_of_a_layer_norm():
    """PyTorch's autocast runs it in fp32 on a GPU, as it comes on a CPU; fp64 stays."""
    x, half = torch.ones(2, 8), torch.bfloat16
    with torch.autocast("cpu", dtype=half):
        for stored in (torch.float64, torch.float32, half):
            stock = torch.nn.functional.layer_norm(x.to(stored), (8,))
            assert _norm_dtype(x.to(stored), half) == stock.dtype
    with FakeTensorMode():
        y = torch.empty(2, 8, device="cuda", dtype=half)
        assert _norm_dtype(y, half) == torch.float32 and _norm_dtype(y, None) == half
        assert _norm_dtype(y.double(), half) == torch.float64


def test_a_residual_is_of_one_projection():
    with pytest.raises(ValueError, match="residual is given with 0 projections; it is added to one"):
        project(torch.ones(2, 8), (), None, residual=torch.ones(2, 8))
