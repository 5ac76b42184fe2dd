"""attention: every backend against scaled_dot_product_attention, and what it saves, counted."""

from itertools import product

import pytest
import torch
from checks import DTYPES, assert_as_good_as, laid_out, relative_error, value_and_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as stock

from benchmarks.memory import saved_bytes
from rftcore.ops import attention, attention_backward, attention_forward
from rftcore.ops.attention import _KERNELS
from rftcore.ops.backends import OPS

BACKENDS = ["cpu", "flash", "math", "reference"]
# B, heads, N, M, d: self- and cross-attention, head dimensions of SD, odd and smallest sizes.
SIZES = [
    (2, 2, 64, 64, 40),
    (1, 2, 33, 77, 64),
    (2, 1, 5, 77, 80),
    (1, 2, 19, 7, 160),
    (3, 1, 1, 9, 13),
    (1, 1, 1, 1, 1),
]


def make_inputs(size, dtype=torch.float64, device="cpu"):
    """As diffusers makes them: heads of (B, N, heads * d) projections."""
    batch, heads, queries, keys, d = size

    def head_view(tokens):
        rows = torch.randn(batch, tokens, heads * d, dtype=torch.float64) * 1.5
        return rows.to(device, dtype).view(batch, tokens, heads, d).transpose(1, 2).requires_grad_()

    return [head_view(queries), head_view(keys), head_view(keys)]


def served(backend):
    return lambda *inputs: attention(*inputs, backend=backend)


def assert_exact(ours, exact):
    assert max(relative_error(a, b) for a, b in zip(ours, exact, strict=True)) < 1e-12


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_and_gradients_are_exact_in_fp64(backend, size):
    inputs = make_inputs(size)
    assert OPS["attention"].choose("auto", *inputs) == (OPS["attention"].heuristic(*inputs) or "cpu")
    grad = torch.randn(inputs[0].shape, dtype=torch.float64)
    for g in (grad, laid_out(grad, "sliced"), laid_out(grad, "transposed"), grad.flatten()[0].expand_as(grad)):
        if size[3] == 1:  # one key: the gradients of q and k are 0 but for rounding
            inputs = [t.requires_grad_(t is inputs[2]) for t in inputs]
        assert_exact(value_and_gradients(served(backend), inputs, g), value_and_gradients(stock, inputs, g))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded"])
def test_any_strides(backend, layout):
    def lay(t):
        laid = t[:1].detach().expand_as(t) if layout == "expanded" else laid_out(t.detach(), layout)
        return laid.requires_grad_()

    inputs = [lay(t) for t in make_inputs((2, 3, 6, 9, 16))]
    dense = [t.detach().contiguous().requires_grad_() for t in inputs]
    grad = torch.randn(2, 3, 6, 16, dtype=torch.float64)
    assert_exact(value_and_gradients(served(backend), inputs, grad), value_and_gradients(stock, dense, grad))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale(backend):
    inputs = make_inputs((1, 2, 5, 7, 8))
    grad = torch.randn(1, 2, 5, 8, dtype=torch.float64)
    ours = value_and_gradients(lambda q, k, v: attention(q, k, v, 0.7, backend=backend), inputs, grad)
    assert_exact(ours, value_and_gradients(lambda q, k, v: stock(q, k, v, scale=0.7), inputs, grad))


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keys", [256, 77])
def test_low_precision_is_as_good_as_pytorch(backend, dtype, keys):
    inputs = make_inputs((1, 2, 256, keys, 40), dtype)
    grad = torch.randn(1, 2, 256, 40).to(dtype)
    exact = value_and_gradients(stock, [t.detach().double().requires_grad_() for t in inputs], grad.double())
    ours = value_and_gradients(served(backend), inputs, grad)
    assert_as_good_as(value_and_gradients(stock, inputs, grad), ours, exact)


def test_flash_is_pytorchs_own_kernel_bit_for_bit():
    inputs = make_inputs((2, 2, 70, 77, 40), torch.float32)
    grad = torch.randn(2, 2, 70, 40)
    ours, theirs = value_and_gradients(served("flash"), inputs, grad), value_and_gradients(stock, inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "flash"])
def test_heads_join_again_without_a_copy(backend):
    inputs = make_inputs((2, 2, 70, 77, 40), torch.float32)
    o, *grads = value_and_gradients(served(backend), inputs, torch.randn(2, 2, 70, 40))
    assert all(t.transpose(1, 2).is_contiguous() for t in (o, *grads))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", "flash", "math"])
