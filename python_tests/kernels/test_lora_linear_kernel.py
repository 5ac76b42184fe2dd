"""The lora_linear kernels in Triton's interpreter against the op's reference: odd shapes, every tile, canaries."""

from itertools import chain
from typing import NamedTuple

import pytest
import torch
from checks import Canaries, assert_as_good_as
from torch.nn import functional as F

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = pytest.importorskip("triton.language")
forward = pytest.importorskip("rftcore.kernels.lora_linear", reason="Triton is not installed", exc_type=ImportError)
backward = pytest.importorskip("rftcore.kernels.lora_linear_backward", exc_type=ImportError)
common = pytest.importorskip("rftcore.kernels.projections", exc_type=ImportError)

from rftcore.ops import lora_linears_reference  # noqa: E402
from rftcore.ops.lora_linear import Adapter, Norm, Projection  # noqa: E402

# Dtypes of the base and of the adapters.
DTYPES = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32)]
MIXED = DTYPES[-1]
TINY = forward.ProjectConfig(16, 32, 16, group=2, num_warps=1, num_stages=1)
SPANNING = forward.ProjectConfig(16, 64, 32, group=1, num_warps=2, span=True)
PROJECT = {
    "default": None,
    "tiny": TINY,
    "spanning": SPANNING,
    "fused": forward.ProjectConfig(32, 16, 16, group=3, fused=True),
    "strip": forward.StripConfig(16, 16, num_warps=1),
    "shared strip": forward.StripConfig(32, 64, parts=2),
    "fused, spanning": forward.ProjectConfig(32, 32, 16, group=8, fused=True, span=True),
}
TINY_BACKWARD = (
    backward.LowRankConfig(16, 16),
    backward.InputConfig(16, 32, 16, group=2),
    backward.AdaptersConfig(32, 16, 3, columns_summed=64, parts_summed=2),
)


class Case(NamedTuple):
    """Sizes: `widths` and `ranks` of projections, rank 0 where there is no adapter; `affine`: None without a norm."""

    rows: int
    inner: int
    widths: tuple
    ranks: tuple
    affine: bool | None = True
    biases: tuple = (True, False, True)
    residual: bool = False


CASES = {
    "three": Case(37, 57, (33, 20, 40), (4, 1, 7)),
    "one of three without adapter": Case(30, 48, (48, 48, 48), (8, 0, 20), affine=False, biases=(False,) * 3),
    "two, no norm": Case(40, 33, (17, 96), (0, 5), affine=None),
    "residual": Case(40, 64, (80,), (4,), affine=None, biases=(True,), residual=True),
    "norm and residual, no adapter": Case(19, 80, (35,), (0,), residual=True),
    "one row": Case(1, 16, (31, 3, 16), (2, 3, 4)),
    "high ranks": Case(20, 32, (16, 24, 24), (64, 40, 63), biases=(False, True, False)),
    "many rows": Case(150, 64, (48,), (4,)),
}


class Problem(NamedTuple):
    x: torch.Tensor
    norm: Norm | None
    projections: list
    residual: torch.Tensor | None
    grads: list

    def to(self, dtype):
        """Every tensor in this dtype, as a leaf that requires grad where a gradient is compared."""

        def cast(tensor, leaf=False):
            return None if tensor is None else tensor.detach().to(dtype or tensor.dtype).requires_grad_(leaf)

        projections = [
            Projection(cast(w), cast(bias), tuple(Adapter(cast(a, True), cast(b, True), s) for a, b, s in adapters))
            for w, bias, adapters in self.projections
        ]
        norm = self.norm and Norm(cast(self.norm.weight), cast(self.norm.bias), self.norm.eps)
        return Problem(cast(self.x, True), norm, projections, cast(self.residual), [cast(g) for g in self.grads])


def problem(case, dtype, adapter_dtype):
    def random(*shape, like=dtype):
        return torch.randn(shape).to(like)

    projections = []
    for width, rank, has_bias in zip(case.widths, case.ranks, case.biases, strict=False):
        a = random(rank, case.inner, like=adapter_dtype) / case.inner**0.5
        b = random(width, rank, like=adapter_dtype) / max(rank, 1) ** 0.5
        adapters = (Adapter(a, b, 0.7 + rank / 10),) if rank else ()
        weight = random(width, case.inner) / case.inner**0.5
        projections.append(Projection(weight, random(width) if has_bias else None, adapters))
    affine = (random(case.inner), random(case.inner)) if case.affine else (None, None)
    return Problem(
        # A mean far from zero, on which a difference of squares would lose its digits.
        random(case.rows, case.inner) + (0 if case.affine is None else 8),
        None if case.affine is None else Norm(*affine, 1e-5),
        projections,
        random(case.rows, case.widths[0]) if case.residual else None,
        [random(case.rows, width) for width in case.widths],
    )


