"""How the tests compare: relative errors, layouts, what is saved."""

import math

import pytest
import torch

BACKENDS = ["reference", "cpu"]
# The compute capabilities of devices that are emulated: 9.0 has clusters.
EMULATED = {"cuda on sm_80": 80, "cuda on sm_90": 90}
# For tests of ops with CUDA kernels, whose fixture `backend` takes the reference as well.
COMPILED = pytest.mark.parametrize("backend", ["cpu", *EMULATED, "cuda"], indirect=True)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last", "sliced", "transposed"]


def relative_error(value, expected):
    """In the Frobenius norm."""
    return ((value.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-300)).item()


def assert_as_good_as(stock, ours, exact):
    """Each of our values has at most twice the error of PyTorch's in the same dtype, both against fp64."""
    for yardstick, mine, expected in zip(stock, ours, exact, strict=True):
        assert mine.dtype == yardstick.dtype
        assert relative_error(mine, expected) <= 2 * relative_error(yardstick, expected) + 1e-6


def laid_out(tensor, layout):
    """The same values, in another memory format."""
    if layout == "channels_last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), math.nan)
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor.contiguous()


def value_and_gradients(function, inputs, grad):
    """The output of `function(*inputs)` and the gradients of those inputs that require one."""
    output = function(*inputs)
    return [output, *torch.autograd.grad(output, [t for t in inputs if t is not None and t.requires_grad], grad)]


def saved_by(function, *inputs):
    """The tensors that autograd keeps for the backward of `function(*inputs)`."""
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = function(*inputs)
    del output
    return saved


class Canaries:
    """Hands out outputs full of NaN between marks that a kernel must not touch."""

    _MARK, _WIDTH = 1234.0, 64

    def __init__(self):
        self._buffers = []

    def empty(self, shape, dtype):
        size = math.prod(shape)
        buffer = torch.full((size + 2 * self._WIDTH,), self._MARK, dtype=dtype)
        self._buffers.append(buffer)
        return buffer[self._WIDTH : self._WIDTH + size].fill_(math.nan).view(shape)

    def check(self):
        for buffer in self._buffers:
            assert (buffer[: self._WIDTH] == self._MARK).all() and (buffer[-self._WIDTH :] == self._MARK).all()
            assert not buffer.isnan().any()
