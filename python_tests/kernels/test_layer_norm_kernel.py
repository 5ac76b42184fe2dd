"""The layer_norm kernels in Triton's interpreter against PyTorch's: odd shapes, every tile size, canaries."""

import pytest
import torch
from checks import Canaries, assert_as_good_as, value_and_gradients
from torch.nn.functional import layer_norm as stock_layer_norm

layer_norm = pytest.importorskip("rftcore.kernels.layer_norm", reason="Triton is not installed", exc_type=ImportError)

CONFIGS = [None, layer_norm.Config(1, 1), layer_norm.Config(4, 8)]
EPS = 1e-5


def statistics_of(x, config=None):
    canaries = Canaries()
    found = [canaries.empty(x.shape[:1], torch.float32) for _ in range(2)]
    layer_norm.statistics(x, *found, EPS, config).run()
    canaries.check()
    return found


def exact_statistics(x):
    x = x.double()
    return x.mean(1), (x.var(1, correction=0) + EPS).rsqrt()


@pytest.mark.covering(2)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (37, 96), (3, 320)])
def test_both_passes(shape, dtype, config):
    x = torch.randn(shape).mul_(2).add_(1).to(dtype)
    grad, addend, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[1]).to(dtype)
    statistics = statistics_of(x, config)
    stock = torch.native_layer_norm(x, shape[1:], None, None, EPS)[1:]
    stock = [value.flatten().float() for value in stock]
    assert_as_good_as(stock, statistics, exact_statistics(x))

    for scale in (weight, weight.float(), None):
        for added in (addend, None):
            canaries = Canaries()
            grad_x = canaries.empty(shape, dtype)
            layer_norm.backward(grad, x, *statistics, scale, grad_x, added, config).run()
            canaries.check()
            stock = gradient(x, None if scale is None else scale.to(dtype), grad, added)
            exact = gradient(*(None if t is None else t.double() for t in (x, scale, grad, added)))
            if shape[1] == 1:
                # Exactly 0 but for the addend: any rounding is infinitely much of it.
                assert (grad_x.double() - exact).abs().max() < 1e-3
            else:
                assert_as_good_as([stock], [grad_x], [exact])


def gradient(x, weight, grad, addend):
    def function(x):
        return stock_layer_norm(x, x.shape[1:], weight, None, EPS)

    found = value_and_gradients(function, [x.detach().requires_grad_()], grad)[1]
    return found if addend is None else found + addend


def test_a_small_variance_beside_a_large_mean():
    x = torch.randn(4, 320) + 3000
    mean, inverse_deviation = statistics_of(x)
    exact = exact_statistics(x)
    torch.testing.assert_close(mean.double(), exact[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(inverse_deviation.double(), exact[1], rtol=1e-5, atol=0)


def test_the_gradient_may_take_the_place_of_its_inputs():
    x, grad, addend = torch.randn(3, 6, 40)
    statistics = statistics_of(x)
    apart = torch.empty_like(x)
    layer_norm.backward(grad, x, *statistics, None, apart, addend).run()
    for place in (grad.clone(), addend.clone()):
        inputs = [place if torch.equal(place, t) else t for t in (grad, addend)]
        layer_norm.backward(inputs[0], x, *statistics, None, place, inputs[1]).run()
        assert torch.equal(place, apart)


def test_a_row_does_not_depend_on_the_others():
    x, grad = torch.randn(2, 21, 48)
    statistics = statistics_of(x)
    together = torch.empty_like(x)
    layer_norm.backward(grad, x, *statistics, None, together).run()
    for i in (0, 7, 20):
        row = slice(i, i + 1)
        alone = statistics_of(x[row])
        assert all(torch.equal(one, many[row]) for one, many in zip(alone, statistics, strict=True))
        grad_x = torch.empty_like(x[row])
        layer_norm.backward(grad[row], x[row], *alone, None, grad_x).run()
        assert torch.equal(grad_x, together[row])


def test_no_rows_are_no_launch():
    x = torch.empty(0, 32)
    layer_norm.statistics(x, torch.empty(0), torch.empty(0), EPS).run()


def test_counts():
    assert layer_norm.count_statistics(10, 64, 2).bytes == 10 * 64 * 2 + 80
    assert layer_norm.count_backward(10, 64, 2).bytes == 3 * 10 * 64 * 2 + 80
    assert layer_norm.count_backward(10, 64, 2, weight_itemsize=4, addend=True).bytes == 4 * 10 * 64 * 2 + 80 + 256
