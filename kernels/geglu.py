"""geglu: y = hidden * gelu(gate) with the exact (erf) GELU, and its backward from u = (hidden, gate).

Elementwise and bound by memory: each program takes a tile of rows and columns, 16 bytes a thread from either half.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from rftcore.kernels.launch import Launch, cdiv

_INVERSE_ROOT_2 = tl.constexpr(0.7071067811865476)
_INVERSE_ROOT_2_PI = tl.constexpr(0.3989422804014327)


@dataclass(frozen=True)
class Config:
    """A program's tile."""

    rows: int
    columns: int
    num_warps: int


def heuristic(columns: int) -> Config:
    """256 columns divide the widths of SD (1280, 2560, 5120); 8 values a thread are 16 bytes in half precision."""
    return Config(4, 256, 4) if columns >= 256 else Config(16, 64, 4)


@triton.jit
def normal_cdf(x):
    """Of the standard normal distribution, x in fp32."""
    return 0.5 * (1.0 + tl.erf(x * _INVERSE_ROOT_2))


@triton.jit
def gelu_slope(x, cdf):
    """The derivative of gelu at x, where `cdf` is normal_cdf(x)."""
    return cdf + x * _INVERSE_ROOT_2_PI * tl.exp(-0.5 * x * x)


@triton.jit
def _tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets of this program's tile of a (rows, columns) matrix: row and column, int64 and int32, and which exist."""
    across = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row.to(tl.int64), column, (row < rows) & (column < columns)


@triton.jit
def _forward_kernel(u, y, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, exists = _tile(rows, columns, ROWS, COLUMNS)
    source = u + row * (2 * columns) + column
    hidden = tl.load(source, exists).to(tl.float32)
    gate = tl.load(source + columns, exists).to(tl.float32)
    value = hidden * (gate * normal_cdf(gate))
    tl.store(y + row * columns + column, value.to(y.dtype.element_ty), exists)


@triton.jit
def _backward_kernel(grad_y, u, grad_u, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, exists = _tile(rows, columns, ROWS, COLUMNS)
    place = row * (2 * columns) + column
    hidden = tl.load(u + place, exists).to(tl.float32)
    gate = tl.load(u + place + columns, exists).to(tl.float32)
    grad = tl.load(grad_y + row * columns + column, exists).to(tl.float32)
    cdf = normal_cdf(gate)
    dtype = grad_u.dtype.element_ty
    tl.store(grad_u + place, (grad * (gate * cdf)).to(dtype), exists)
    tl.store(grad_u + place + columns, (grad * hidden * gelu_slope(gate, cdf)).to(dtype), exists)


def forward(u, y, config: Config | None = None) -> Launch:
    """u (M, 2D) and y (M, D), contiguous, of one dtype: fp32, bf16 or fp16."""
    return _launch(_forward_kernel, {"u": u, "y": y}, y, config)


def backward(grad_y, u, grad_u, config: Config | None = None) -> Launch:
    """grad_y (M, D), u and grad_u (M, 2D), contiguous, of one dtype: fp32, bf16 or fp16."""
    return _launch(_backward_kernel, {"grad_y": grad_y, "u": u, "grad_u": grad_u}, grad_y, config)


def _launch(kernel, tensors, like, config):
    rows, columns = like.shape
    config = config or heuristic(columns)
    grid = (cdiv(rows, config.rows) * cdiv(columns, config.columns),)
    sizes = {"rows": rows, "columns": columns, "ROWS": config.rows, "COLUMNS": config.columns}
    return Launch(kernel, grid, {**tensors, **sizes}, config.num_warps)
