"""layer_norm: the statistics of rows, and the backward to the input where weight and bias are frozen.

Bound by memory: a program holds whole rows on chip and reads each value once. Rows are padded to a power of two by
masks: the lanes past the end move nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl

from rftcore.kernels.launch import Launch, cdiv


@dataclass(frozen=True)
class Config:
    """Rows a program holds."""

    rows: int
    num_warps: int


class Counts(NamedTuple):
    """What one call must move and compute."""

    bytes: int
    flops: int


def heuristic(width: int) -> Config:
    """About 4096 values a program: two to four 16-byte loads in flight for each thread, in half precision."""
    return Config(max(1, min(16, 4096 // triton.next_power_of_2(width))), 4 if width <= 4096 else 8)


@triton.jit
def _rows(rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """This program's rows (int64), its columns, and what exists: of the rows, of the columns, of both."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]
    inside, within = row < rows, column < width
    return row.to(tl.int64), column, inside, within, inside[:, None] & within


@triton.jit
def _statistics_kernel(x, mean, inverse_deviation, rows, width, eps, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    row, column, inside, within, exists = _rows(rows, width, ROWS, WIDTH)
    value = tl.load(x + row[:, None] * width + column, exists, other=0.0).to(tl.float32)
    centre = tl.sum(value, 1) / width
    # From the centred row, as E[x^2] - E[x]^2 would lose a small variance beside a large mean.
    value = tl.where(within, value - centre[:, None], 0.0)
    tl.store(mean + row, centre, inside)
    tl.store(inverse_deviation + row, tl.rsqrt(tl.sum(value * value, 1) / width + eps), inside)


@triton.jit
def _backward_kernel(
    grad_n, x, mean, inverse_deviation, weight, addend, grad_x, rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    row, column, inside, within, exists = _rows(rows, width, ROWS, WIDTH)
    place = row[:, None] * width + column
    # Zero where nothing exists, so that the sums over a row need no mask.
    grad = tl.load(grad_n + place, exists, other=0.0).to(tl.float32)
    value = tl.load(x + place, exists, other=0.0).to(tl.float32)
    if weight is not None:
        grad *= tl.load(weight + column, within, other=0.0).to(tl.float32)
    scale = tl.load(inverse_deviation + row, inside, other=0.0)[:, None]
    value = (value - tl.load(mean + row, inside, other=0.0)[:, None]) * scale
    along = tl.sum(grad * value, 1)[:, None] / width
    result = scale * (grad - tl.sum(grad, 1)[:, None] / width - value * along)
    if addend is not None:
        result += tl.load(addend + place, exists, other=0.0).to(tl.float32)
    tl.store(grad_x + place, result.to(grad_x.dtype.element_ty), exists)


def statistics(x, mean, inverse_deviation, eps: float, config: Config | None = None) -> Launch:
    """The mean of each row of x, and 1 / sqrt(variance + eps).

    x: (M, K), contiguous, fp32, bf16 or fp16. mean, inverse_deviation: (M,), fp32, written.
    """
    tensors = {"x": x, "mean": mean, "inverse_deviation": inverse_deviation}
    return _launch(_statistics_kernel, tensors, x, config, {"eps": float(eps)})


def backward(grad_n, x, mean, inverse_deviation, weight, grad_x, addend=None, config: Config | None = None) -> Launch:
    """The gradient of x from that of n = (x - mean) * inverse_deviation * weight + bias, plus `addend`.

    grad_n, x, grad_x (written), addend or None: (M, K), contiguous, of one dtype: fp32, bf16 or fp16.
    mean, inverse_deviation: (M,), fp32. weight: (K,), of any of these dtypes, or None: 1.
    grad_x may be the same tensor as grad_n or as addend.
    """
    tensors = {"grad_n": grad_n, "x": x, "mean": mean, "inverse_deviation": inverse_deviation}
    tensors |= {"weight": weight, "addend": addend, "grad_x": grad_x}
    return _launch(_backward_kernel, tensors, x, config, {})


def _launch(kernel, tensors, x, config, numbers):
    rows, width = x.shape
    config = config or heuristic(width)
    constants = {"ROWS": config.rows, "WIDTH": triton.next_power_of_2(width)}
    arguments = {**tensors, "rows": rows, "width": width, **numbers, **constants}
    return Launch(kernel, (cdiv(rows, config.rows),), arguments, config.num_warps)


def count_statistics(rows: int, width: int, itemsize: int) -> Counts:
    """x in, two numbers a row out; a sum, a difference, a square and its sum for each value."""
    return Counts(rows * width * itemsize + 8 * rows, 4 * rows * width)


def count_backward(rows: int, width: int, itemsize: int, *, weight_itemsize: int = 0, addend: bool = False) -> Counts:
    """grad_n, x and the addend in, grad_x out; a weight is read once (0 bytes a value: none)."""
    values = rows * width
    moved = (3 + addend) * values * itemsize + 8 * rows + width * weight_itemsize
    return Counts(moved, (9 + (weight_itemsize > 0) + addend) * values)
