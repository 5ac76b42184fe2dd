"""Fixtures of the tests of ops."""

import math

import emulated_cuda
import pytest
import torch
from checks import EMULATED


@pytest.fixture
def nan_filled(monkeypatch):
    """Uninitialised memory is NaN: what a kernel leaves unwritten shows."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *args, **options: new_empty(self, *args, **options).fill_(math.nan)
    )


@pytest.fixture(params=["reference", "cpu", *EMULATED, "cuda"])
def backend(request, monkeypatch):
    """The name of a backend, made to serve what a test allocates: on a GPU where there is one, else emulated."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        with torch.device("cuda"):
            yield "cuda"
    elif capability := EMULATED.get(request.param):
        emulated_cuda.serve(monkeypatch, capability)
        yield "cuda"
    else:
        yield request.param
