"""Fixtures of the tests of ops."""

import math

import pytest
import torch


@pytest.fixture
def nan_filled(monkeypatch):
    """Uninitialised memory is NaN: what a kernel leaves unwritten shows."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *args, **options: new_empty(self, *args, **options).fill_(math.nan)
    )
