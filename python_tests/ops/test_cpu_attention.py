"""attention in C++: sizes around its blocks, bits that depend on nothing else, extreme numbers, memory around tensors."""

import itertools
import math

import pytest
import torch
from checks import DTYPES, Canaries, assert_as_good_as, relative_error, value_and_gradients
from torch.nn.functional import scaled_dot_product_attention as stock
from torch.utils.flop_counter import FlopCounterMode

from rftcore.ops import attention, attention_backward, attention_forward, compiled, cpu_attention
from rftcore.ops.backends import OPS

# Queries: of one vector, of the last vector of a wide block, of groups; keys: of tiles.
QUERIES = [1, 15, 16, 17, 31, 48, 49, 63, 64, 65, 112, 113, 255, 256, 257]
KEYS = [1, 2, 5, 16, 63, 64, 65, 77, 129]
HEAD_DIMS = [1, 3, 8, 13, 16, 17, 24, 32, 33, 40, 48, 64, 80, 160]


def make_inputs(queries, keys, head_dim, dtype=torch.float32, batch=1, heads=2, spread=1.5):
    def heads_of(tokens):
        rows = torch.randn(batch, tokens, heads * head_dim, dtype=torch.float64) * spread
        return rows.to(dtype).view(batch, tokens, heads, head_dim).transpose(1, 2).requires_grad_()

    return [heads_of(queries), heads_of(keys), heads_of(keys)]


def ours(q, k, v, scale=None):
    return attention(q, k, v, scale, backend="cpu")


def exact(function, inputs, grad):
    return value_and_gradients(function, [t.detach().double().requires_grad_() for t in inputs], grad.double())


