"""Sizes as one or two powers of two: 40 in 32 + 16, 77 in 64 + 16, 80 = 64 + 16, 160 = 128 + 32; the rest is masked.

A kernel keeps the pieces of a tile apart and sums their products; a second piece of 0 is none, and its variables then
repeat the first's.
"""

from __future__ import annotations

import triton
import triton.language as tl

SMALLEST = 16
"""Side of the smallest tile that a matrix instruction takes."""


def pieces(size: int) -> tuple[int, int]:
    """The least padded sum of two powers of two that holds `size`; one power, and 0, where two hold no less."""
    first = max(SMALLEST, 1 << (size.bit_length() - 1))
    if first >= size:
        return first, 0
    second = max(SMALLEST, 1 << (size - first - 1).bit_length())
    return (2 * first, 0) if second >= first else (first, second)


@triton.jit
def _load_piece(pointer, row, stride, count, D, START: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    column = START + tl.arange(0, WIDTH)[None, :]
    source = pointer + row[:, None] * stride + column
    if MASKED:
        if START + WIDTH > D:
            piece = tl.load(source, (row[:, None] < count) & (column < D), other=0.0)
        else:
            piece = tl.load(source, row[:, None] < count, other=0.0)
    elif START + WIDTH > D:
        # Neighbouring columns are another head's, or nobody's.
        piece = tl.load(source, column < D, other=0.0)
    else:
        piece = tl.load(source)
    return piece


@triton.jit
def load(pointer, row, stride, count, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, MASKED: tl.constexpr):
    """Rows of D columns in two pieces of columns; zero beyond D and, where MASKED, in rows from `count` on."""
    first = _load_piece(pointer, row, stride, count, D, 0, FIRST, MASKED)
    second = first
    if SECOND > 0:
        second = _load_piece(pointer, row, stride, count, D, FIRST, SECOND, MASKED)
    return first, second


@triton.jit
def _store_piece(pointer, row, stride, count, piece, D, START: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    column = START + tl.arange(0, WIDTH)[None, :]
    target = pointer + row[:, None] * stride + column
    value = piece.to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(target, value, (row[:, None] < count) & (column < D))
    elif START + WIDTH > D:
        tl.store(target, value, column < D)
    else:
        tl.store(target, value)


@triton.jit
def store(
    pointer, row, stride, count, first, second,
    D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What `load` reads."""
    _store_piece(pointer, row, stride, count, first, D, 0, FIRST, MASKED)
    if SECOND > 0:
        _store_piece(pointer, row, stride, count, second, D, FIRST, SECOND, MASKED)


@triton.jit
def inner(a0, a1, b0, b1, SECOND: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T, fp32: the sum over both pieces of columns."""
    product = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if SECOND > 0:
        product = tl.dot(a1, tl.trans(b1), product, input_precision=PRECISION)
    return product


@triton.jit
def add_product(sum0, sum1, a, b0, b1, SECOND: tl.constexpr, PRECISION: tl.constexpr):
    """sum + a b, for each piece of columns."""
    sum0 = tl.dot(a, b0, sum0, input_precision=PRECISION)
    if SECOND > 0:
        sum1 = tl.dot(a, b1, sum1, input_precision=PRECISION)
    return sum0, sum1


@triton.jit
def zeros(ROWS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """Two pieces of fp32 sums."""
    first = tl.zeros([ROWS, FIRST], tl.float32)
    second = first
    if SECOND > 0:
        second = tl.zeros([ROWS, SECOND], tl.float32)
    return first, second
