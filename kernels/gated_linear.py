"""gated_linear: the feed-forward's first projection and its GEGLU as one, LayerNorm before and LoRA beside it.

    n = (x - mean) * inverse_deviation * norm_weight + norm_bias     or n = x
    u = n weight^T + bias + scale * h b^T                            (M, 2D): hidden, gate
    y = hidden * gelu(gate)                                          (M, D), the exact (erf) GELU

u stays on chip, forward and backward: the backward multiplies again and writes the gradient of u. A tile interleaves
the weight's rows of hidden and gate, so that one product gives both and each thread holds its pairs in neighbouring
registers. n and u are rounded to x's dtype, as PyTorch's layers do, whether or not u is written: kept and recomputed
values are the same bits. Bound by the matrix units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from rftcore.kernels.geglu import gelu_slope, normal_cdf
from rftcore.kernels.launch import Launch, cdiv


@dataclass(frozen=True)
class Config:
    """A program's tile: rows of x, columns of y (each a hidden and a gate), values of K a step.

    Attributes:
        group: tiles of rows that run side by side, so that they find the same weights in the L2 cache.
        precision: of fp32 products: "ieee", or "tf32x3" on the matrix units.
    """

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int
    group: int = 8
    precision: str = "ieee"


class Counts(NamedTuple):
    """What one call must move and compute."""

    bytes: int
    flops: int


def heuristic(itemsize: int, width: int) -> Config:
    """It must not look at the number of rows: a row's result does not depend on the rows beside it.

    Where K is short, GELU and norm take as long as the products: a tile that leaves room for a second program on an
    sm_90, to overlap them. Where K is long, the products do: a tile that reads fewer bytes from the L2 cache for each.
    By count of instructions and bytes; not measured.
    """
    if itemsize == 4:
        return Config(128, 32, 16, 8, 3)
    return Config(128, 128 if width >= 1024 else 64, 32, 8, 4)


@triton.jit
def _tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """Which tile this program computes: GROUP tiles of rows before the next of columns."""
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    first = tl.program_id(0) // (GROUP * across) * GROUP
    place = tl.program_id(0) % (GROUP * across)
    size = tl.minimum(down - first, GROUP)
    return first + place % size, place // size


@triton.jit
def _tile_of_u(
    x, mean, inverse_deviation, norm_weight, norm_bias, weight, h, b, scale,
    rows, width, columns, rank, row_tile, column_tile,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, RANK: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """(ROWS, 2 COLUMNS) of u, hidden and gate in turn; in fp32, without the bias."""
    dtype: tl.constexpr = x.dtype.element_ty
    # Past the edges the last row and column are computed again and not stored: the loop needs no masks for them.
    row = tl.minimum(row_tile * ROWS + tl.arange(0, ROWS), rows - 1).to(tl.int64)
    pair = tl.arange(0, 2 * COLUMNS)
    source = tl.minimum(column_tile * COLUMNS + pair // 2, columns - 1).to(tl.int64) + pair % 2 * columns

    if h is not None:
        # Finer than u's rounding.
        narrow: tl.constexpr = "tf32" if dtype == tl.bfloat16 else "tf32x3"
        low: tl.constexpr = PRECISION if dtype == tl.float32 else narrow
        u = _low_rank(h, b, scale, row, source, rank, RANK, low)
    else:
        u = tl.zeros((ROWS, 2 * COLUMNS), tl.float32)

    if mean is not None:
        factor = tl.load(inverse_deviation + row)[:, None]
        shift = -tl.load(mean + row)[:, None] * factor
    inner = tl.arange(0, INNER)
    left_place = x + row[:, None] * width + inner[None, :]
    right_place = weight + source[None, :] * width + inner[:, None]
    for start in range(0, width, INNER):
        k = start + inner
        if EVEN:
            left = tl.load(left_place + start)
            right = tl.load(right_place + start)
        else:
            left = tl.load(left_place + start, k[None, :] < width, other=0.0)
            right = tl.load(right_place + start, k[:, None] < width, other=0.0)
        if mean is not None:
            # Two multiply-adds a value: these instructions, for every tile of columns again, are what a norm costs.
            n = left.to(tl.float32) * factor + shift
            if norm_weight is not None:
                n *= _vector(norm_weight, k, width, EVEN)[None, :]
            if norm_bias is not None:
                n += _vector(norm_bias, k, width, EVEN)[None, :]
            # Zeroed past the end: rounded to fp16 it may be infinite there, and times a weight of 0 not a number.
            left = (n if EVEN else tl.where(k[None, :] < width, n, 0.0)).to(dtype)
        u = tl.dot(left, right, u, input_precision=PRECISION)
    return u


@triton.jit
def _low_rank(h, b, scale, row, source, rank, RANK: tl.constexpr, PRECISION: tl.constexpr):
    """scale * h b^T for these rows of h and of b, in fp32; a matrix unit wants 16 ranks at least."""
    r = tl.arange(0, RANK)
    left = tl.load(h + row[:, None] * rank + r[None, :], r[None, :] < rank, other=0.0)
    right = tl.load(b + source[None, :] * rank + r[:, None], r[:, None] < rank, other=0.0)
    # The small factor takes the scale: the product stays where the sum over K begins.
    left = (left.to(tl.float32) * scale).to(left.dtype)
    return tl.dot(left, right.to(left.dtype), input_precision=PRECISION)


@triton.jit
def _vector(values, k, width, EVEN: tl.constexpr):
    """Of the norm's weight or bias, in fp32."""
    if EVEN:
        loaded = tl.load(values + k)
    else:
        loaded = tl.load(values + k, k < width, other=0.0)
    return loaded.to(tl.float32)


