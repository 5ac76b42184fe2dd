"""layer_norm: every backend against PyTorch's, in fp64 and in low precision, and what it saves."""

import pytest
import torch
from checks import BACKENDS, DTYPES, LAYOUTS, assert_as_good_as, laid_out, relative_error, value_and_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from benchmarks.memory import saved_bytes
from rftcore.ops import layer_norm
from rftcore.ops.backends import OPS

# More than a lane, a strip and a block of rows; a width of 1 and of less than a lane.
SHAPES = [(9,), (5, 1), (2, 67, 40), (1, 3, 5, 16), (131, 18), (2, 4101)]
EPS = 1e-5


def make_inputs(shape, dtype=torch.float64, layout="contiguous", vectors=None):
    """x far from zero mean, and a weight and bias that are not trivial; with gradients."""
    x = laid_out(torch.randn(shape, dtype=torch.float64) * 2 + 3, layout)
    weight, bias = (torch.randn(shape[-1], dtype=torch.float64) + 0.5 for _ in range(2))
    return [x.to(dtype).requires_grad_(), *(t.to(vectors or dtype).requires_grad_() for t in (weight, bias))]


def ours(backend="auto"):
    return lambda x, weight, bias: layer_norm(x, weight, bias, EPS, backend=backend)


def stock(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_and_gradients_are_exact_in_fp64(backend, layout, nan_filled):
    for shape in SHAPES:
        if layout == "channels_last" and len(shape) < 2:
            continue
        inputs = make_inputs(shape, layout=layout)
        assert OPS["layer_norm"].choose("auto", inputs[0]) == "cpu"
        grad = torch.randn(shape, dtype=torch.float64)
        for g in (grad, laid_out(grad, "sliced"), laid_out(grad, "transposed"), grad.flatten()[0].expand_as(grad)):
            mine, exact = value_and_gradients(ours(backend), inputs, g), value_and_gradients(stock, inputs, g)
            assert mine[0].is_contiguous()
            # Of a width of 1 nothing is left: the exact gradient is 0, and both give rounding.
            for a, b in zip(mine, exact, strict=True):
                assert relative_error(a, b) < 1e-12 or (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("vectors", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_is_as_good_as_pytorch(backend, dtype, vectors):
    inputs = make_inputs((3, 200, 330), dtype, vectors=vectors)
    grad = torch.randn(3, 200, 330).to(dtype)
    exact = value_and_gradients(stock, [t.detach().double().requires_grad_() for t in inputs], grad.double())
    same = [inputs[0], *(t.detach().to(dtype).requires_grad_() for t in inputs[1:])]
    yardstick = value_and_gradients(stock, same, grad)
    mine = value_and_gradients(ours(backend), inputs, grad)
    assert [t.dtype for t in mine] == [dtype, *(t.dtype for t in inputs)]
    assert_as_good_as(yardstick, [t.to(dtype) for t in mine], exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [(True, False), (False, True), (False, False)], ids=str)
def test_weight_and_bias_may_be_absent(backend, given):
    x, *affine = make_inputs((3, 70, 37))
    inputs = [x, *(t if there else None for t, there in zip(affine, given, strict=True))]
    grad = torch.randn(x.shape, dtype=torch.float64)
    mine, exact = value_and_gradients(ours(backend), inputs, grad), value_and_gradients(stock, inputs, grad)
    assert max(relative_error(a, b) for a, b in zip(mine, exact, strict=True)) < 1e-12


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_gradients_flow_where_they_are_needed(needed):
    inputs = [t.requires_grad_(i in needed) for i, t in enumerate(make_inputs((3, 7, 20)))]
    ours()(*inputs).sum().backward()
    assert [i for i, t in enumerate(inputs) if t.grad is not None] == list(needed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_input_and_statistics_are_saved_and_nothing_else(dtype):
    x, *frozen = (t.detach() for t in make_inputs((2, 50, 40), dtype))
    x.requires_grad_()
    with saved_bytes(excluded=frozen) as count:
        y = layer_norm(x, *frozen, EPS)
    statistic = 8 if dtype == torch.float64 else 4
    assert count["bytes"] == 2 * 50 * (40 * dtype.itemsize + 2 * statistic)
    del y


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    assert torch.autograd.gradcheck(ours(backend), make_inputs((3, 2, 8)))


def test_rows_of_one_value_far_from_zero():
    x = torch.full((2, 300), 1e4)
    torch.testing.assert_close(layer_norm(x, None, None, EPS), torch.zeros(2, 300), rtol=0, atol=0)


def test_a_saved_graph_is_used_twice():
    inputs = make_inputs((4, 9))
    y = ours()(*inputs)
    first = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(y.sum(), inputs), strict=True))


def test_a_second_derivative_is_an_error_in_words():
    inputs = make_inputs((2, 6))
    grad, *_ = torch.autograd.grad(ours()(*inputs).square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match='layer_norm.*second time.*backend="reference" does'):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty_inputs(backend, shape):
    inputs = make_inputs(shape)
    y = ours(backend)(*inputs)
    y.sum().backward()
    assert y.shape == shape and all(t.grad.shape == t.shape and not t.grad.any() for t in inputs)


def test_results_do_not_depend_on_the_number_of_threads():
    inputs, grad = make_inputs((1024, 514), torch.float32), torch.randn(1024, 514)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = value_and_gradients(ours(), inputs, grad)
        torch.set_num_threads(3)
        together = value_and_gradients(ours(), inputs, grad)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    x, weight, bias = (t.detach() for t in make_inputs((2, 3, 8), layout=layout))
    torch.library.opcheck(torch.ops.rftcore.layer_norm.default, (x, weight, bias, EPS))
    grad, statistics = torch.ones((), dtype=x.dtype).expand(2, 3, 8), torch.ones(2, 3, dtype=x.dtype)
    arguments = (grad, x, weight, bias, statistics, statistics, [True, False])
    torch.library.opcheck(torch.ops.rftcore.layer_norm_backward.default, arguments)


def test_fake_meta_functorch_and_compiled():
    inputs = make_inputs((4, 8), torch.float32)
    assert ours()(*(t.to("meta") for t in inputs)).device.type == "meta"
    with FakeTensorMode() as mode:
        value_and_gradients(ours("cpu"), [mode.from_tensor(t) for t in inputs], torch.empty(4, 8))
    torch.testing.assert_close(torch.func.vmap(ours(), in_dims=(0, None, None))(*inputs), ours()(*inputs))

    def loss(*inputs):
        return ours()(*inputs).square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(torch.autograd.grad(compiled, inputs), expected)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.int64), None, "x is torch.int64"),
        (torch.tensor(1.0), None, "x is (); it must be (..., D)"),
        (torch.zeros(2, 4), torch.ones(5), "weight is (5,); for this x it must be (4,)"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(x, weight, message):
    with pytest.raises(ValueError) as error:
        layer_norm(x, weight, None, EPS)
    assert message in str(error.value)
