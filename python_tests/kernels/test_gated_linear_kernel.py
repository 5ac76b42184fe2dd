"""The gated_linear kernels in Triton's interpreter against PyTorch's layers: odd shapes, all loops, masks, canaries."""

import pytest
import torch
from checks import Canaries, assert_as_good_as
from torch.nn.functional import gelu, layer_norm, linear

gated_linear = pytest.importorskip(
    "rftcore.kernels.gated_linear", reason="Triton is not installed", exc_type=ImportError
)

from rftcore.kernels import geglu  # noqa: E402

DTYPES = [torch.float32, torch.float16]
SMALL = gated_linear.Config(16, 16, 16, num_warps=1, num_stages=1, group=2)
WIDE = gated_linear.Config(64, 32, 64, num_warps=4, num_stages=2, group=3, precision="tf32x3")
EPS = 1e-5
# Rows, width and columns: single ones, odd ones with a tail of K, and more tiles than a group has.
SHAPES = [(1, 1, 1), (5, 17, 33), (37, 48, 20), (150, 96, 70)]


class Case:
    """Random inputs, and what the layers of PyTorch make of them in one dtype or another."""

    def __init__(self, shape, dtype, *, norm="affine", bias=True, rank=0, low=None, scale=0.75):
        rows, width, columns = self.shape = shape
        self.dtype, self.scale = dtype, scale
        self.x = (torch.randn(rows, width) * 2 + 1).to(dtype)
        self.weight = (torch.randn(2 * columns, width) / width**0.5).to(dtype)
        self.bias = torch.randn(2 * columns).to(dtype) if bias else None
        self.grad_y = torch.randn(rows, columns).to(dtype)
        affine = norm == "affine"
        self.norm_weight = torch.randn(width).to(dtype) if affine else None
        self.norm_bias = torch.randn(width).to(dtype) if affine else None
        self.normed = norm is not None
        self.h, self.b = (torch.randn(n, rank).to(low or dtype) if rank else None for n in (rows, 2 * columns))

    def terms(self, rows=slice(None)):
        """The keywords of the kernels."""
        found = {}
        if self.normed:
            x = self.x[rows].double()
            mean, deviation = x.mean(1).float(), (x.var(1, correction=0) + EPS).rsqrt().float()
            found["norm"] = gated_linear.Norm(mean, deviation, self.norm_weight, self.norm_bias)
        if self.h is not None:
            found["low_rank"] = gated_linear.LowRank(self.h[rows], self.b, self.scale)
        return found

    def run(self, config=None, keeps_u=True):
        """y, u (or None) and grad_u by the kernels."""
        rows, _, columns = self.shape
        canaries = Canaries()
        y = canaries.empty((rows, columns), self.dtype)
        u = canaries.empty((rows, 2 * columns), self.dtype) if keeps_u else None
        grad_u = canaries.empty((rows, 2 * columns), self.dtype)
        gated_linear.forward(self.x, self.weight, self.bias, y, u=u, config=config, **self.terms()).run()
        gated_linear.backward(self.grad_y, self.x, self.weight, self.bias, grad_u, config=config, **self.terms()).run()
        canaries.check()
        return y, u, grad_u

    def stock(self, double=False):
        """y, u and grad_u by PyTorch's layers, in this dtype or in fp64."""

        def cast(t):
            return t.double() if double and t is not None else t

        x, weight = cast(self.x), cast(self.weight)
        n = layer_norm(x, x.shape[1:], cast(self.norm_weight), cast(self.norm_bias), EPS) if self.normed else x
        u = linear(n, weight, cast(self.bias))
        if self.h is not None:
            # As PEFT: the adapter in its own dtype, its sum in that of the layer's output.
            u = (u + self.scale * linear(cast(self.h), cast(self.b))).to(u.dtype)
        u.requires_grad_()
        hidden, gate = u.chunk(2, 1)
        y = hidden * gelu(gate)
        return y.detach(), u.detach(), *torch.autograd.grad(y, u, cast(self.grad_y))

    def check(self, config=None):
        assert_as_good_as(self.stock(), self.run(config), self.stock(double=True))


@pytest.mark.covering(1)
@pytest.mark.parametrize("config", [None, SMALL, WIDE], ids=["heuristic", "small", "wide"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_passes(shape, dtype, config):
    if shape[1] > 1:
        Case(shape, dtype).check(config)
    Case(shape, dtype, norm=None, bias=False, rank=3).check(config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("terms", [
    {"norm": "plain"},
    {"norm": "plain", "bias": False},
    {"norm": None},
    {"norm": None, "bias": False},
    {"rank": 1},
    {"rank": 16, "low": torch.float32},
    {"rank": 20, "scale": -3.0},
    {"rank": 64, "norm": None, "low": torch.float32},
], ids=str)  # fmt: skip
def test_each_term(terms, dtype):
    Case((21, 33, 19), dtype, **terms).check(SMALL)


def test_biases_and_the_norm_may_be_fp32_beside_fp16():
    case = Case((9, 40, 12), torch.float16)
    expected = case.run(SMALL)
    for name in ("bias", "norm_weight", "norm_bias"):
        setattr(case, name, getattr(case, name).float())
    assert all(torch.equal(*pair) for pair in zip(case.run(SMALL), expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_y_is_the_same_where_u_is_not_kept_and_follows_from_the_u_that_is(dtype):
    case = Case((21, 40, 19), dtype, rank=4)
    y, u, grad_u = case.run(SMALL)
    assert torch.equal(case.run(SMALL, keeps_u=False)[0], y)
    from_u, grad_from_u = torch.empty_like(y), torch.empty_like(u)
    geglu.forward(u, from_u).run()
    geglu.backward(case.grad_y, u, grad_from_u).run()
    assert torch.equal(from_u, y) and torch.equal(grad_from_u, grad_u)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype):
    case = Case((45, 40, 19), dtype, rank=4)
    y, _, grad_u = case.run(SMALL)
    for i in (0, 20, 44):
        row = slice(i, i + 1)
        alone, grad_alone = torch.empty_like(y[row]), torch.empty_like(grad_u[row])
        terms = {"config": SMALL, **case.terms(row)}
        gated_linear.forward(case.x[row], case.weight, case.bias, alone, **terms).run()
        gated_linear.backward(case.grad_y[row], case.x[row], case.weight, case.bias, grad_alone, **terms).run()
        assert torch.equal(alone, y[row]) and torch.equal(grad_alone, grad_u[row])


def test_a_row_of_equal_values_has_no_infinite_tail():
    case = Case((2, 17, 4), torch.float16, norm="plain")
    case.x.fill_(1000.0)
    case.check(SMALL)


def test_no_rows_are_no_launch():
    Case((0, 17, 4), torch.float32, norm=None).run(SMALL)


def test_counts():
    counts = gated_linear.count_forward(32768, 320, 1280, 2, normed=False)
    assert counts.flops == 2 * 32768 * 2560 * 320
    assert counts.bytes == 2 * (32768 * 320 + 2560 * 320 + 2560 + 32768 * 1280)
    more = gated_linear.count_forward(32768, 320, 1280, 2, normed=False, keeps_u=True)
    assert more.bytes - counts.bytes == 2 * 32768 * 2560
    backward = gated_linear.count_backward(32768, 320, 1280, 2, rank=4)
    assert backward.flops == counts.flops + 2 * 32768 * 2560 * 4
