"""geglu: every backend against chunk, gelu and a product in fp64 and in low precision."""

import pytest
import torch
from checks import (
    BACKENDS,
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

from rftcore.ops import compiled, geglu
from rftcore.ops.backends import OPS
from rftcore.ops.geglu import geglu_backward, geglu_forward

SHAPES = [(2,), (3, 14), (2, 5, 66), (1, 3, 2, 130)]


def stock(u):
    hidden, gate = u.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def make_input(shape, dtype=torch.float64, layout="contiguous"):
    return laid_out(torch.randn(shape, dtype=torch.float64) * 2, layout).to(dtype).requires_grad_()


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_and_gradients_are_exact_in_fp64(backend, layout, nan_filled):
    for shape in SHAPES:
        if layout == "channels_last" and len(shape) < 2:
            continue
        u = make_input(shape, layout=layout)
        assert OPS["geglu"].choose("auto", u) == "cpu"
        grad = torch.randn(*shape[:-1], shape[-1] // 2, dtype=torch.float64)
        for g in (grad, laid_out(grad, "sliced"), laid_out(grad, "transposed"), grad.flatten()[0].expand_as(grad)):
            ours = value_and_gradients(lambda u: geglu(u, backend=backend), [u], g)
            exact = value_and_gradients(stock, [u], g)
            assert max(relative_error(a, b) for a, b in zip(ours, exact, strict=True)) < 1e-14


def test_both_passes_run_the_compiled_code(monkeypatch):
    launched, launch = [], compiled.launch
    monkeypatch.setattr(compiled, "launch", lambda name, *others: (launched.append(name), launch(name, *others))[1])
    u, grad = make_input((3, 14)).detach(), torch.randn(3, 7, dtype=torch.float64)
    geglu_forward(u, "cpu"), geglu_backward(grad, u, "cpu")
    assert launched == ["geglu_forward", "geglu_backward"]


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_low_precision_is_as_good_as_pytorch(dtype):
    u = make_input((64, 514), dtype)
    grad = torch.randn(64, 257).to(dtype)
    ours = value_and_gradients(lambda u: geglu(u, backend="cpu"), [u], grad)
    exact = value_and_gradients(stock, [u.detach().double().requires_grad_()], grad.double())
    assert_as_good_as(value_and_gradients(stock, [u], grad), ours, exact)


def test_the_normal_distribution_of_fp32_is_that_of_fp64():
    """Every gate from the deepest tail on, with its relative precision where PyTorch's is lost."""
    gate = torch.linspace(-13, 13, 400_003)
    u = torch.stack([torch.ones_like(gate), gate], -1).requires_grad_()
    y, grad = value_and_gradients(lambda u: geglu(u, backend="cpu"), [u], torch.ones(len(gate), 1))
    x = gate.double()
    cdf = 0.5 * torch.special.erfc(-x / 2**0.5)
    slope = cdf + x * torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5
    assert ((y[:, 0] - x * cdf).abs() / (x * cdf).abs().clamp(min=1e-30)).max() < 1e-5
    assert ((y[:, 0] - x * cdf).abs() / x.abs().clamp(min=1)).max() < 2e-7
    assert (grad[:, 1] - slope).abs().max() < 5e-7


def test_far_from_zero_and_not_a_number():
    gate = torch.tensor([-1e20, -1e4, -40.0, 0.0, 40.0, 1e4, 1e20, float("nan")])
    u = torch.stack([torch.ones_like(gate), gate], -1)
    expected = torch.where(gate.isnan(), gate, gate.clamp(min=0))
    torch.testing.assert_close(geglu(u, backend="cpu")[:, 0], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
def test_gradcheck(backend):
    assert torch.autograd.gradcheck(lambda u: geglu(u, backend=backend), [make_input((3, 2, 8))])


def test_only_the_input_is_saved():
    u = make_input((4, 64))
    assert [t.data_ptr() for t in saved_by(geglu, u)] == [u.data_ptr()]


def test_a_second_derivative_is_an_error_in_words():
    u = make_input((2, 6))
    (grad,) = torch.autograd.grad(geglu(u).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match='geglu.*second time.*backend="reference" does'):
        grad.sum().backward()


@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_empty_inputs(backend, shape):
    u = torch.empty(shape, requires_grad=True)
    y = geglu(u, backend=backend)
    y.sum().backward()
    assert y.shape == (shape[0], shape[1] // 2) and u.grad.shape == shape


def test_results_do_not_depend_on_the_number_of_threads():
    u, grad = make_input((512, 1026), torch.float32), torch.randn(512, 513)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = value_and_gradients(geglu, [u], grad)
        torch.set_num_threads(3)
        together = value_and_gradients(geglu, [u], grad)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    u = make_input((2, 3, 8), layout=layout).detach()
    torch.library.opcheck(torch.ops.rftcore.geglu.default, (u, "cpu"))
    grad = torch.ones((), dtype=u.dtype).expand(2, 3, 4)
    torch.library.opcheck(torch.ops.rftcore.geglu_backward.default, (grad, u, "cpu"))


def test_fake_meta_functorch_and_compiled():
    u = make_input((4, 8), torch.float32)
    assert geglu(u.to("meta")).device.type == "meta"
    with FakeTensorMode() as mode:
        value_and_gradients(lambda u: geglu(u, backend="cpu"), [mode.from_tensor(u)], torch.empty(4, 4))
    torch.testing.assert_close(torch.func.vmap(geglu)(u), geglu(u))

    def loss(u):
        return geglu(u).square().sum()

    (expected,) = torch.autograd.grad(loss(u), u)
    torch._dynamo.reset()
    (compiled,) = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(u), u)
    torch.testing.assert_close(compiled, expected)


@pytest.mark.parametrize(
    ("u", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.int64), "u is torch.int64"),
        (torch.zeros(2, 5), "u is (2, 5); it must be (..., 2D)"),
        (torch.tensor(1.0), "u is (); it must be (..., 2D)"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(u, message):
    with pytest.raises(ValueError) as error:
        geglu(u)
    assert message in str(error.value)
