"""What the ops make of Triton's kernels: dtypes, needs, layouts, launches, and the way through the dispatcher."""

import itertools

import pytest
import torch
from checks import assert_as_good_as, laid_out, relative_error, value_and_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from benchmarks.memory import saved_bytes
from rftcore import ops
from rftcore.ops import Adapter, Norm, Projection, fused_attention, fused_linears, jit
from rftcore.ops.attention import attention_backward, attention_forward
from rftcore.ops.backends import OPS
from rftcore.ops.gated_linear import gated_linear_backward, gated_linear_forward
from rftcore.ops.lora_linear import lora_linears_backward, lora_linears_forward
from rftcore.ops.projections import flatten

launch = pytest.importorskip("rftcore.kernels.launch", reason="Triton is not installed", exc_type=ImportError)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter; test_every_backend is for a GPU")
EPS = 1e-5


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that were launched."""
    names, run = [], launch.Launch.run

    def spy(self):
        names.append(self.kernel.fn.__name__)
        run(self)

    monkeypatch.setattr(launch.Launch, "run", spy)
    return names


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def linear(out, width, rank, dtype=torch.float32, adapters=None, bias=False):
    own = ()
    if rank:
        pair = (normal(rank, width) / width**0.5, normal(out, rank) / rank**0.5)
        own = (Adapter(*(m.to(adapters or dtype).requires_grad_() for m in pair), 0.7),)
    return Projection((normal(out, width) / width**0.5).to(dtype), normal(out, dtype=dtype) if bias else None, own)


def as_fp64(value):
    """The same numbers, in nested tuples, as leaves of their own."""
    if isinstance(value, torch.Tensor):
        return value.detach().double().requires_grad_(value.requires_grad)
    if isinstance(value, tuple):
        values = map(as_fp64, value)
        return type(value)(*values) if hasattr(value, "_fields") else tuple(values)
    return value


def trained(x, projections):
    return [x, *(m for p in projections for adapter in p.adapters for m in adapter[:2])]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fp32_adapters_on_any_base(dtype):
    """As LoRA masters are kept: the adapters' gradients have fp32's precision, whatever the base's."""
    x = normal(2, 21, 40, dtype=dtype).requires_grad_()
    projections = tuple(linear(out, 40, 4, dtype, torch.float32) for out in (24, 40, 24))
    norm = Norm(1 + normal(40, dtype=dtype) / 2, normal(40, dtype=dtype), EPS)
    grad = normal(2, 21, 88, dtype=dtype)

    def run(backend, x, projections, norm):
        return torch.cat(ops.lora_linears(x, projections, norm, backend=backend), dim=-1)

    wide = as_fp64((x, projections, norm))
    exact = value_and_gradients(lambda *_: run("reference", *wide), trained(*wide[:2]), grad.double())
    stock, ours = (
        value_and_gradients(lambda *_, b=backend: run(b, x, projections, norm), trained(x, projections), grad)
        for backend in ("reference", "triton")
    )
    assert_as_good_as(stock, ours, exact)


def test_only_the_gradients_that_are_needed():
    x, norm = normal(13, 32), Norm(1 + normal(32) / 2, None, EPS)
    projections = (linear(16, 32, 3, bias=True), linear(24, 32, 0), linear(16, 32, 5))
    grads = [normal(13, len(p.weight)) for p in projections]
    flat = flatten(projections)
    trainable = [0, *(3 + i for i, t in enumerate(flat) if t is not None and t.requires_grad)]
    everything = [i in trainable for i in range(3 + len(flat))]
    expected = lora_linears_backward(grads, x, projections, norm, None, "torch", everything)
    for wanted in itertools.product((False, True), repeat=len(trainable)):
        needs = [False] * len(everything)
        for i, want in zip(trainable, wanted, strict=True):
            needs[i] = want
        found = lora_linears_backward(grads, x, projections, norm, None, "triton", needs)
        for got, right, need in zip(found, expected, needs, strict=True):
            assert (got is not None) == need
            assert got is None or relative_error(got, right) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_residual_is_added_in_its_dtype(dtype):
    x, residual, p = normal(7, 32), normal(7, 16, dtype=dtype), linear(16, 32, 4, bias=True)
    ours = lora_linears_forward(x, (p,), None, None, "triton", residual)[0]
    right = lora_linears_forward(x, (p,), None, None, "torch", residual)[0]
    assert ours.dtype == right.dtype and relative_error(ours, right) < 1e-6


def test_a_residual_of_fewer_samples_is_added_to_each():
    x, residual, p = normal(3, 7, 32), normal(1, 7, 16), linear(16, 32, 4)
    ours, right = (lora_linears_forward(x, (p,), None, None, backend, residual)[0] for backend in ("triton", "torch"))
    assert relative_error(ours, right) < 1e-6


