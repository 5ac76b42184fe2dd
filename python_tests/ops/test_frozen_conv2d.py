"""frozen_conv2d: against PyTorch's convolution with frozen weights, which saves its input."""

import pytest
import torch
from checks import DTYPES, LAYOUTS, assert_as_good_as, laid_out, relative_error, value_and_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from benchmarks.memory import saved_bytes
from rftcore.ops import Geometry, frozen_conv2d
from rftcore.ops.backends import OPS

BACKENDS = ["torch", "reference"]
# Shape of x, of the weight, geometry: odd sizes, what a stride leaves over, a size of 1, groups, depthwise.
CASES = [
    ((2, 6, 9, 7), (4, 6, 3, 3), Geometry(padding=(1, 1))),
    ((2, 6, 9, 8), (4, 6, 3, 3), Geometry((2, 2), (1, 1))),
    ((1, 6, 11, 12), (8, 3, 3, 2), Geometry((2, 3), (2, 0), (1, 2), 2)),
    ((3, 4, 5, 5), (7, 4, 1, 1), Geometry()),
    ((2, 4, 10, 9), (4, 1, 3, 3), Geometry((3, 2), (1, 1), groups=4)),
    ((1, 3, 1, 1), (2, 3, 1, 1), Geometry()),
]


def make_inputs(shape, kernel, dtype=torch.float64, layout="contiguous"):
    """x with a gradient; weight and bias without."""
    x = laid_out(torch.randn(shape, dtype=torch.float64), layout).to(dtype).requires_grad_()
    return [
        x,
        torch.randn(kernel, dtype=torch.float64).to(dtype),
        torch.randn(kernel[0], dtype=torch.float64).to(dtype),
    ]


def ours(geometry, backend="torch"):
    return lambda x, weight, bias: frozen_conv2d(x, weight, bias, geometry, backend=backend)