@triton.jit
def _halves(u, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first and the last columns of a tile: they lie in different registers, nothing moves."""
    return u.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def _quarters(u, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A GELU takes registers: a quarter of a tile at a time, they leave room for a second program on the chip."""
    left, right = _halves(u, ROWS, COLUMNS)
    return _halves(left, ROWS, COLUMNS // 2) + _halves(right, ROWS, COLUMNS // 2)


@triton.jit
def _hidden_and_gate(u, bias, columns, column, dtype: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of (ROWS, COLUMNS) pairs, in fp32, but rounded to `dtype`."""
    hidden, gate = u.reshape(ROWS, COLUMNS, 2).split()
    if bias is not None:
        hidden += tl.load(bias + column, column < columns).to(tl.float32)
        gate += tl.load(bias + columns + column, column < columns).to(tl.float32)
    return hidden.to(dtype).to(tl.float32), gate.to(dtype).to(tl.float32)


@triton.jit
def _write_y(u, bias, y, u_out, rows, columns, row_tile, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """GEGLU of (ROWS, COLUMNS) pairs, of the columns of y from `first`."""
    row, column, exists = _places(rows, columns, row_tile, first, ROWS, COLUMNS)
    hidden, gate = _hidden_and_gate(u, bias, columns, column, y.dtype.element_ty, ROWS, COLUMNS)
    dtype = y.dtype.element_ty
    if u_out is not None:
        place = u_out + row * (2 * columns) + column
        tl.store(place, hidden.to(dtype), exists)
        tl.store(place + columns, gate.to(dtype), exists)
    tl.store(y + row * columns + column, (hidden * (gate * normal_cdf(gate))).to(dtype), exists)


@triton.jit
def _write_grad_u(u, bias, grad_y, grad_u, rows, columns, row_tile, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The backward of GEGLU at (ROWS, COLUMNS) pairs, of the columns of y from `first`."""
    row, column, exists = _places(rows, columns, row_tile, first, ROWS, COLUMNS)
    hidden, gate = _hidden_and_gate(u, bias, columns, column, grad_u.dtype.element_ty, ROWS, COLUMNS)
    grad = tl.load(grad_y + row * columns + column, exists).to(tl.float32)
    cdf = normal_cdf(gate)
    dtype = grad_u.dtype.element_ty
    place = grad_u + row * (2 * columns) + column
    tl.store(place, (grad * (gate * cdf)).to(dtype), exists)
    tl.store(place + columns, (grad * hidden * gelu_slope(gate, cdf)).to(dtype), exists)


@triton.jit
def _places(rows, columns, row_tile, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows (int64) of this tile and columns from `first`, and which exist."""
    row = row_tile * ROWS + tl.arange(0, ROWS)[:, None]
    column = first + tl.arange(0, COLUMNS)[None, :]
    return row.to(tl.int64), column, (row < rows) & (column < columns)


@triton.jit
def _forward_kernel(
    x, mean, inverse_deviation, norm_weight, norm_bias, weight, bias, h, b, scale, y, u, rows, width, columns, rank,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = _tile(rows, columns, ROWS, COLUMNS, GROUP)
    tile = _tile_of_u(
        x, mean, inverse_deviation, norm_weight, norm_bias, weight, h, b, scale,
        rows, width, columns, rank, row_tile, column_tile, ROWS, COLUMNS, INNER, RANK, PRECISION, EVEN,
    )  # fmt: skip
    tiles = _quarters(tile, ROWS, 2 * COLUMNS)
    for i in tl.static_range(4):
        first = column_tile * COLUMNS + i * (COLUMNS // 4)
        _write_y(tiles[i], bias, y, u, rows, columns, row_tile, first, ROWS, COLUMNS // 4)


@triton.jit
def _backward_kernel(
    grad_y, x, mean, inverse_deviation, norm_weight, norm_bias, weight, bias, h, b, scale, grad_u,
    rows, width, columns, rank,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr,
    PRECISION: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = _tile(rows, columns, ROWS, COLUMNS, GROUP)
    tile = _tile_of_u(
        x, mean, inverse_deviation, norm_weight, norm_bias, weight, h, b, scale,
        rows, width, columns, rank, row_tile, column_tile, ROWS, COLUMNS, INNER, RANK, PRECISION, EVEN,
    )  # fmt: skip
    tiles = _quarters(tile, ROWS, 2 * COLUMNS)
    for i in tl.static_range(4):
        first = column_tile * COLUMNS + i * (COLUMNS // 4)
        _write_grad_u(tiles[i], bias, grad_y, grad_u, rows, columns, row_tile, first, ROWS, COLUMNS // 4)


class Norm(NamedTuple):
    """The LayerNorm before the projection: statistics (M,) in fp32; weight and bias (K,) of any dtype, or None."""

    mean: Any
    inverse_deviation: Any
    weight: Any = None
    bias: Any = None


class LowRank(NamedTuple):
    """scale * h b^T beside the projection: h (M, R), contiguous, in fp32 or x's dtype; b (2D, R), contiguous, R <= 64.

    The product is h's dtype's: b and scale * h are rounded to it. h in fp32 beside x in bf16 is multiplied in TF32,
    finer than u's rounding; beside x in fp16, in three products of TF32.
    """

    h: Any
    b: Any
    scale: float


def forward(
    x,
    weight,
    bias,
    y,
    *,
    norm: Norm | None = None,
    low_rank: LowRank | None = None,
    u=None,
    config: Config | None = None,
) -> Launch:
    """y (M, D), and u (M, 2D) where it is given.

    x (M, K), weight (2D, K), y and u (written): contiguous, of one dtype: fp32, bf16 or fp16.
    bias: (2D,), of any of these dtypes, or None. The bits of y do not depend on whether u is written.
    """
    return _launch(_forward_kernel, {"y": y, "u": u}, x, weight, bias, norm, low_rank, config)


def backward(
    grad_y,
    x,
    weight,
    bias,
    grad_u,
    *,
    norm: Norm | None = None,
    low_rank: LowRank | None = None,
    config: Config | None = None,
) -> Launch:
    """grad_u (M, 2D) from grad_y (M, D), with u computed again: the same bits as in the forward of the same config.

    grad_y, x (M, K), weight (2D, K) and grad_u (written): contiguous, of one dtype. The rest as in `forward`.
    """
    return _launch(_backward_kernel, {"grad_y": grad_y, "grad_u": grad_u}, x, weight, bias, norm, low_rank, config)


def _launch(kernel, tensors, x, weight, bias, norm, low_rank, config):
    (rows, width), columns = x.shape, weight.shape[0] // 2
    config = config or heuristic(x.element_size(), width)
    mean, inverse_deviation, norm_weight, norm_bias = norm or (None,) * 4
    h, b, scale = low_rank or (None, None, 0.0)
    rank = 0 if h is None else h.shape[1]
    arguments = {
        **tensors,
        "x": x,
        "mean": mean,
        "inverse_deviation": inverse_deviation,
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "weight": weight,
        "bias": bias,
        "h": h,
        "b": b,
        "scale": float(scale),
        "rows": rows,
        "width": width,
        "columns": columns,
        "rank": rank,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "INNER": config.inner,
        "GROUP": config.group,
        "RANK": max(16, triton.next_power_of_2(rank)),
        "PRECISION": config.precision,
        "EVEN": width % config.inner == 0,
    }
    grid = (cdiv(rows, config.rows) * cdiv(columns, config.columns),)
    return Launch(kernel, grid, arguments, config.num_warps, config.num_stages)


def count_forward(
    rows: int, width: int, columns: int, itemsize: int, *, normed: bool = True, rank: int = 0, keeps_u: bool = False
) -> Counts:
    """x, weight and bias in, y out, u out where it is kept; the low-rank term in fp32. Of the FLOPs, the products'."""
    values = rows * width + 2 * columns * (width + 1) + rows * columns * (3 if keeps_u else 1)
    return _count(rows, width, columns, itemsize, values, normed, rank)


def count_backward(rows: int, width: int, columns: int, itemsize: int, *, normed: bool = True, rank: int = 0) -> Counts:
    """x, weight, bias and grad_y in, grad_u out; the low-rank term in fp32. Of the FLOPs, the products'."""
    values = rows * width + 2 * columns * (width + 1) + rows * columns * 3
    return _count(rows, width, columns, itemsize, values, normed, rank)


def _count(rows, width, columns, itemsize, values, normed, rank):
    norm = 8 * rows + 2 * width * itemsize if normed else 0
    low_rank = 4 * rank * (rows + 2 * columns)
    return Counts(values * itemsize + norm + low_rank, 2 * rows * 2 * columns * (width + rank))