def test_autocast_lowers_the_adapters():
    x, p = normal(7, 32, dtype=torch.float16).requires_grad_(), linear(16, 32, 4, torch.float16, torch.float32)
    results = []
    for backend in ("torch", "triton"):
        with torch.autocast("cpu", torch.float16):
            y = ops.lora_linear(x, p, backend=backend)
        results.append([y, *torch.autograd.grad(y, trained(x, (p,)), torch.ones_like(y))])
    for right, ours in zip(*results, strict=True):
        assert ours.dtype == right.dtype and relative_error(ours, right) < 2e-3


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("normed", [True, False])
def test_a_gate_from_u_that_is_kept_or_made_again(rank, normed):
    x, p = normal(9, 40), linear(48, 40, rank, bias=True)
    norm = Norm(1 + normal(40) / 2, normal(40), EPS) if normed else None
    grad, needs = normal(9, 24), [True, False, False, False, False, *[True] * (2 * len(p.adapters))]
    right, u = gated_linear_forward(x, p, norm, None, "separate", keep=True)
    expected = gated_linear_backward(grad, x, u, p, norm, None, "separate", needs)
    for keep in (True, False):
        y, kept = gated_linear_forward(x, p, norm, None, "triton", keep)
        assert (kept is not None) == keep and relative_error(y, right) < 1e-6
        read = x if normed or rank or not keep else None
        found = gated_linear_backward(grad, read, kept, p, norm, None, "triton", needs)
        for got, expect in zip(found, expected, strict=True):
            assert (got is None) == (expect is None)
            assert got is None or relative_error(got, expect) < 1e-5


def test_projections_that_are_not_served_say_why():
    x = normal(4, 32)
    reasons = OPS["lora_linear"].not_supported_reasons["triton"]
    one = linear(16, 32, 4)
    cases = {
        "several active adapters": [one._replace(adapters=one.adapters * 2)],
        "rank is over 64": [linear(80, 128, 65)],
        "3 projections at once": [one] * 4,
        "is trained": [one._replace(weight=one.weight.clone().requires_grad_())],
        "no norm and no adapter": [linear(16, 32, 0)],
        "must all be": [linear(16, 32, 4, adapters=torch.float64)],
        "the products are in": [linear(16, 32, 4, torch.float16)],
    }
    for words, projections in cases.items():
        assert words in "; ".join(reasons(x, projections))
    assert "fp32, bf16 and fp16" in "; ".join(reasons(x.double(), [one]))
    assert "nothing to compute" in "; ".join(reasons(x[:0], [one]))


def test_limits_are_the_kernels():
    """The ops state them without importing Triton."""
    shared, few, many = (jit.kernels(name) for name in ("projections", "cross_attention", "attention"))
    limits = fused_linears._MAX_PROJECTIONS, fused_linears._MAX_RANK
    assert limits == (shared.MAX_PROJECTIONS, shared.MAX_RANK)
    assert (fused_attention._FEW_KEYS, fused_attention._MAX_HEAD_DIM) == (few.MAX_KEYS, many.MAX_HEAD_DIM)


def test_launches(launched):
    """What a transformer block costs: names and numbers of kernels."""
    x = normal(2, 16, 32).requires_grad_()
    norm = Norm(1 + normal(32) / 2, normal(32), EPS)
    qkv = tuple(linear(32, 32, 4) for _ in range(3))
    outputs = ops.lora_linears(x, qkv, norm, backend="triton")
    assert len(launched) <= 2 and launched[-1] == "_project_kernel"
    launched.clear()
    torch.autograd.grad(sum(y.sum() for y in outputs), trained(x, qkv))
    expected = "_shrink_kernel _low_rank_kernel _input_kernel _backward_kernel _adapters_kernel _sum_kernel"
    assert launched == expected.split()
    launched.clear()
    y = ops.gated_linear(x, linear(96, 32, 0, bias=True), norm, backend="triton")
    assert launched == ["_shrink_kernel", "_forward_kernel"]
    launched.clear()
    torch.autograd.grad(y.sum(), x)
    assert launched == ["_shrink_kernel", "_backward_kernel", "_input_kernel", "_backward_kernel"]


def qkv_of(queries=21, keys=37, head_dim=40, dtype=torch.float32):
    return [normal(2, n, 2, head_dim, dtype=dtype).transpose(1, 2).requires_grad_() for n in (queries, keys, keys)]