def matrices(projections):
    return [m for *_, adapters in projections for a, b, _ in adapters for m in (a, b)]


def by_autograd(problem):
    """Outputs, and gradients of x and of every a and b, of PyTorch's operations in the problem's own dtypes."""
    outputs = lora_linears_reference(problem.x, problem.projections, problem.norm)
    if problem.residual is not None:
        outputs = (outputs[0] + problem.residual,)
    leaves = [problem.x, *matrices(problem.projections)]
    return [t.detach() for t in outputs], list(torch.autograd.grad(outputs, leaves, problem.grads))


def run_forward(problem, config, canaries):
    """Outputs, statistics, and h where it is made."""
    x, norm, projections, residual, _ = problem
    dtype = common.adapters_of(projections).dtype
    mean = inverse = h = None
    if norm is not None:
        mean, inverse = (canaries.empty((len(x),), torch.float32) for _ in range(2))
    config = config or forward.default_config(x, projections, norm)
    if not config.fused:
        if dtype is not None:
            h = canaries.empty(forward.low_rank_shape(len(x), projections), dtype)
        forward.shrink(x, projections, norm, mean, inverse, h).run()
    outputs = [canaries.empty((len(x), len(weight)), x.dtype) for weight, *_ in projections]
    forward.project(x, projections, outputs, norm, mean, inverse, h, residual, config=config).run()
    return outputs, mean, inverse, h


def run_backward(problem, mean, inverse, canaries, configs=(None, None, None)):
    """The gradients of n, and of every a and b."""
    x, norm, projections, _, grads = problem
    dtype = common.adapters_of(projections).dtype
    g = h = None
    if dtype is not None:
        g, h = (canaries.empty(forward.low_rank_shape(len(x), projections), dtype) for _ in range(2))
        backward.low_rank_gradient(grads, projections, g, configs[0]).run()
        forward.shrink(x, projections, norm, mean, inverse, h, given=True).run()
    grad_n = canaries.empty(x.shape, x.dtype)
    backward.input_gradient(grads, projections, g, grad_n, configs[1]).run()
    found = [
        (canaries.empty(own[0].a.shape, dtype), canaries.empty(own[0].b.shape, dtype)) if own else (None, None)
        for *_, own in projections
    ]
    if dtype is not None:
        run_adapter_gradients(problem, mean, inverse, g, h, found, canaries, configs[2])
    return grad_n, [t for pair in found for t in pair if t is not None]


def run_adapter_gradients(problem, mean, inverse, g, h, found, canaries, config=None):
    x, norm, projections, _, grads = problem
    partials = canaries.empty(backward.partials_shape(x, projections, found, config), torch.float32)
    for launch in backward.adapter_gradients(x, grads, projections, norm, mean, inverse, g, h, found, partials, config):
        launch.run()


def through_norm(grad_n, problem, mean, inverse):
    """The gradient of x, as the caller of these kernels makes it."""
    if problem.norm is None:
        return grad_n
    weight, bias, _ = (t.float() if isinstance(t, torch.Tensor) else t for t in problem.norm)
    x = problem.x.detach()
    grad_x, *_ = torch.ops.aten.native_layer_norm_backward(
        grad_n.float(), x.float(), x.shape[-1:], mean[:, None], inverse[:, None], weight, bias, [True, False, False]
    )
    return grad_x.to(x.dtype)


def assert_as_good(stock, ours, exact):
    """Tensors under 64 values are compared together: an error of few values says little."""
    assert_as_good_as(*([*(v for v in values if v.numel() >= 64), *pooled(values)] for values in (stock, ours, exact)))


def pooled(values):
    small = [v for v in values if v.numel() < 64]
    return [torch.cat([v.double().flatten() for v in small])] if small else []


FORWARD = [(case, "default", *dtypes) for case in CASES for dtypes in DTYPES] + [
    (case, config, *MIXED)
    for case, sizes in CASES.items()
    for config in PROJECT
    if config != "default" and not ("strip" in config and sum(sizes.ranks) > common.WIDEST)
]


@pytest.mark.parametrize(("case", "config", "dtype", "adapter_dtype"), FORWARD)
def test_forward(case, config, dtype, adapter_dtype):
    given = problem(CASES[case], dtype, adapter_dtype)
    canaries = Canaries()
    outputs, mean, inverse, _ = run_forward(given, PROJECT[config], canaries)
    canaries.check()
    exact, stock = by_autograd(given.to(torch.float64))[0], by_autograd(given.to(None))[0]
    assert_as_good(stock, outputs, exact)
    if given.norm is not None:
        x = given.x.double()
        deviation = (x.var(1, correction=0) + given.norm.eps).sqrt()
        torch.testing.assert_close(mean.double(), x.mean(1), rtol=3e-7, atol=0)
        torch.testing.assert_close(inverse.double(), 1 / deviation, rtol=3e-6, atol=0)


