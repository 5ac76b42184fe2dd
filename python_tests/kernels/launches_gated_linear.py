"""The launches of gated_linear on SD1.5's and SDXL's shapes, to be compiled ahead of time."""

from __future__ import annotations

import dataclasses

import torch

from rftcore.kernels import gated_linear

SHAPES = [(32768, 320, 1280), (8192, 640, 2560), (2048, 1280, 5120), (16384, 640, 2560), (4096, 1280, 5120)]


def launches(capability: int) -> dict:
    found = {}
    for shape in SHAPES:
        found |= _both(shape, torch.bfloat16, "newest", normed=True)
    found |= _both(SHAPES[0], torch.bfloat16, "newest", normed=False)
    found |= _both(SHAPES[0], torch.bfloat16, "newest", normed=True, low_rank=torch.float32)
    found |= _both(SHAPES[0], torch.float16, "newest", normed=True, low_rank=torch.float32)
    found |= _both(SHAPES[2], torch.bfloat16, "newest", normed=True, low_rank=torch.bfloat16)
    found |= _both(SHAPES[0], torch.float32, None, normed=True)
    matrix_units = dataclasses.replace(gated_linear.heuristic(4, SHAPES[0][1]), precision="tf32x3")
    found |= _both(SHAPES[0], torch.float32, "any", normed=True, low_rank=torch.float32, config=matrix_units)
    return found


def _both(shape, dtype, meant, *, normed, low_rank=None, config=None) -> dict:
    """The forward that keeps u and does not, and the backward."""
    rows, width, columns = shape

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, weight, bias = empty(rows, width), empty(2 * columns, width), empty(2 * columns)
    y, u = empty(rows, columns), empty(rows, 2 * columns)
    terms = {"config": config}
    if normed:
        statistics = [empty(rows, dtype=torch.float32) for _ in range(2)]
        terms["norm"] = gated_linear.Norm(*statistics, empty(width), empty(width))
    if low_rank:
        terms["low_rank"] = gated_linear.LowRank(empty(rows, 8, dtype=low_rank), empty(2 * columns, 8), 0.5)
    case = f"{dtype}, {shape}{', normed' * normed}{f', low rank in {low_rank}' if low_rank else ''}"
    return {
        f"forward, {case}": (gated_linear.forward(x, weight, bias, y, **terms), meant),
        f"forward with u, {case}": (gated_linear.forward(x, weight, bias, y, u=u, **terms), meant),
        f"backward, {case}": (gated_linear.backward(y, x, weight, bias, u, **terms), meant),
    }