@pytest.mark.parametrize("keys", [pytest.param(37, marks=pytest.mark.slow), 140])
def test_attention_in_any_layout(keys):
    inputs = qkv_of(keys=keys)
    grad = normal(2, 2, 21, 40)
    right = value_and_gradients(F.scaled_dot_product_attention, inputs, grad)
    for layout in ("sliced", "transposed"):
        views = [laid_out(t.detach(), layout).requires_grad_() for t in inputs]
        for g in (grad, laid_out(grad, layout), grad.flatten()[0].expand_as(grad)):
            ours = value_and_gradients(lambda *t: ops.attention(*t, backend="triton"), views, g)
            if g.stride(0) == 0:
                right_here = value_and_gradients(F.scaled_dot_product_attention, inputs, g)
            else:
                right_here = right
            assert max(relative_error(a, b) for a, b in zip(ours, right_here, strict=True)) < 1e-5


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.5])
def test_attention_with_any_scale(scale):
    inputs, grad = qkv_of(), normal(2, 2, 21, 40)
    ours = value_and_gradients(lambda *t: ops.attention(*t, scale, backend="triton"), inputs, grad)
    right = value_and_gradients(lambda *t: ops.attention(*t, scale, backend="math"), inputs, grad)
    assert max(relative_error(a, b) for a, b in zip(ours, right, strict=True) if b.norm() > 0) < 1e-5
    assert all(a.norm() == 0 for a, b in zip(ours, right, strict=True) if b.norm() == 0)


@pytest.mark.parametrize("keys", [37, pytest.param(140, marks=pytest.mark.slow)])
def test_attention_makes_only_the_gradients_that_are_needed(keys):
    q, k, v = (t.detach() for t in qkv_of(keys=keys))
    grad = normal(2, 2, 21, 40)
    o, lse = attention_forward(q, k, v, backend="triton")
    everything = attention_backward(grad, q, k, v, o, lse, backend="triton")
    for needs in itertools.product((False, True), repeat=3):
        found = attention_backward(grad, q, k, v, o, lse, needs=needs, backend="triton")
        for got, right, need in zip(found, everything, needs, strict=True):
            assert torch.equal(got, right) if need else got is None


@pytest.mark.parametrize("keys", [37, 140])
def test_attention_backward_from_an_output_in_any_layout(keys):
    q, k, v = (t.detach() for t in qkv_of(keys=keys))
    grad = normal(2, 2, 21, 40)
    o, lse = attention_forward(q, k, v, backend="triton")
    right = attention_backward(grad, q, k, v, o, lse, backend="triton")
    wide_o, wide_lse = normal(2, 42, 2, 40).transpose(1, 2), normal(2, 2, 42)
    wide_o[:, :, ::2], wide_lse[:, :, ::2] = o, lse
    found = attention_backward(grad, q, k, v, wide_o[:, :, ::2], wide_lse[:, :, ::2], backend="triton")
    assert all(map(torch.equal, found, right))


def test_attention_saves_its_inputs_output_and_log_sum_exp():
    inputs = qkv_of()
    with saved_bytes() as count:
        o = ops.attention(*inputs, backend="triton")
    assert count["bytes"] == sum(t.nbytes for t in (*inputs, o)) + 4 * 2 * 2 * 21


def test_what_attention_does_not_serve_it_says():
    reasons = OPS["attention"].not_supported_reasons["triton"]
    assert "multiple of 8" in "; ".join(reasons(*qkv_of(head_dim=20)))
    assert "multiple of 8" in "; ".join(reasons(*qkv_of(head_dim=168)))
    assert "nothing to attend" in "; ".join(reasons(*qkv_of(keys=0)))


def test_the_interpreter_is_for_who_asks_for_it(launched):
    inputs = qkv_of()
    ops.attention(*inputs)
    ops.geglu(normal(4, 8))
    ops.gated_linear(normal(4, 8), linear(8, 8, 2))
    ops.lora_linear(normal(4, 128), linear(8, 128, 48))
    assert not launched


def test_opcheck():
    library = torch.ops.rftcore
    check = torch.library.opcheck
    x, p, norm = normal(5, 16), linear(16, 16, 3, bias=True), Norm(1 + normal(16) / 2, normal(16), EPS)
    tensors = [t if t is None else t.detach() for t in (*norm[:2], *flatten([p]))]
    parts = (tensors, [1], [0.7], EPS, None)
    needs = [True, False, False, False, False, True, True]
    check(library.lora_linears.default, (x, normal(5, 16), *parts))
    check(library.lora_linears_backward.default, ([normal(5, 16)], x, *parts, needs))
    check(library.gated_linear.default, (x, *parts, True))
    check(library.gated_linear_backward.default, (normal(5, 8), x, None, *parts, needs))
    q, k, v = (t.detach() for t in qkv_of(5, 7, 8))
    check(library.attention.default, (q, k, v, 0.5))
    o, lse = library.attention(q, k, v, 0.5)
    check(library.attention_backward.default, (torch.ones_like(o), q, k, v, o, lse, 0.5, [True, False, True]))
    check(library.geglu.default, (normal(3, 8), "triton"))


def test_fake_tensors():
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 5, 16)
        y, *_ = ops.lora_linears(x, (linear(24, 16, 3), linear(8, 16, 0)), Norm(None, None, EPS), backend="triton")
        assert y.shape == (2, 5, 24)
        assert ops.gated_linear(x, linear(24, 16, 3), backend="triton").shape == (2, 5, 12)
