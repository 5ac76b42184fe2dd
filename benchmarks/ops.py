"""Each compiled op, forward and backward, against the eager chain of the operations it replaces.

"in a block": the op's two passes as an accelerated block calls them, without autograd's share.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F

from benchmarks.harness import Case, compare, report
from rftcore import ops
from rftcore.ops.group_norm_silu import group_norm_silu_backward, group_norm_silu_forward

GROUPS, EPS = 32, 1e-5


def group_norm_chain(x, weight, bias, channel_bias):
    """As diffusers' ResnetBlock2D computes it."""
    return F.silu(F.group_norm(x + channel_bias[:, :, None, None], GROUPS, weight, bias, EPS))


def group_norm_op(x, weight, bias, channel_bias):
    return ops.group_norm_silu(x, weight, bias, GROUPS, EPS, channel_bias=channel_bias)


def geglu_chain(u):
    """As diffusers' GEGLU computes it."""
    hidden, gate = u.chunk(2, dim=-1)
    return hidden * F.gelu(gate)


def step(function, inputs, grad):
    """One forward and one backward to the inputs that require a gradient."""
    trained = [t for t in inputs if t.requires_grad]
    return lambda: torch.autograd.grad(function(*inputs), trained, grad)


def group_norm_cases(shape, memory_format):
    x = torch.randn(shape).to(memory_format=memory_format).requires_grad_()
    weight, bias = torch.randn(2, shape[1])  # frozen, as under a LoRA
    inputs = (x, weight, bias, torch.randn(shape[:2], requires_grad=True))
    grad = torch.randn(shape).to(memory_format=memory_format)
    columns = {"op": "group_norm_silu", "shape": str(shape), "format": str(memory_format).removeprefix("torch.")}
    cases = pair(columns, group_norm_op, group_norm_chain, inputs, grad)
    return [*cases, Case("rftcore, in a block", lambda: group_norm_in_a_block(*inputs, grad), columns)]


@torch.no_grad()
def group_norm_in_a_block(x, weight, bias, channel_bias, grad):
    tensors = (x, weight, bias, channel_bias, None, None)
    _, *statistics = group_norm_silu_forward(*tensors, GROUPS, EPS, True, "cpu")
    needs = (True, False, False, True, False, False)
    group_norm_silu_backward(grad, *tensors, GROUPS, EPS, True, *statistics, "cpu", needs)


def geglu_cases(shape):
    u = torch.randn(shape, requires_grad=True)
    columns = {"op": "geglu", "shape": str(shape), "format": "contiguous_format"}
    return pair(columns, ops.geglu, geglu_chain, (u,), torch.randn(*shape[:-1], shape[-1] // 2))


def lora_chain(x, norm_weight, norm_bias, weights, *adapters):
    """As diffusers' Attention and PEFT compute queries, keys and values from hidden states."""
    n = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, EPS)
    outputs = []
    for weight, a, b in zip(weights, adapters[::2], adapters[1::2], strict=True):
        outputs.append(F.linear(n, weight) + F.linear(F.linear(n, a), b) * 1.0)
    return torch.cat(outputs, dim=-1)


def lora_op(x, norm_weight, norm_bias, weights, *adapters):
    projections = [
        ops.Projection(weight, None, (ops.Adapter(a, b, 1.0),))
        for weight, a, b in zip(weights, adapters[::2], adapters[1::2], strict=True)
    ]
    return torch.cat(ops.lora_linears(x, projections, ops.Norm(norm_weight, norm_bias, EPS)), dim=-1)


def lora_cases(shape, rank):
    width = shape[-1]
    x, norm = torch.randn(shape, requires_grad=True), torch.randn(2, width)
    adapters = [torch.randn(size) for _ in range(3) for size in ((rank, width), (width, rank))]
    inputs = (x, *norm, torch.randn(3, width, width) / width**0.5, *(t.requires_grad_() for t in adapters))
    columns = {"op": f"lora_linears, q, k, v, r={rank}", "shape": str(shape), "format": "contiguous_format"}
    return pair(columns, lora_op, lora_chain, inputs, torch.randn(*shape[:-1], 3 * width))


def pair(columns, op, chain, inputs, grad):
    return [Case("rftcore", step(op, inputs, grad), columns), Case("eager", step(chain, inputs, grad), columns)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    resnet = [(2, 128, 64, 64), (2, 256, 32, 32), (2, 320, 64, 64), (2, 640, 32, 32)]
    pairs = [group_norm_cases(s, f) for s in resnet for f in (torch.contiguous_format, torch.channels_last)]
    pairs += [geglu_cases(shape) for shape in ((2, 4096, 1024), (2, 1024, 2048), (2, 4096, 2560))]
    pairs += [lora_cases(shape, rank) for shape in ((2, 4096, 320), (2, 1024, 640)) for rank in (4, 16)]
    rows = []
    for cases in pairs:
        found = compare(cases, repeats=arguments.repeats, warmup=5)
        eager = next(row for row in found if row["case"] == "eager")
        rows += [{**row, "speedup": eager["median_s"] / row["median_s"]} for row in found]
    report("ops", rows, vars(arguments))


if __name__ == "__main__":
    main()
