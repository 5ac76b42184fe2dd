"""group_norm_silu: every backend against the stock modules it replaces, in fp64 and in low precision."""

from itertools import product

import pytest
import torch
from checks import (
    COMPILED,
    DTYPES,
    LAYOUTS,
    assert_as_good_as,
    laid_out,
    relative_error,
    saved_by,
    value_and_gradients,
)  # fmt: skip
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from rftcore.ops import group_norm_silu
from rftcore.ops.backends import OPS
from rftcore.ops.group_norm_silu import group_norm_silu_backward, group_norm_silu_forward

# Odd sizes, a size of 1, more than a strip and more than a tile, any number of spatial dimensions.
CASES = [
    ((2, 6), 3),
    ((3, 6, 1), 2),
    ((2, 40, 5, 7), 8),
    ((1, 12, 67, 71), 4),
    ((2, 32, 3, 4, 5), 32),
    ((2, 5, 9, 3), 1),
]
# Many channels of many positions; threads that are emulated would take a minute.
LARGE = [((1, 48, 67, 71), 4)]
EPS = 1e-5


def make_inputs(shape, dtype=torch.float64, layout="contiguous", vectors=None, modulated=True):
    """x far from zero mean, and non-trivial weight, bias, channel_bias, scale and shift; with gradients."""

    def leaf(values, dtype):
        return values.to(dtype).requires_grad_()

    x = leaf(laid_out(torch.randn(shape, dtype=torch.float64) * 2 + 3, layout), dtype)
    weight, bias = (leaf(torch.randn(shape[1], dtype=torch.float64) + 0.5, vectors or dtype) for _ in range(2))
    more = [leaf(torch.randn(shape[:2], dtype=torch.float64), dtype) if modulated else None for _ in range(3)]
    return [x, weight, bias, *more]


def ours(groups, activation="silu", backend="auto"):
    def function(x, weight, bias, channel_bias, scale, shift):
        scale_shift = None if scale is None else (scale, shift)
        options = {"channel_bias": channel_bias, "scale_shift": scale_shift, "activation": activation}
        return group_norm_silu(x, weight, bias, groups, EPS, **options, backend=backend)

    return function


def stock(groups, activation="silu"):
    """As diffusers' ResnetBlock2D computes it."""

    def function(x, weight, bias, channel_bias, scale, shift):
        def column(values):
            return values.reshape(*values.shape, *[1] * (x.dim() - 2))

        h = x if channel_bias is None else x + column(channel_bias)
        h = torch.group_norm(h, groups, weight, bias, EPS)
        if scale is not None:
            h = h * (1 + column(scale)) + column(shift)
        return F.silu(h) if activation else h

    return function


