"""Every op by every backend that serves it here, against fp64, with stock PyTorch in the same dtype as the yardstick.

On a machine with a GPU on its shapes and in its dtypes; elsewhere CUDA and Triton kernels are stood in for.
"""

import pytest
import torch
from cases import LARGE, SMALL
from checks import relative_error

from rftcore.ops.backends import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = SMALL + LARGE if DEVICE == "cuda" else SMALL
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def parameters():
    return [
        pytest.param(case, backend, dtype, id=f"{case.op}-{backend}-{DTYPES[dtype]}-{i}")
        for i, case in enumerate(CASES)
        for backend in OPS[case.op].not_supported_reasons
        for dtype in DTYPES
    ]


@pytest.mark.parametrize(("case", "backend", "dtype"), parameters())
def test_value_and_gradients(case, backend, dtype):
    exact = [t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in case.inputs()]
    inputs = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in exact]
    if reasons := OPS[case.op].not_supported_reasons[backend](*case.question(inputs)):
        pytest.skip("; ".join(reasons))
    with torch.no_grad():  # the very same numbers
        for wide, narrow in zip(exact, inputs, strict=True):
            wide.copy_(narrow)
    truth = case.stock(exact)
    grad = torch.randn_like(truth).to(dtype)
    truth, ours, stock = (
        results(*parts, grad)
        for parts in (
            (truth, exact),
            (case.ours(inputs, backend), inputs),
            (case.stock(inputs), inputs),
        )
    )
    for name, value, theirs, right in zip(range(len(truth)), ours, stock, truth, strict=True):
        assert value.dtype == theirs.dtype
        error, bound = relative_error(value, right), 2 * relative_error(theirs, right) + 1e-6
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"


def results(output, inputs, grad):
    """The output, and the gradients of those inputs that want one."""
    return [output, *torch.autograd.grad(output, [t for t in inputs if t.requires_grad], grad.to(output))]


def test_every_op_has_cases():
    assert {case.op for case in SMALL} == {case.op for case in LARGE} == OPS.keys()
