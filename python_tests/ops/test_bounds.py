"""Compiled kernels of any shape, dtype and layout: what lies around outputs is untouched, around inputs unused."""

import math

import pytest
import torch
from checks import COMPILED, DTYPES, assert_as_good_as, laid_out, relative_error, value_and_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rftcore.ops import geglu, group_norm_silu

MARGIN = 80  # elements on either side: more than a vector loop takes at a time
CANARY = 123.0
EPS = 1e-5


@pytest.fixture
def guarded(monkeypatch):
    """What an op allocates is NaN, with canaries on both sides; returns the buffers."""
    new_empty = torch.Tensor.new_empty
    buffers = []

    def between_canaries(self, *size, **options):
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        buffer = new_empty(self, (shape.numel() + 2 * MARGIN,), **options).fill_(CANARY)
        buffers.append(buffer)
        return buffer[MARGIN : MARGIN + shape.numel()].fill_(math.nan).view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", between_canaries)
    return buffers


def assert_untouched(buffers):
    assert buffers
    for buffer in buffers:
        assert (buffer[:MARGIN] == CANARY).all() and (buffer[buffer.numel() - MARGIN :] == CANARY).all()
    buffers.clear()


def among_nan(values):
    """The same values and strides, with NaN before and behind them in memory."""
    buffer = torch.full((values.numel() + 2 * MARGIN,), math.nan, dtype=values.dtype)
    inside = buffer.as_strided(values.shape, values.stride(), MARGIN)
    inside.copy_(values)
    return inside.requires_grad_()


def assert_exact(stock, ours, inputs, grad):
    """In fp64 to rounding, in other dtypes as good as PyTorch."""
    mine = value_and_gradients(ours, inputs, grad)
    exact = value_and_gradients(stock, [t.detach().double().requires_grad_() for t in inputs], grad.double())
    if grad.dtype == torch.float64:
        for a, b in zip(mine, exact, strict=True):
            assert relative_error(a, b) < 1e-12 or (a - b).abs().max() < 1e-11
    else:
        wide = [t.detach().float().requires_grad_() for t in inputs]
        yardstick = [t.to(grad.dtype) for t in value_and_gradients(stock, wide, grad.float())]
        # Tensors that small are pooled: one rounding of one value would decide.
        pooled = [torch.cat([t.flatten() for t in each]) for each in (yardstick, mine, exact)]
        assert_as_good_as(*([t] for t in pooled))


# One channel has the exact gradient 0 with respect to its bias, and what remains is rounding: two a group at least.
GROUP_NORMS = st.tuples(
    st.integers(1, 3), st.integers(1, 9), st.integers(2, 70), st.lists(st.integers(1, 23), min_size=1, max_size=3)
).filter(lambda case: 8 < math.prod(case[:3]) * math.prod(case[3]) < 200_000)


@pytest.mark.covering(1)
@COMPILED
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_group_norm_silu(backend, dtype, layout, guarded):
    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(case=GROUP_NORMS, seed=st.integers(0, 99))
    def check(case, seed):
        batch, groups, per_group, spatial = case
        torch.manual_seed(seed)
        channels = groups * per_group
        x = torch.randn(batch, channels, *spatial, dtype=torch.float64) + 1
        vectors = [torch.randn(shape, dtype=torch.float64) for shape in [(channels,)] * 2 + [(batch, channels)] * 3]
        inputs = [among_nan(laid_out(x, layout).to(dtype)), *(among_nan(v.to(dtype)) for v in vectors)]
        grad = among_nan(laid_out(torch.randn(x.shape, dtype=torch.float64), layout).to(dtype)).detach()

        def ours(x, weight, bias, channel_bias, *scale_shift):
            options = {"channel_bias": channel_bias, "scale_shift": scale_shift, "backend": backend}
            return group_norm_silu(x, weight, bias, groups, EPS, **options)

        def stock(x, weight, bias, *modulation):
            channel_bias, scale, shift = (m.reshape(batch, channels, *[1] * len(spatial)) for m in modulation)
            return F.silu(F.group_norm(x + channel_bias, groups, weight, bias, EPS) * (1 + scale) + shift)

        assert_exact(stock, ours, inputs, grad)
        assert_untouched(guarded)

    check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_geglu(dtype, guarded):
    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(rows=st.lists(st.integers(1, 9), max_size=3), width=st.integers(1, 150), seed=st.integers(0, 99))
    def check(rows, width, seed):
        torch.manual_seed(seed)
        u = among_nan(torch.randn(*rows, 2 * width, dtype=torch.float64).to(dtype))
        grad = among_nan(torch.randn(*rows, width, dtype=torch.float64).to(dtype)).detach()

        def stock(u):
            hidden, gate = u.chunk(2, dim=-1)
            return hidden * F.gelu(gate)

        assert_exact(stock, lambda u: geglu(u, backend="cpu"), [u], grad)
        assert_untouched(guarded)

    check()
