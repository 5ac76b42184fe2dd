"""The geglu kernels in Triton's interpreter against the op's reference: odd shapes, every tile size, canaries."""

import pytest
import torch
from checks import Canaries, assert_as_good_as, value_and_gradients

geglu = pytest.importorskip("rftcore.kernels.geglu", reason="Triton is not installed", exc_type=ImportError)

from rftcore.ops import geglu_reference  # noqa: E402

CONFIGS = [None, geglu.Config(1, 16, 1), geglu.Config(8, 256, 8)]


@pytest.mark.covering(1)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (37, 300), (2, 640)])
def test_both_passes(shape, dtype, config):
    rows, columns = shape
    u = torch.randn(rows, 2 * columns).mul_(2).to(dtype)
    grad = torch.randn(shape).to(dtype)
    canaries = Canaries()
    y, grad_u = canaries.empty(shape, dtype), canaries.empty(u.shape, dtype)
    geglu.forward(u, y, config).run()
    geglu.backward(grad, u, grad_u, config).run()
    canaries.check()
    exact = value_and_gradients(geglu_reference, [u.double().requires_grad_()], grad.double())
    stock = value_and_gradients(geglu_reference, [u.requires_grad_()], grad)
    assert_as_good_as(stock, (y, grad_u), exact)