def test_inputs_output_and_log_sum_exp_are_saved_and_nothing_else(backend, dtype):
    batch, heads, queries, keys, d = size = (2, 2, 48, 77, 40)
    inputs = make_inputs(size, dtype)
    with saved_bytes() as count:
        o = attention(*inputs, backend=backend)
    rows = batch * heads * queries
    assert count["bytes"] == dtype.itemsize * (2 * rows * d + 2 * batch * heads * keys * d) + 4 * rows
    del o
    with saved_bytes() as count, torch.no_grad():
        attention(*inputs, backend=backend)
    assert count["bytes"] == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_frozen_inputs_get_no_gradient(backend, needed):
    inputs = [t.requires_grad_(i in needed) for i, t in enumerate(make_inputs((2, 2, 5, 77, 8)))]
    grad = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    assert_exact(value_and_gradients(served(backend), inputs, grad), value_and_gradients(stock, inputs, grad))
    attention(*inputs, backend=backend).backward(grad)
    assert [i for i, t in enumerate(inputs) if t.grad is not None] == list(needed)


@pytest.mark.parametrize("backend", ["cpu", "flash", "math"])
def test_primitives(backend):
    q, k, v = inputs = make_inputs((2, 2, 6, 9, 8))
    grad = torch.randn(2, 2, 6, 8, dtype=torch.float64)
    o, lse = attention_forward(q, k, v, backend=backend)
    assert not o.requires_grad
    torch.testing.assert_close(lse, (q @ k.mT / 8**0.5).logsumexp(-1).detach())
    grads = attention_backward(grad, q, k, v, o, lse, backend=backend)
    assert_exact([o, *grads], value_and_gradients(stock, inputs, grad))
    assert attention_backward(grad, q, k, v, o, lse, needs=(True, False, False), backend=backend)[1:] == (None, None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_autocast_is_that_of_pytorch(backend, dtype):
    """Also with the backward called inside it."""
    inputs = make_inputs((1, 2, 32, 77, 40), dtype)
    inputs[1] = inputs[1].detach().to(torch.float64 if dtype == torch.float64 else torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = attention(*inputs, backend=backend), stock(*inputs)
        assert ours.dtype == theirs.dtype
        grad = torch.randn(1, 2, 32, 40).to(ours.dtype)
        inside = torch.autograd.grad(ours, inputs, grad, retain_graph=True)
    outside = torch.autograd.grad(ours, inputs, grad)
    expected = torch.autograd.grad(theirs, inputs, grad)
    assert [g.dtype for g in outside] == [t.dtype for t in inputs]
    if backend != "reference":  # which PyTorch differentiates, inside autocast as well
        assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    bound = 1e-12 if dtype == torch.float64 else 1e-2
    assert max(relative_error(a, b) for a, b in zip(outside, expected, strict=True)) < bound


def test_a_saved_graph_is_used_twice():
    inputs = make_inputs((1, 2, 5, 7, 8))
    o = attention(*inputs)
    first = torch.autograd.grad(o.sum(), inputs, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(o.sum(), inputs), strict=True))


@pytest.mark.parametrize("backend", ["cpu", "flash", "math"])
def test_a_second_derivative_is_an_error_in_words(backend):
    inputs = make_inputs((1, 2, 5, 7, 8))
    grad, *_ = torch.autograd.grad(attention(*inputs, backend=backend).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match='attention.*second time.*backend="reference" does'):
        grad.sum().backward()


def test_the_reference_is_differentiated_twice():
    assert torch.autograd.gradgradcheck(served("reference"), make_inputs((1, 1, 2, 3, 2)))


@pytest.mark.parametrize("size", [(0, 2, 3, 4, 8), (2, 0, 3, 4, 8), (2, 1, 0, 4, 8), (2, 1, 3, 0, 8), (2, 1, 3, 4, 0)])
def test_empty_inputs(size):
    inputs = make_inputs(size)
    assert OPS["attention"].choose("auto", *inputs) == "math"
    o = attention(*inputs)
    o.sum().backward()
    assert o.shape == inputs[0].shape and not o.any()
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in inputs)


