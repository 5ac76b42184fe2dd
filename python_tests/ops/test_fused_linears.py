"""What is known of the projections' Triton kernels without running them: shapes, keys of measurements."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rftcore.ops import fused_linears, jit
from rftcore.ops.backends import Op
from rftcore.ops.lora_linear import lora_linears_forward
from rftcore.ops.projections import Adapter, Norm, Projection

needs_triton = pytest.mark.skipif(
    jit._why_missing() is not None or torch.cuda.is_available(), reason="in Triton's interpreter"
)


def projection(out=16, rank=2, dtype=torch.float32):
    adapters = (Adapter(torch.randn(rank, 16).to(dtype), torch.randn(out, rank).to(dtype), 0.5),) if rank else ()
    return Projection(torch.randn(out, 16), torch.randn(out), adapters)


def shapes(results):
    return [None if t is None else (tuple(t.shape), t.dtype) for t in results]


def real_and_fake(call, *tensors):
    """Shapes and dtypes of what a call gives for these tensors, and for tensors without data."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    real = call(*tensors)
    with mode:
        return shapes(real), shapes(call(*(t if t is None else mode.from_tensor(t) for t in tensors)))


@needs_triton
@pytest.mark.parametrize("shape", [(5, 16), (2, 3, 16)])
def test_tensors_without_data_have_the_real_ones_shapes(monkeypatch, shape):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, pair, one = torch.randn(shape), (projection(), projection(6, 0)), projection()
    norm = Norm(torch.randn(16), None, 1e-5)
    real, fake = real_and_fake(lambda x: fused_linears.linears(x, None, pair, norm, None), x)
    assert real == fake == shapes([x.new_empty(*shape[:-1], 16), x.new_empty(*shape[:-1], 6)])
    for keep in (True, False):
        real, fake = real_and_fake(lambda x, keep=keep: fused_linears.gated(x, one, norm, None, keep), x)
        assert real == fake and real[0][0] == (*shape[:-1], 8) and (real[1] is not None) == keep


@needs_triton
@pytest.mark.parametrize("wanted", list(itertools.product((True, False), repeat=3))[:-1])
def test_gradients_without_data_have_the_real_ones_shapes(monkeypatch, wanted):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, p = torch.randn(5, 16), projection()
    of_x, of_a, of_b = wanted
    needs = [of_x, False, False, False, False, of_a, of_b]
    right = [(5, 16) if of_x else None, *[None] * 4, (2, 16) if of_a else None, (16, 2) if of_b else None]
    calls = [
        (lambda g, x: fused_linears.linears_backward([g], x, (p,), None, None, needs), torch.randn(5, 16), x),
        (lambda g, x: fused_linears.gated_backward(g, x, None, p, None, None, needs), torch.randn(5, 8), x),
    ]
    for call, *tensors in calls:
        real, fake = real_and_fake(call, *tensors)
        assert real == fake and [t and t[0] for t in real] == right


def test_keys_tell_apart_what_is_measured_apart():
    x, pair = torch.ones(2, 3, 16), (projection(8), projection(6, 0))
    key = fused_linears.key
    assert key(x, pair) == "torch.float32, no norm, 8 x 16 -> 8+6, r=2+0"
    assert key(x.half(), pair, None, Norm(None, None, 1e-5)) == (
        "torch.float16, torch.float32, norm, 8 x 16 -> 8+6, r=2+0"
    )
    assert key(x.half(), pair, torch.float16) == "torch.float16, no norm, 8 x 16 -> 8+6, r=2+0"


@needs_triton
def test_measurements_are_asked_for_under_the_keys_they_are_kept_by(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    asked = []
    monkeypatch.setattr(Op, "winner", lambda op, *question: asked.append((op.name, op.key(*question))))
    x, pair = torch.randn(5, 16), (projection(8), projection(6, 0))
    fused_linears.linears(x, None, pair, None, None)
    fused_linears.gated(x, projection(), None, None, False)
    assert asked == [
        ("lora_linear", "torch.float32, no norm, 8 x 16 -> 8+6, r=2+0"),
        ("gated_linear", "torch.float32, no norm, 8 x 16 -> 16, r=2"),
    ]


@needs_triton
@pytest.mark.parametrize(("shape", "dtype", "joins"), [
    ((2, 5, 8), torch.float32, True), ((1, 5, 8), torch.float32, False), ((2, 5, 8), torch.float64, False),
])  # fmt: skip
def test_a_residual_of_the_outputs_shape_and_dtype_is_added_by_the_kernel(monkeypatch, shape, dtype, joins):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run, given = fused_linears.linears, []
    monkeypatch.setattr(
        fused_linears, "linears", lambda x, residual, *others: (given.append(residual), run(x, residual, *others))[1]
    )
    x, residual, p = torch.randn(2, 5, 16), torch.randn(*reversed(shape), dtype=dtype).permute(2, 1, 0), projection(8)
    ours, right = (lora_linears_forward(x, (p,), None, None, backend, residual)[0] for backend in ("triton", "torch"))
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5)
    assert [each is residual for each in given] == [joins]


def test_flops_are_those_of_the_products():
    """Of 6 rows with a weight (8, 16), a (2, 16) and b (8, 2); a norm and a bias are no product."""
    tensors, *_ = fused_linears._packed((projection(8),), Norm(torch.ones(16), torch.ones(16), 1e-5))
    sizes = [None if t is None else tuple(t.shape) for t in tensors]
    assert fused_linears._linears_flops((2, 3, 16), None, sizes, [1], [0.5], 1e-5, None) == 2 * 6 * (128 + 32 + 16)