@pytest.fixture
def cut_to_tf32(monkeypatch):
    """Products as of a matrix unit, which does not look at the last bits of fp32 operands in TF32."""
    if torch.cuda.is_available():
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def cut(operand):
        bits = operand.data.view("int32") & -0x2000
        return interpreter.TensorHandle(bits.view("float32"), operand.dtype)

    def create_dot(self, a, b, d, precision, *others):
        if "TF32x3" not in str(precision) and a.data.dtype == "float32":
            a, b = cut(a), cut(b)
        return dot(self, a, b, d, precision, *others)

    monkeypatch.setattr(builder, "create_dot", create_dot)


@pytest.mark.parametrize("config", ["spanning", "fused, spanning"])
def test_fp32_adapters_that_outweigh_an_fp16_base(config, cut_to_tf32):
    given = problem(Case(64, 64, (48, 64), (8, 16), affine=None), *MIXED)
    for *_, ((_, b, _),) in given.projections:
        b.mul_(3)
    outputs, *_ = run_forward(given, PROJECT[config], Canaries())
    grad_n, _ = run_backward(given, None, None, Canaries())
    (exact, exact_grads), (stock, stock_grads) = by_autograd(given.to(torch.float64)), by_autograd(given.to(None))
    assert_as_good([*stock, stock_grads[0]], [*outputs, grad_n], [*exact, exact_grads[0]])


def test_what_is_no_number_has_no_digits_to_round():
    x = torch.tensor([1 + 2**-11, 1 + 2**-12, -1 - 2**-11, torch.inf, -torch.inf, torch.nan, torch.nan, 0.0])
    x[6:7].view(torch.int32).fill_(0x7FFFFFFF)
    y = torch.empty_like(x)
    _round_kernel[(1,)](x, y)
    expected = torch.tensor([1 + 2**-10, 1, -1 - 2**-10, torch.inf, -torch.inf, torch.nan, torch.nan, 0.0])
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def _round_kernel(x, y):
    i = tl.arange(0, 8)
    tl.store(y + i, common.rounded_to_tf32(tl.load(x + i)))


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    ("config", "dtype", "adapter_dtype"), [*(("default", *dtypes) for dtypes in DTYPES), ("tiny", *MIXED)]
)
@pytest.mark.parametrize("case", CASES)
def test_backward(case, config, dtype, adapter_dtype):
    configs = TINY_BACKWARD if config == "tiny" else (None, None, None)
    given = problem(CASES[case], dtype, adapter_dtype)
    canaries = Canaries()
    *_, mean, inverse, _ = run_forward(given, None, canaries)
    grad_n, grads = run_backward(given, mean, inverse, canaries, configs)
    canaries.check()
    exact, stock = by_autograd(given.to(torch.float64))[1], by_autograd(given.to(None))[1]
    assert_as_good(stock, [through_norm(grad_n, given, mean, inverse), *grads], exact)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
def test_low_rank_columns(dtype, adapter_dtype):
    """h and g, with statistics and without a norm, in steps that do not divide anything."""
    case = Case(45, 57, (33, 20, 40), (4, 30, 64), biases=(False,) * 3)
    for affine in (True, None):
        given = problem(case._replace(affine=affine), dtype, adapter_dtype)
        x, norm, projections, _, grads = given
        canaries = Canaries()
        mean = inverse = None
        if norm is not None:
            mean, inverse = (canaries.empty((45,), torch.float32) for _ in range(2))
            forward.shrink(x, (), norm, mean, inverse).run()
        h, g = (canaries.empty((45, 98), adapter_dtype) for _ in range(2))
        config = forward.ShrinkConfig(16, 16, num_warps=1)
        forward.shrink(x, projections, norm, mean, inverse, h, given=True, config=config).run()
        backward.low_rank_gradient(grads, projections, g, backward.LowRankConfig(16, 32)).run()
        canaries.check()

        def expected(x, norm, projections, _, grads):
            n = x if norm is None else F.layer_norm(x, x.shape[-1:], *norm)
            own = [adapters[0] for *_, adapters in projections]
            h = [n.to(a.dtype) @ a.t() for a, *_ in own]
            g = [(grad.to(b.dtype) * scale) @ b for grad, (_, b, scale) in zip(grads, own, strict=True)]
            return torch.cat(h, 1).detach(), torch.cat(g, 1).detach()

        assert_as_good(expected(*given.to(None)), (h, g), expected(*given.to(torch.float64)))