def stock(geometry):
    return lambda x, weight, bias: F.conv2d(x, weight, bias, *geometry)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_and_gradients_are_exact_in_fp64(backend, layout):
    for shape, kernel, geometry in CASES:
        inputs = make_inputs(shape, kernel, layout=layout)
        assert OPS["frozen_conv2d"].choose("auto", inputs[0]) == "torch"
        grad = torch.randn_like(stock(geometry)(*inputs))
        for g in [*(laid_out(grad, other) for other in LAYOUTS), grad.flatten()[0].expand_as(grad)]:
            mine = value_and_gradients(ours(geometry, backend), inputs, g)
            exact = value_and_gradients(stock(geometry), inputs, g)
            assert max(relative_error(a, b) for a, b in zip(mine, exact, strict=True)) < 1e-14


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_output_and_gradient_have_the_memory_format_of_x(dtype, layout):
    for shape, kernel, geometry in CASES:
        inputs = make_inputs(shape, kernel, dtype, layout)
        y = ours(geometry)(*inputs)
        for grad in (torch.ones_like(y), torch.ones((), dtype=dtype).expand_as(y), laid_out(y.detach(), "contiguous")):
            (grad_x,) = torch.autograd.grad(y, inputs[0], grad, retain_graph=True)
            expected = torch.channels_last if layout == "channels_last" else torch.contiguous_format
            assert y.is_contiguous(memory_format=expected) and grad_x.is_contiguous(memory_format=expected)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_low_precision_is_as_good_as_pytorch(dtype, layout):
    for kernel, geometry in (((32, 48, 3, 3), Geometry((2, 2), (1, 1))), ((32, 48, 1, 1), Geometry())):
        inputs = make_inputs((2, 48, 15, 16), kernel, dtype, layout)
        grad = torch.randn_like(stock(geometry)(*inputs))
        wide = [t.detach().double() for t in inputs]
        wide[0].requires_grad_()
        exact = value_and_gradients(stock(geometry), wide, grad.double())
        yardstick = value_and_gradients(stock(geometry), inputs, grad)
        assert_as_good_as(yardstick, value_and_gradients(ours(geometry), inputs, grad), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_with_the_backward_outside(dtype):
    geometry = Geometry((2, 2), (1, 1))
    x, *frozen = make_inputs((2, 16, 9, 8), (24, 16, 3, 3), dtype)
    frozen = [t.float() for t in frozen]

    def gradient(function, inside):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(geometry)(x, *frozen)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            return y, *torch.autograd.grad(y, x, torch.ones_like(y))

    for mine, expected in zip(gradient(ours, False), gradient(stock, False), strict=True):
        assert mine.dtype == expected.dtype and torch.equal(mine, expected)
    assert torch.equal(gradient(ours, True)[1], gradient(ours, False)[1])


def test_a_backward_under_autocast_computes_as_its_forward():
    geometry = Geometry(padding=(1, 1))
    inputs = make_inputs((2, 16, 9, 8), (24, 16, 3, 3), torch.float32)
    y = ours(geometry)(*inputs)
    (expected,) = torch.autograd.grad(y.sum(), inputs[0], retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (gradient,) = torch.autograd.grad(y, inputs[0], torch.ones_like(y))
    assert torch.equal(gradient, expected)


def test_nothing_is_saved():
    for shape, kernel, geometry in CASES:
        x, weight, bias = make_inputs(shape, kernel)
        with saved_bytes(excluded=[weight]) as saved:
            y = ours(geometry)(x, weight, bias)
        assert saved["bytes"] == 0 and y.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16), saved_bytes(excluded=[weight]) as saved:
        ours(geometry)(x.float(), weight.float(), bias.float())
    assert saved["bytes"] == 4 * weight.numel()  # the weight as given, not its cast


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    for shape, kernel, geometry in CASES[1:3]:
        x, *frozen = make_inputs(shape, kernel)
        assert torch.autograd.gradcheck(lambda x: ours(geometry, backend)(x, *frozen), [x])


def test_a_graph_serves_twice_and_not_after_its_weight_changed():
    x, weight, bias = make_inputs(*CASES[0][:2])
    y = ours(CASES[0][2])(x, weight, bias)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_an_error_in_words():
    inputs = make_inputs(*CASES[0][:2])
    (grad,) = torch.autograd.grad(ours(CASES[0][2])(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match='frozen_conv2d.*second time.*backend="reference" does'):
        grad.sum().backward()


def test_an_empty_batch():
    x, weight, bias = make_inputs((0, 6, 9, 7), (4, 6, 3, 3))
    y, grad = value_and_gradients(ours(Geometry()), [x, weight, bias], torch.empty(0, 4, 7, 5, dtype=x.dtype))
    assert y.shape == (0, 4, 7, 5) and grad.shape == x.shape


def test_without_gradients():
    x, weight, bias = make_inputs(*CASES[0][:2])
    expected = stock(CASES[0][2])(x, weight, bias)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = ours(CASES[0][2])(x, weight.requires_grad_(), bias)
        assert torch.equal(y, expected) and not y.requires_grad


def test_the_reference_is_pytorchs_own_convolution():
    x, weight, bias = make_inputs(*CASES[0][:2])
    nodes = [ours(CASES[0][2], backend)(x, weight, bias).grad_fn.name() for backend in BACKENDS]
    assert nodes == ["_FrozenConv2dBackward", "ConvolutionBackward0"]


def test_fake_meta_functorch_and_compiled():
    geometry = CASES[1][2]
    inputs = make_inputs(*CASES[1][:2], torch.float32)
    x, *frozen = inputs
    mine, grad = value_and_gradients(
        ours(geometry), [t.to("meta") for t in inputs], torch.empty(2, 4, 5, 4, device="meta")
    )
    assert mine.device.type == "meta" and grad.shape == x.shape
    with FakeTensorMode() as mode:
        value_and_gradients(ours(geometry), [mode.from_tensor(t) for t in inputs], torch.empty(2, 4, 5, 4))
    with torch.no_grad():
        mapped = torch.func.vmap(lambda x: frozen_conv2d(x[None], *frozen, geometry))(x)
    torch.testing.assert_close(mapped[:, 0], stock(geometry)(*inputs))

    def loss(x):
        return ours(geometry, "auto")(x, *frozen).square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    torch._dynamo.reset()
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(1, 4, 5, 5, dtype=torch.int64)}, "x is torch.int64"),
        ({"x": torch.zeros(4, 5, 5)}, "x is (4, 5, 5); it must be (N, C, H, W)"),
        ({"weight": torch.zeros(2, 4, 3)}, "weight is (2, 4, 3); it must be (K, C / groups, h, w)"),
        ({"weight": torch.zeros(2, 3, 3, 3)}, "weight is (2, 3, 3, 3); for this x it must be (2, 4, 3, 3)"),
        ({"geometry": Geometry(groups=3)}, "groups=3 must divide K and C=4"),
        ({"weight": torch.zeros(2, 4, 3, 3, requires_grad=True)}, "weight requires grad and would receive none"),
        ({"bias": torch.zeros(2, requires_grad=True)}, "bias.requires_grad_(False)"),
        ({"bias": torch.zeros(3)}, "bias is (3,); for this x it must be (2,)"),
        ({"bias": torch.zeros(2, device="meta")}, "bias is on meta"),
        ({"backend": "gpu"}, "backend='gpu' is unknown"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(changes, message):
    inputs = {"x": torch.zeros(1, 4, 5, 5), "weight": torch.zeros(2, 4, 3, 3), "bias": None, "geometry": Geometry()}
    with pytest.raises(ValueError) as error:
        frozen_conv2d(**(inputs | changes))
    assert message in str(error.value)