def test_switched_off_kernels_do_not_serve():
    inputs = make_inputs((1, 2, 5, 7, 8))
    with sdpa_kernel(SDPBackend.MATH):
        assert OPS["attention"].choose("auto", *inputs) == "math"
        for backend in ("cpu", "flash"):
            refusal = f"'{backend}' cannot serve.*switched off by torch.nn.attention.sdpa_kernel"
            with pytest.raises(RuntimeError, match=refusal):
                attention(*inputs, backend=backend)
        o = attention(*inputs)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torch.autograd.grad(o.sum(), inputs)  # the forward's backend, whatever is enabled now
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION), pytest.raises(RuntimeError, match="no backend serves"):
        attention(*inputs)


def test_fake_meta_functorch_and_compiled():
    inputs = make_inputs((2, 2, 6, 9, 8), torch.float32)
    assert attention(*(t.to("meta") for t in inputs)).device.type == "meta"
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in inputs]
        with saved_bytes() as count:
            value_and_gradients(attention, fake, torch.empty(2, 2, 6, 8))
    # 4 bytes of q, o, k, v and the log-sum-exp
    assert count["bytes"] == 4 * 2 * 2 * (2 * 6 * 8 + 2 * 9 * 8 + 6)
    stacked = [t.detach()[None] for t in inputs]
    torch.testing.assert_close(torch.func.vmap(attention)(*stacked)[0], attention(*inputs))

    def loss(q, k, v):
        return attention(q, k, v).square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(torch.autograd.grad(compiled, inputs), expected)


@pytest.mark.parametrize("backend", ["cudnn", "efficient"])
def test_a_backend_that_cannot_serve_says_why(backend):
    with pytest.raises(RuntimeError, match="it serves cuda tensors, q is on cpu"):
        attention(*make_inputs((1, 1, 2, 2, 8)), backend=backend)


@pytest.mark.parametrize("kernel", ["flash", "cudnn", "efficient"])
def test_calls_of_the_cuda_kernels_fit_their_signatures(kernel):
    """On any machine: fake tensors reach PyTorch's operators, not the kernels."""
    with FakeTensorMode():
        q, k, v = (torch.empty(2, n, 320, device="cuda", dtype=torch.bfloat16) for n in (64, 77, 77))
        q, k, v = (t.unflatten(2, (8, 40)).transpose(1, 2) for t in (q, k, v))
        o, lse = _KERNELS[kernel].forward(q, k, v, 0.1)
        grads = _KERNELS[kernel].backward(o, q, k, v, o, lse, 0.1, (True, True, True))
    assert o.shape == q.shape and lse.dtype == torch.float32
    assert [g.shape for g in grads] == [t.shape for t in (q, k, v)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["flash", "cudnn", "efficient", "math"])
def test_on_a_gpu(backend):
    served_any = False
    for dtype, keys, d in product(DTYPES[1:], (256, 77), (40, 64, 80, 160)):
        inputs = make_inputs((1, 2, 256, keys, d), dtype, "cuda")
        if OPS["attention"].not_supported_reasons[backend](*inputs):
            continue
        served_any = True
        grad = torch.randn(1, 2, 256, d).to("cuda", dtype)
        exact = value_and_gradients(stock, [t.detach().double().requires_grad_() for t in inputs], grad.double())
        ours = value_and_gradients(served(backend), inputs, grad)
        assert_as_good_as(value_and_gradients(stock, inputs, grad), ours, exact)
    assert served_any


@pytest.mark.parametrize(
    ("shapes", "dtypes", "message"),
    [
        ([(2, 3, 4), (2, 3, 4), (2, 3, 4)], [torch.float32] * 3, "q is (2, 3, 4); it must be (B, heads, N, d)"),
        ([(1, 2, 3, 4), (1, 1, 5, 4), (1, 2, 5, 4)], [torch.float32] * 3, "k is (1, 1, 5, 4)"),
        ([(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 6, 4)], [torch.float32] * 3, "v is (1, 2, 6, 4)"),
        ([(1, 2, 3, 4)] * 3, [torch.float32, torch.float32, torch.float64], "v is torch.float64, q torch.float32"),
        ([(1, 2, 3, 4)] * 3, [torch.int64] * 3, "q is torch.int64"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(shapes, dtypes, message):
    with pytest.raises(ValueError) as error:
        attention(*(torch.zeros(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True)))
    assert message in str(error.value)


def test_forward_and_backward_check_their_inputs_too():
    q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 5, 4)
    with pytest.raises(ValueError, match=r"k is \(1, 1, 5, 4\)"):
        attention_forward(q, k, k)
    with pytest.raises(ValueError, match=r"k is \(1, 1, 5, 4\)"):
        attention_backward(q, q, k, k, q, q[..., 0])