@pytest.mark.parametrize("wanted", ["a", "b", "a of one"])
def test_only_wanted_gradients(wanted):
    given = problem(CASES["three"], torch.float32, torch.float32)
    canaries = Canaries()
    *_, mean, inverse, h = run_forward(given, TINY, canaries)
    g = canaries.empty(h.shape, h.dtype)
    backward.low_rank_gradient(given.grads, given.projections, g).run()
    keep = {
        "a": [(True, False)] * 3,
        "b": [(False, True)] * 3,
        "a of one": [(False, False), (True, False), (False, True)],
    }
    found, exact, stock = [], [], []
    references = [iter(by_autograd(given.to(dtype))[1][1:]) for dtype in (torch.float64, None)]
    for (*_, own), wants in zip(given.projections, keep[wanted], strict=True):
        values = [next(reference) for _ in "ab" for reference in references]
        found.append(
            tuple(canaries.empty(t.shape, t.dtype) if want else None for t, want in zip(own[0], wants, strict=False))
        )
        exact += [t for t, want in zip(values[::2], wants, strict=True) if want]
        stock += [t for t, want in zip(values[1::2], wants, strict=True) if want]
    if wanted == "a":
        h = None
    if wanted == "b":
        given, g = given._replace(x=None, norm=None), None
        partials = canaries.empty(backward.partials_shape(given.grads[0], given.projections, found), torch.float32)
        arguments = None, given.grads, given.projections, None, None, None, g, h, found, partials
        for launch in backward.adapter_gradients(*arguments):
            launch.run()
    else:
        run_adapter_gradients(given, mean, inverse, g, h, found, canaries)
    canaries.check()
    assert_as_good(stock, [t for t in chain(*found) if t is not None], exact)


@pytest.mark.parametrize("config", ["spanning", "fused", "strip"])
def test_a_row_does_not_depend_on_the_others(config):
    given = problem(CASES["three"], torch.float16, torch.float16)
    whole, mean, inverse, _ = run_forward(given, PROJECT[config], Canaries())
    grad_n, _ = run_backward(given, mean, inverse, Canaries())
    own = slice(20, 25)
    some = given._replace(x=given.x[own].clone(), grads=[grad[own].clone() for grad in given.grads])
    part, *statistics, _ = run_forward(some, PROJECT[config], Canaries())
    assert all(torch.equal(y[own], y_own) for y, y_own in zip(whole, part, strict=True))
    assert torch.equal(grad_n[own], run_backward(some, *statistics, Canaries())[0])


def test_a_constant_row_and_one_that_is_not_finite():
    """Nothing leaks from columns of a step that x does not have, nor from one row to another."""
    given = problem(CASES["three"], torch.float16, torch.float16)
    given.x[3] = 1000.0
    clean, *_ = run_forward(given, PROJECT["fused, spanning"], Canaries())
    given.x[30] = torch.nan
    for name, config in PROJECT.items():
        outputs, *_ = run_forward(given, config, Canaries())
        for y, expected in zip(outputs, clean, strict=True):
            assert y[30].isnan().all(), name
            others = [i for i in range(37) if i != 30]
            torch.testing.assert_close(y[others], expected[others], rtol=1e-2, atol=1e-2)


def test_no_rows_is_no_launch():
    given = problem(CASES["three"]._replace(rows=0), torch.float32, torch.float32)
    *_, mean, inverse, _ = run_forward(given, TINY, Canaries())
    *_, (grad_a, *_) = run_backward(given, mean, inverse, Canaries())
    assert not grad_a.any()


def test_what_no_kernel_takes_is_an_error():
    given = problem(Case(5, 16, (8, 8), (65, 1)), torch.float32, torch.float32)
    with pytest.raises(ValueError, match="rank 65"):
        common.adapters_of(given.projections)
    with pytest.raises(ValueError, match="at most one"):
        common.adapters_of([Projection(*given.projections[1][:2], given.projections[1].adapters * 2)])
    with pytest.raises(ValueError, match="4 projections"):
        common.adapters_of(given.projections[1:] * 4)
    with pytest.raises(ValueError, match="residual"):
        forward.project(given.x, given.projections[1:] * 2, given.grads, given.norm, residual=given.grads[0])
    given = problem(CASES["high ranks"], torch.float32, torch.float32)
    with pytest.raises(ValueError, match="rank 167 together"):
        forward.project(given.x, given.projections, given.grads, given.norm, config=PROJECT["strip"])
