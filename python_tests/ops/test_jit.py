"""Why Triton kernels may not be launched, and where tile sizes and capabilities come from."""

import contextlib
import functools
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rftcore.ops import fused_linears, jit
from rftcore.ops.gated_linear import gated_linear_backward, gated_linear_forward
from rftcore.ops.measured import Winner
from rftcore.ops.projections import Adapter, Projection

needs_triton = pytest.mark.skipif(jit._why_missing() is not None, reason="Triton is not installed")
CPU = torch.device("cpu")


def uncached(monkeypatch, name):
    """The cached answers are those of this machine as it is."""
    monkeypatch.setattr(jit, name, functools.cache(getattr(jit, name).__wrapped__))


def test_rows():
    x = torch.arange(24).reshape(2, 3, 4)
    assert torch.equal(jit.rows(x), x.reshape(6, 4)) and torch.equal(jit.rows(x[0, 0]), x[0, :1])


def test_the_interpreter_has_the_oldest_gpus_capability(monkeypatch):
    uncached(monkeypatch, "capability")
    assert jit.capability(CPU) == 80
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 1))
    assert jit.capability(torch.device("cuda", 0)) == 91


def test_without_triton_or_a_compiler_that_is_the_reason(monkeypatch):
    uncached(monkeypatch, "_why_missing")
    monkeypatch.setattr(jit.importlib.util, "find_spec", lambda name: None)
    assert "Triton is not installed" in jit.reasons("x")(torch.ones(2))[-1]
    monkeypatch.setattr(jit.importlib.util, "find_spec", lambda name: sys)
    for interpreted, CC, found, missing in (
        (False, None, (), True), (False, None, ("gcc",), False), (False, None, ("clang",), False),
        (False, "cc", (), False), (True, None, (), False),
    ):  # fmt: skip
        uncached(monkeypatch, "_why_missing")
        monkeypatch.setattr(jit, "_interpreted", lambda: interpreted)
        monkeypatch.setattr(jit.shutil, "which", lambda name: name if name in found else None)
        monkeypatch.delenv("CC", raising=False)
        if CC:
            monkeypatch.setenv("CC", CC)
        assert (jit._why_missing() is not None) == missing


@needs_triton
def test_what_is_served(monkeypatch):
    reasons = jit.reasons("x")
    x = torch.ones(2)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert reasons(x) == reasons(x.half()) == []
    assert reasons(x.double()) == ["it serves fp32, bf16 and fp16, x is torch.float64"]
    assert reasons(x.bfloat16()) == ["Triton's interpreter computes bf16 wrongly"]
    assert reasons(x.to("meta")) == ["it serves cuda tensors, x is on meta"]
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert reasons(x) == ["it serves cuda tensors, x is on cpu"]


@needs_triton
@pytest.mark.parametrize(
    ("available", "hip", "capability", "refusal"),
    [
        (False, None, None, "it is for NVIDIA GPUs"),
        (True, "6.0", None, "it is for NVIDIA GPUs"),
        (True, None, (7, 5), "cuda:0 has 7.5"),
        (True, None, (8, 0), None),
        (True, None, (9, 0), None),
    ],
)
def test_gpus_that_are_served(monkeypatch, available, hip, capability, refusal):
    uncached(monkeypatch, "_why_not_on")
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    found = jit.reasons("x")(x)
    assert found == [] if refusal is None else len(found) == 1 and refusal in found[0]


@needs_triton
def test_a_config_is_the_winners_or_none():
    sizes = {"rows": 1, "columns": 512, "num_warps": 8}
    config = jit.config("geglu.Config:forward", Winner("triton", {"geglu.Config:forward": sizes}))
    assert config == jit.kernels("geglu").Config(**sizes)
    assert jit.config("geglu.Config", Winner("triton", {"geglu.Config:forward": sizes})) is None


def projection(rank, adapters=torch.float32, base=torch.float32):
    a, b = torch.ones(rank, 8, dtype=adapters), torch.ones(6, rank, dtype=adapters)
    return Projection(torch.ones(6, 8, dtype=base), None, (Adapter(a, b, 1.0),))


@needs_triton
def test_the_largest_that_the_linears_kernels_serve(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.ones(2, 8)
    assert fused_linears.reasons(x, [projection(64)] * 3) == []
    assert fused_linears.reasons(x, [projection(65)]) == ["an adapter's rank is over 64"]
    assert fused_linears.reasons(x, [projection(1)] * 4) == ["it serves 3 projections at once, there are 4"]


@needs_triton
def test_dtypes_of_adapters(monkeypatch):
    """All the base's or all fp32."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, half, full = torch.ones(2, 8).half(), torch.float16, torch.float32
    for adapters, refused in (((half,), 0), ((full,), 0), ((half, full), 1), ((torch.bfloat16,), 1)):
        found = fused_linears.reasons(x, [projection(2, dtype, half) for dtype in adapters])
        assert len(found) == refused and all("adapters are" in words for words in found)


@pytest.mark.parametrize("device", [torch.device("cpu"), torch.device("cuda", 1)])
def test_launches_run_in_their_order_on_their_device(monkeypatch, device):
    seen = []

    class Launch:
        def __init__(self, name):
            self.run = lambda: seen.append(name)

    @contextlib.contextmanager
    def current(chosen):
        seen.append(chosen)
        yield
        seen.append("done")

    monkeypatch.setattr(torch.cuda, "device", current)
    jit.run(device, Launch("first"), Launch("second"))
    assert seen == ["first", "second"] if device.type == "cpu" else seen == [device, "first", "second", "done"]


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
@pytest.mark.parametrize("kept", [True, False])
def test_frozen_adapters_take_part_in_a_gate_that_is_made_again(monkeypatch, kept):
    """Of the input's gradient alone, from u or without it."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, grad = torch.randn(3, 16), torch.randn(3, 8)
    p = Projection(torch.randn(16, 16), None, (Adapter(torch.randn(2, 16), torch.randn(16, 2), 0.5),))
    needs = [True, *[False] * 6]
    gradients = []
    for backend in ("separate", "triton"):
        _, u = gated_linear_forward(x, p, None, None, backend, keep=True)
        found = gated_linear_backward(grad, x, u if kept else None, p, None, None, backend, needs)
        assert [g is not None for g in found] == needs
        gradients.append(found[0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
def test_what_a_gate_keeps_has_the_inputs_shape(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, p = torch.randn(2, 3, 16), Projection(torch.randn(16, 16), torch.randn(16), ())
    (right, u), (ours, kept) = (gated_linear_forward(x, p, None, None, b, keep=True) for b in ("separate", "triton"))
    assert ours.shape == (2, 3, 8) and kept.shape == (2, 3, 16)
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept, u, rtol=1e-5, atol=1e-5)