def assert_right(inputs, grad, scale=None):
    """As good as PyTorch in the same dtype; exact in fp64."""
    right = exact(lambda *t: stock(*t, scale=scale), inputs, grad)
    found = value_and_gradients(lambda *t: ours(*t, scale), inputs, grad)
    if grad.dtype == torch.float64:
        for a, b in zip(found, right, strict=True):
            assert relative_error(a, b) < 1e-12 or (a - b).abs().max() < 1e-13
    else:
        theirs = value_and_gradients(lambda *t: stock(*t, scale=scale), inputs, grad)
        # Tensors that small are pooled: one rounding of one value would decide.
        pooled = [torch.cat([t.flatten() for t in each]) for each in (theirs, found, right)]
        assert_as_good_as(*([t] for t in pooled))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dimensions(head_dim, dtype):
    assert_right(make_inputs(70, 77, head_dim, dtype), torch.randn(1, 2, 70, head_dim).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sizes_around_blocks_groups_and_tiles(dtype):
    for queries, keys in [*((n, 66) for n in QUERIES), *((50, m) for m in KEYS), (257, 129), (1, 1)]:
        assert_right(make_inputs(queries, keys, 20, dtype), torch.randn(1, 2, queries, 20, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 2.0])
def test_any_scale(scale, dtype):
    assert_right(make_inputs(50, 77, 24, dtype), torch.randn(1, 2, 50, 24).to(dtype), scale)


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_a_maximum_that_changes_in_every_tile(order):
    q, k, v = make_inputs(33, 300, 16, batch=1, heads=1)
    with torch.no_grad():
        steps = torch.linspace(-40, 40, 300)[:, None] * torch.ones(16) / 16
        k.copy_(steps if order == "rising" else -steps).add_(torch.randn(300, 16) / 10)
        q.abs_()
    assert_right([q, k, v], torch.randn(1, 1, 33, 16), 1.0)


@pytest.mark.parametrize("spread", [1e-4, 30.0, 1000.0])
def test_logits_of_any_size(spread):
    inputs = make_inputs(65, 130, 16, spread=spread)
    assert_right(inputs, torch.randn(1, 2, 65, 16))
    o, lse = attention_forward(*inputs, backend="cpu")
    right = (inputs[0].double() @ inputs[1].double().mT / 4).logsumexp(-1)
    assert relative_error(lse, right) < 3e-7
    # Between the least and the largest value.
    assert (o <= inputs[2].amax(2, keepdim=True) * 1.00001).logical_or(o.abs() < 1e-3 * spread).all()


def test_log_sum_exp_is_as_good_as_pytorchs():
    for keys in (1, 77, 300):
        q, k, v = make_inputs(70, keys, 40)
        right = (q.double() @ k.double().mT / 40**0.5).logsumexp(-1)
        found, theirs = (attention_forward(q, k, v, backend=name)[1] for name in ("cpu", "flash"))
        assert_as_good_as([theirs], [found], [right])


def test_many_keys_add_up_as_well_as_pytorchs():
    assert_right(make_inputs(64, 5000, 8, heads=1), torch.randn(1, 1, 64, 8))


@pytest.mark.parametrize("where", [0, 1, 2], ids="qkv")
def test_a_nan_goes_where_it_does_in_pytorch(where):
    inputs = make_inputs(70, 77, 16)
    with torch.no_grad():
        inputs[where][0, 1, 66, 3] = math.nan
    grad = torch.randn(1, 2, 70, 16)
    right, found = (value_and_gradients(f, inputs, grad) for f in (stock, ours))
    for a, b in zip(found, right, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
    lse = attention_forward(*inputs, backend="cpu")[1]
    assert torch.equal(lse.isnan(), (inputs[0] @ inputs[1].mT).isnan().any(-1))


def test_an_infinite_logit_is_no_number():
    q, k, v = make_inputs(5, 7, 8)
    with torch.no_grad():
        q[0, 0, 2] = torch.full((8,), 1e30)
        k[0, 0, 3] = torch.full((8,), 1e30)
    o = ours(q, k, v)
    assert o[0, 0, 2].isnan().all() and o[0, 1].isfinite().all()


def bits(inputs, grad, rows=slice(None)):
    o, lse = attention_forward(*inputs, backend="cpu")
    grads = attention_backward(grad, *inputs, o, lse, backend="cpu")
    return [o[:, :, rows], lse[:, :, rows], grads[0][:, :, rows]], list(grads[1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads_batch_and_other_queries(dtype):
    # Work enough for several threads.
    inputs = [t.detach() for t in make_inputs(600, 200, 40, dtype, batch=3, heads=3)]
    grad = torch.randn(3, 3, 600, 40).to(dtype)
    of_queries, of_keys = bits(inputs, grad)
    threads = torch.get_num_threads()
    try:
        for count in (2, 5):
            torch.set_num_threads(count)
            assert all(map(torch.equal, sum(bits(inputs, grad), []), of_queries + of_keys))
    finally:
        torch.set_num_threads(threads)
    one = bits([t[1:2] for t in inputs], grad[1:2])
    assert all(torch.equal(a, b[1:2]) for a, b in zip(sum(one, []), of_queries + of_keys, strict=True))
    for some in (slice(0, 5), slice(100, 117), slice(17, 600)):
        found, _ = bits([inputs[0][:, :, some], *inputs[1:]], grad[:, :, some])
        assert all(torch.equal(a, b[:, :, some]) for a, b in zip(found, of_queries, strict=True))


def test_bits_do_not_depend_on_what_is_differentiated():
    inputs = make_inputs(70, 77, 40)
    grad = torch.randn(1, 2, 70, 40)
    with torch.no_grad():
        o, lse = attention_forward(*inputs, backend="cpu")
        assert torch.equal(ours(*inputs), o)
    assert torch.equal(ours(*inputs), o)
    everything = attention_backward(grad, *inputs, o, lse, backend="cpu")
    for needs in itertools.product((False, True), repeat=3):
        found = attention_backward(grad, *inputs, o, lse, needs=needs, backend="cpu")
        for got, right, need in zip(found, everything, needs, strict=True):
            assert torch.equal(got, right) if need else got is None


def test_output_and_log_sum_exp_of_any_layout():
    q, k, v = (t.detach() for t in make_inputs(21, 77, 40))
    grad = torch.randn(1, 2, 21, 40)
    o, lse = attention_forward(q, k, v, backend="cpu")
    right = attention_backward(grad, q, k, v, o, lse, backend="cpu")
    wide_o, wide_lse = torch.full((1, 42, 2, 40), math.nan).transpose(1, 2), torch.full((1, 2, 42), math.nan)
    wide_o[:, :, ::2], wide_lse[:, :, ::2] = o, lse
    found = attention_backward(grad, q, k, v, wide_o[:, :, ::2], wide_lse[:, :, ::2], backend="cpu")
    assert all(map(torch.equal, found, right))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1), (17, 5, 13), (70, 77, 24), (300, 130, 40)], ids=str)
def test_memory_around_tensors_is_left_alone(size, dtype):
    """Inputs lie among NaN, outputs between marks."""

    def among_nan(values):
        wide = torch.full((1, values.shape[2] + 40, 2, values.shape[3] + 7), math.nan, dtype=dtype).transpose(1, 2)
        inside = wide[:, :, 20:-20, 3:-4]
        return inside.copy_(values)

    queries, keys, head_dim = size
    q, k, v = (among_nan(t.detach()) for t in make_inputs(*size, dtype))
    grad = among_nan(torch.randn(1, 2, queries, head_dim))
    maths = compiled.maths_dtype(q)
    memory = Canaries()
    o, dq, dk, dv = (memory.empty((1, 2, n, head_dim), dtype) for n in (queries, queries, keys, keys))
    lse = memory.empty((1, 2, queries), maths)
    problem = compiled.DTYPES[dtype], 1, 2, queries, keys, head_dim, head_dim**-0.5

    def launch(name, *arguments):
        heads = [a.data_ptr() if a is lse else (a.data_ptr(), *a.stride()) for a in arguments]
        compiled.launch(name, q.device, *problem, *heads)

    launch("attention_forward", q, k, v, o, lse)
    launch("attention_backward", q, k, v, grad, o, lse, dq, dk, dv)
    memory.check()
    right = exact(stock, [q, k, v], grad)
    for found, expected in zip((o, dq, dk, dv), right, strict=True):
        if expected.norm() > 1e-6:
            assert relative_error(found, expected) < {8: 1e-12, 4: 2e-6, 2: 1e-2}[dtype.itemsize]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    q, k, v = (t.detach() for t in make_inputs(5, 7, 8, dtype))
    library, check = torch.ops.rftcore, torch.library.opcheck
    check(library.cpu_attention.default, (q, k, v, 0.5))
    o, lse = library.cpu_attention(q, k, v, 0.5)
    for needs in itertools.product((False, True), repeat=3):
        check(library.cpu_attention_backward.default, (torch.ones_like(o), q, k, v, o, lse, 0.5, list(needs)))


@pytest.mark.parametrize(
    ("needed", "products"), [((0, 1, 2), 7), ((0,), 5), ((1,), 5), ((2,), 4), ((0, 1), 6), ((1, 2), 6)], ids=str
)
def test_flops_are_counted(needed, products):
    inputs = [t.requires_grad_(i in needed) for i, t in enumerate(make_inputs(33, 7, 12))]
    with FlopCounterMode(display=False) as counter:
        ours(*inputs).sum().backward()
    assert counter.get_total_flops() == products * 2 * 2 * 33 * 7 * 12


def test_pytorchs_kernel_is_preferred_where_it_is_the_faster_one(monkeypatch):
    monkeypatch.setattr(cpu_attention, "_SIMD", "avx2")
    monkeypatch.setattr(cpu_attention, "_AMX", False)
    prefer = OPS["attention"].heuristic
    usual, narrow = make_inputs(64, 77, 40), make_inputs(64, 77, 40, torch.bfloat16)
    assert prefer(*usual) is None and prefer(*narrow) is None
    assert prefer(*make_inputs(8, 77, 40)) == prefer(*make_inputs(64, 77, 512)) == "flash"
    monkeypatch.setattr(cpu_attention, "_AMX", True)
    assert prefer(*usual) is None and prefer(*narrow) == "flash"
    monkeypatch.setattr(cpu_attention, "_SIMD", "the compiler's baseline")
    assert prefer(*usual) == "flash"


def test_what_it_does_not_serve_it_says():
    reasons = OPS["attention"].not_supported_reasons["cpu"]
    assert "nothing to attend" in "; ".join(reasons(*make_inputs(3, 0, 8)))
    assert "it serves cpu tensors" in "; ".join(reasons(*(t.to("meta") for t in make_inputs(3, 4, 8))))