@pytest.mark.covering(1)
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_and_gradients_are_exact_in_fp64(backend, activation, layout, nan_filled):
    for (shape, groups), modulated in product(CASES if backend == "cuda" else CASES + LARGE, (True, False)):
        inputs = make_inputs(shape, layout=layout, modulated=modulated)
        grads = [torch.randn(shape, dtype=torch.float64), torch.tensor(1.5, dtype=torch.float64).expand(shape)]
        assert backend in (OPS["group_norm_silu"].choose("auto", inputs[0]), "reference")
        for grad in [*(laid_out(grads[0], other) for other in LAYOUTS), grads[1]]:
            mine = value_and_gradients(ours(groups, activation, backend), inputs, grad)
            exact = value_and_gradients(stock(groups, activation), inputs, grad)
            # A group of one channel leaves nothing of a constant: its exact gradient is 0, and both give rounding.
            for a, b in zip(mine, exact, strict=True):
                assert relative_error(a, b) < 1e-12 or (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_format_follows_x(backend, layout):
    for shape, groups in CASES:
        inputs = make_inputs(shape, layout=layout)
        x = inputs[0]
        y = ours(groups, backend=backend)(*inputs)
        expected = x.stride() if layout == "channels_last" else x.contiguous().stride()
        assert y.stride() == expected
        if backend != "reference":
            (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
            assert grad.stride() == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pytorchs_own_operations_where_no_kernel_serves(layout):
    for shape, groups in CASES:
        inputs = make_inputs(shape, layout=layout)
        grad, needs = torch.randn(shape, dtype=torch.float64), [True] * 6
        y, *statistics = group_norm_silu_forward(*inputs, groups, EPS, True, "torch")
        found = group_norm_silu_backward(grad, *inputs, groups, EPS, True, *statistics, "torch", needs)
        exact = value_and_gradients(stock(groups), inputs, grad)
        for a, b in zip([y, *found], exact, strict=True):
            assert relative_error(a, b) < 1e-12 or (a - b).abs().max() < 1e-12
        expected = inputs[0].stride() if layout == "channels_last" else inputs[0].contiguous().stride()
        assert y.stride() == found[0].stride() == expected
    mixed = make_inputs((2, 8, 3, 3), torch.float16, vectors=torch.float32)
    assert ours(2, backend="torch")(*mixed).dtype == torch.float16


@COMPILED
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("vectors", [None, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_low_precision_is_as_good_as_pytorch(backend, dtype, vectors, layout):
    inputs = make_inputs((2, 64, 17, 16), dtype, layout, vectors)
    grad = laid_out(torch.randn(inputs[0].shape), layout).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    mine = value_and_gradients(ours(8, backend=backend), inputs, grad)
    exact = value_and_gradients(stock(8), wide, grad.double())
    same = [t.detach().to(dtype).requires_grad_() for t in inputs]
    yardstick = value_and_gradients(stock(8), same, grad)
    yardstick = [y.to(m.dtype) for y, m in zip(yardstick, mine, strict=True)]
    assert_as_good_as(yardstick, mine, exact)


@COMPILED
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_large_mean_costs_no_precision(backend, layout):
    x = laid_out(torch.randn(2, 32, 24, 24) + 3000, layout)
    weight, bias = torch.ones(32), torch.zeros(32)
    exact = stock(4)(x.double(), weight.double(), bias.double(), None, None, None)
    mine = ours(4, backend=backend)(x, weight, bias, None, None, None)
    yardstick = stock(4)(x, weight, bias, *[None] * 3)
    # Neighbouring fp32 numbers are 2.4e-4 apart at 3000.
    assert relative_error(mine, exact) < min(2 * relative_error(yardstick, exact), 5e-4)


@COMPILED
def test_silu_far_from_zero(backend):
    """Its gradient is taken at the affined value, and its exponential neither overflows nor loses infinities."""
    shift = torch.tensor([[-1e4, -104.0, -88.0, -20.0, 20.0, 88.0, 1e4, float("nan")]], requires_grad=True)
    x, zero = torch.randn(1, 8, 6), torch.zeros(1, 8)
    y = group_norm_silu(x, None, None, 8, EPS, scale_shift=(zero - 1, shift), backend=backend)
    expected = F.silu(shift.detach().double()).float()[..., None].expand_as(y)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-35, equal_nan=True)
    y.sum().backward()
    wide = shift.detach().double().requires_grad_()
    F.silu(wide).sum().backward()
    torch.testing.assert_close(shift.grad, 6 * wide.grad.float(), rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_gradcheck(backend, layout):
    inputs = make_inputs((2, 6, 3, 2), layout=layout)
    assert torch.autograd.gradcheck(ours(3, backend=backend), inputs)
    assert torch.autograd.gradcheck(ours(3, None, backend), inputs)


@COMPILED
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_each_gradient_alone_and_nothing_for_frozen_weights(backend, layout):
    inputs = make_inputs((2, 20, 6, 5), layout=layout)
    grad = torch.randn(inputs[0].shape, dtype=torch.float64)
    _, *together = value_and_gradients(ours(4, backend=backend), inputs, grad)
    for i, expected in enumerate(together):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs)]
        _, gradient = value_and_gradients(ours(4, backend=backend), alone, grad)
        # On a GPU the gradient of x alone goes another way.
        assert torch.equal(gradient, expected) or (backend == "cuda" and relative_error(gradient, expected) < 1e-12)


@COMPILED
def test_only_inputs_and_statistics_are_saved(backend):
    inputs = make_inputs((2, 64, 32, 32), torch.float32)
    own = {t.data_ptr() for t in inputs}
    others = [t for t in saved_by(ours(8, backend=backend), *inputs) if t.data_ptr() not in own]
    assert [(tuple(t.shape), t.dtype) for t in others] == 2 * [((2, 8), torch.float32)]


def test_a_second_derivative_is_an_error_in_words():
    inputs = make_inputs((2, 6, 4))
    (grad,) = torch.autograd.grad(ours(2)(*inputs).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match='group_norm_silu.*second time.*backend="reference" does'):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [(0, 8), (0, 8, 3, 3), (2, 8, 0, 3), (2, 8, 0)])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_empty_inputs(backend, shape, layout):
    inputs = make_inputs(shape, layout=layout)
    for tensors in (inputs, [inputs[0], *(t.detach() for t in inputs[1:])]):
        y, *grads = value_and_gradients(ours(4, backend=backend), tensors, torch.empty(shape, dtype=torch.float64))
        assert y.shape == shape and all(g.shape == t.shape for g, t in zip(grads, tensors, strict=False))
        assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_results_do_not_depend_on_threads(layout):
    inputs = make_inputs((3, 64, 64, 64), torch.float32, layout)
    grad = laid_out(torch.randn(inputs[0].shape), layout)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = value_and_gradients(ours(8, backend="cpu"), inputs, grad)
        torch.set_num_threads(3)
        together = value_and_gradients(ours(8, backend="cpu"), inputs, grad)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@COMPILED
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_sample_does_not_see_its_batch(backend, layout, frozen):
    inputs = make_inputs((3, 64, 24, 24), torch.float32, layout)
    if frozen:
        inputs[1:] = [t.detach() for t in inputs[1:]]
    grad = laid_out(torch.randn(inputs[0].shape), layout)
    function = ours(8, backend=backend)
    y, grad_x, *grads = value_and_gradients(function, inputs, grad)
    x, weight, bias, *more = (t.detach() for t in inputs)
    part = [t.requires_grad_(not frozen) for t in (x[1:2], weight, bias, *(m[1:2] for m in more))]
    part[0].requires_grad_()
    mine = value_and_gradients(function, part, grad[1:2])
    # Neither weight's nor bias's gradient, which are sums over the batch.
    for alone, whole in zip([*mine[:2], *mine[4:]], [y, grad_x, *grads[2:]], strict=True):
        assert torch.equal(alone, whole[1:2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    x, *vectors = (t.detach() for t in make_inputs((2, 6, 3, 4), layout=layout))
    ops = torch.ops.rftcore
    arguments = (x, *vectors, 3, EPS, True)
    torch.library.opcheck(ops.group_norm_silu.default, arguments)
    torch.library.opcheck(ops.group_norm_silu.default, (x, *[None] * 5, 3, EPS, False))
    _, mean, inverse_deviation = ops.group_norm_silu(*arguments)
    grad = torch.ones((), dtype=x.dtype).expand_as(x)
    for needs in ([True] * 5, [False, True, False, True, False], [False] * 5):
        torch.library.opcheck(
            ops.group_norm_silu_backward.default, (grad, x, *vectors, mean, inverse_deviation, 3, True, needs)
        )


def test_fake_meta_and_compiled():
    inputs = make_inputs((2, 8, 4, 4), torch.float32)
    assert ours(2)(*(t.to("meta") for t in inputs)).device.type == "meta"
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in inputs]
        value_and_gradients(ours(2, backend="cpu"), fake, torch.empty(2, 8, 4, 4))

    def loss(*inputs):
        return ours(2)(*inputs).square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    torch._dynamo.reset()
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for a, b in zip(compiled, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, "x is torch.int64"),
        ({"x": torch.zeros(4)}, "x is (4,)"),
        ({"num_groups": 3}, "num_groups=3 does not divide the 4 channels"),
        ({"weight": torch.zeros(3)}, "weight is (3,); for this x it must be (4,)"),
        ({"bias": torch.zeros(4, device="meta")}, "bias is on meta"),
        ({"channel_bias": torch.zeros(4)}, "channel_bias is (4,); for this x it must be (2, 4)"),
        ({"scale_shift": (torch.zeros(2, 4), torch.zeros(2, 1))}, "shift is (2, 1)"),
        ({"activation": "relu"}, "activation='relu' is unknown"),
        ({"backend": "gpu"}, "backend='gpu' is unknown"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(changes, message):
    inputs = {"x": torch.zeros(2, 4, 3), "weight": torch.ones(4), "bias": torch.ones(4), "num_groups": 2, "eps": EPS}
    with pytest.raises(ValueError) as error:
        group_norm_silu(**(inputs | changes))
    assert message in str(error.value)


def test_functorch_is_served_by_the_reference(backend):
    x, weight, bias, *_ = (t.detach() for t in make_inputs((3, 2, 6, 4)))
    weight, bias = torch.randn(6, dtype=x.dtype), torch.randn(6, dtype=x.dtype)
    mapped = torch.func.vmap(lambda x: group_norm_silu(x, weight, bias, 3, EPS))(x)
    expected = torch.stack([group_norm_silu(s, weight, bias, 3, EPS, backend=backend) for s in x])
    torch.testing.assert_close(mapped, expected)


@pytest.mark.parametrize("activation", ["silu", None])
def test_pytorchs_operations_round_to_the_widest_dtype(activation):
    """A bf16 input and fp32 parameters: everything in fp32, and rounded once."""
    x, weight, bias = torch.randn(2, 8, 5, 5).bfloat16(), torch.randn(8), torch.randn(8)
    y = torch.nn.functional.group_norm(x.float(), 4, weight, bias, 1e-5)
    y = torch.nn.functional.silu(y) if activation else y
    ours = group_norm_silu(x, weight, bias, 4, 1e-5, activation=activation, backend="torch")
    assert torch.equal(ours, y.bfloat16())
