"""The forwards and backwards that blocks call themselves record no graph, whatever requires a gradient."""

import pytest
import torch

from rftcore.ops import Adapter, Projection, attention_backward, attention_forward
from rftcore.ops.attention import run_backward, run_forward
from rftcore.ops.gated_linear import gated_linear_backward, gated_linear_forward
from rftcore.ops.geglu import geglu_backward, geglu_forward
from rftcore.ops.group_norm_silu import group_norm_silu_backward, group_norm_silu_forward
from rftcore.ops.lora_linear import lora_linears_backward, lora_linears_forward


def wanted(*shape):
    return torch.randn(shape, requires_grad=True)


def attention():
    q, k, v = wanted(1, 2, 3, 8), wanted(1, 2, 5, 8), wanted(1, 2, 5, 8)
    o, lse = attention_forward(q, k, v, backend="math")
    return [o, lse, *attention_backward(wanted(1, 2, 3, 8), q, k, v, o, lse, backend="math")]


def attention_by_name():
    q, k, v = wanted(1, 2, 3, 8), wanted(1, 2, 5, 8), wanted(1, 2, 5, 8)
    o, lse = run_forward("math", q, k, v, 0.5)
    return [o, lse, *run_backward("math", wanted(1, 2, 3, 8), q, k, v, o, lse, 0.5, (True, True, True))]


def geglu():
    u = wanted(3, 8)
    return [
        result for b in ("torch", "reference") for result in (geglu_forward(u, b), geglu_backward(wanted(3, 4), u, b))
    ]


def projection(out):
    return Projection(torch.randn(out, 8), None, (Adapter(wanted(2, 8), wanted(out, 2), 0.5),))


def lora_linears():
    x, p = wanted(3, 8), projection(6)
    outputs = lora_linears_forward(x, (p,), None, None, "torch")
    needs = [True, False, False, False, False, True, True]
    return [*outputs, *lora_linears_backward([wanted(3, 6)], x, (p,), None, None, "torch", needs)]


def gated_linear():
    x, p = wanted(3, 8), projection(6)
    y, u = gated_linear_forward(x, p, None, None, "separate", keep=True)
    needs = [True, False, False, False, False, True, True]
    return [y, u, *gated_linear_backward(wanted(3, 3), x, u, p, None, None, "separate", needs)]


def group_norm_silu():
    x, weight, bias, grad = wanted(2, 4, 3, 3), wanted(4), wanted(4), wanted(2, 4, 3, 3)
    results = []
    for backend in ("torch", "cpu"):
        y, *statistics = group_norm_silu_forward(x, weight, bias, None, None, None, 2, 1e-5, True, backend)
        results += [y, *statistics]
        needs = [True, True, True, False, False, False]
        results += group_norm_silu_backward(
            grad, x, weight, bias, None, None, None, 2, 1e-5, True, *statistics, backend, needs
        )
    return results


@pytest.mark.parametrize("op", [attention, attention_by_name, geglu, lora_linears, gated_linear, group_norm_silu])
def test_nothing_that_comes_out_has_a_graph(op):
    results = [t for t in op() if isinstance(t, torch.Tensor)]
    assert results and not any(t.requires_grad for t in results)
