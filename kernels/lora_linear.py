"""Projections of one x that share a pass: LayerNorm in front, low-rank adapters and residual behind, one rounding.

y_p = n W_p^T + bias_p + scale_p (n A_p^T) B_p^T + residual, n = norm(x) rounded to x's dtype. Projections, norms and the
places of low-rank columns are as in `projections`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl

from rftcore.kernels.launch import Launch, cdiv
from rftcore.kernels.projections import (
    WIDEST,
    Count,
    adapters_of,
    aligned,
    grouped_tile,
    load_existing,
    low_rank_precision,
    norm_arguments,
    normalised,
    numbered,
    owner,
    pick,
    rounded_to_tf32,
    row_statistics,
)

# Where a kernel has a norm's statistics from.
_GIVEN, _COMPUTED = tl.constexpr(1), tl.constexpr(2)


@dataclass(frozen=True)
class ShrinkConfig:
    """A program's rows, and how much of them a step takes.

    Attributes:
        precision: of products of fp32 values, `tl.dot`'s input_precision.
    """

    rows: int
    depth: int
    num_warps: int = 4
    num_stages: int = 3
    precision: str = "tf32x3"


@dataclass(frozen=True)
class ProjectConfig:
    """A program's tile of the outputs, and how much of x a step takes.

    Attributes:
        group: tiles of rows that pass over all columns together, for what the L2 cache keeps of either side.
        fused: compute the statistics and the low-rank columns here; no `shrink` comes first.
        span: a tile may cross from one projection to the next; else each starts with a tile of its own.
        precision: of products of fp32 values, `tl.dot`'s input_precision.
    """

    rows: int
    columns: int
    depth: int
    group: int = 8
    num_warps: int = 8
    num_stages: int = 3
    fused: bool = False
    span: bool = False
    precision: str = "tf32x3"


@dataclass(frozen=True)
class StripConfig:
    """A program's rows, of which it keeps all of n on chip, and columns of the outputs in each of its steps.

    The statistics and low-rank columns are computed on the way: no `shrink` comes first. For rows that fit: 320 values
    in half precision, with tiles of 128 by 64.

    Attributes:
        parts: programs that share a strip's columns.
        precision: of products of fp32 values, `tl.dot`'s input_precision.
    """

    rows: int
    columns: int
    parts: int = 1
    num_warps: int = 8
    num_stages: int = 2
    precision: str = "tf32x3"
    fused: ClassVar[bool] = True


def shrink_heuristic(itemsize: int) -> ShrinkConfig:
    """By the adapters' itemsize. Few rows a program, so that many are in flight: it is bound by reading x."""
    return ShrinkConfig(32, 64) if itemsize == 2 else ShrinkConfig(32, 32, num_stages=2)


def project_heuristic(
    rows: int,
    inner: int,
    widths: Sequence[int],
    ranks: Sequence[int],
    itemsize: int,
    normed: bool,
    capability: int = 80,
) -> ProjectConfig:
    """Tiles for wgmma with two groups of warps.

    The kind of config, its depth and whether it is fused decide how a value is summed and rounded: none depends on
    `rows`.
    """
    if itemsize == 4:
        return ProjectConfig(64, 64, 32, num_warps=4, num_stages=2)
    low = sum(ranks)
    if capability >= 90 and normed and 16 <= inner <= 320 and low <= WIDEST:
        # sm_80 has too few registers. Strips too few for an H100's multiprocessors share their columns.
        tiles = sum(cdiv(width, 64) for width in widths)
        return StripConfig(128, 64, parts=min(tiles, cdiv(132, max(cdiv(rows, 128), 1))))
    # One more pass over x in L2 is cheaper than a launch that reads it from memory, where few tiles share a row. The
    # low-rank columns alone cost no pass.
    fused = low <= 16 and (inner <= 320 or not normed)
    span = len(widths) > 1 and low <= WIDEST and any(width % 128 for width in widths)
    if rows <= 1024:
        return ProjectConfig(64, 64, 64, num_warps=4, num_stages=4, fused=fused, span=span)
    return ProjectConfig(128, 128, 64, fused=fused, span=span)


@triton.jit
def _shrink_kernel(
    x, mean, inverse_deviation, norm_weight, norm_bias, eps, a0, a1, a2, h,
    rows, inner, rank0, rank1, rank2,
    COUNT: tl.constexpr, NORM: tl.constexpr, RANKS: tl.constexpr, A_ALIGNED: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    exists = row < rows
    # Rows that do not exist are copies of the last: no load has a mask for them.
    row = tl.minimum(row, rows - 1)
    source = x + row * inner
    center, inverse = 0.0, 1.0
    if NORM == _GIVEN:
        center, inverse = tl.load(mean + row), tl.load(inverse_deviation + row)
    if NORM == _COMPUTED:
        center, inverse = row_statistics(source, inner, eps, ROWS, DEPTH, EVEN)
        if tl.program_id(1) == 0:
            tl.store(mean + row, center, exists)
            tl.store(inverse_deviation + row, inverse, exists)
    if RANKS > 0:
        ranks = rank0 + rank1 + rank2
        j = tl.program_id(1) * RANKS + tl.arange(0, RANKS)[None, :]
        q = owner(j, rank0, rank1, COUNT)
        line = (j - pick(q, 0, rank0, rank0 + rank1, COUNT)).to(tl.int64)
        source_a = pick(q, a0, a1, a2, COUNT) + line * inner
        if A_ALIGNED:
            source_a = tl.multiple_of(source_a, (16, 16))
        total = tl.zeros((ROWS, RANKS), tl.float32)
        for start in range(0, inner, DEPTH):
            k = start + tl.arange(0, DEPTH)
            across, down = k[None, :], k[:, None]
            if EVEN:
                value = tl.load(source + across)
                a = tl.load(source_a + down, j < ranks, other=0.0)
            else:
                value = tl.load(source + across, across < inner, other=0.0)
                a = tl.load(source_a + down, (j < ranks) & (down < inner), other=0.0)
            if NORM != 0:
                known = None if EVEN else across < inner
                n = normalised(value, center, inverse, norm_weight, norm_bias, across, known)
                value = n.to(x.dtype.element_ty)
            total = tl.dot(value.to(a.dtype), a, total, input_precision=PRECISION)
        tl.store(h + row * ranks + j, total.to(h.dtype.element_ty), exists & (j < ranks))


@triton.jit
def _project_kernel(
    x, mean, inverse_deviation, norm_weight, norm_bias, eps, weight0, weight1, weight2, bias0, bias1, bias2,
    a0, a1, a2, b0, b1, b2, scale0, scale1, scale2, h, residual, y0, y1, y2,
    rows, inner, width0, width1, width2, rank0, rank1, rank2,
    COUNT: tl.constexpr, BIASES: tl.constexpr, NORM: tl.constexpr, FUSED: tl.constexpr, RANKS: tl.constexpr,
    SPAN: tl.constexpr, ALIGNED: tl.constexpr, A_ALIGNED: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, LOW_RANK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    if SPAN:
        column_tiles = tl.cdiv(width0 + width1 + width2, COLUMNS)
    else:
        tiles0, tiles1 = tl.cdiv(width0, COLUMNS), tl.cdiv(width1, COLUMNS)
        column_tiles = tiles0 + tiles1 + tl.cdiv(width2, COLUMNS)
    row_tile, column_tile = grouped_tile(tl.cdiv(rows, ROWS), column_tiles, GROUP)
    row = (row_tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    row_exists = row < rows
    # Rows and columns that do not exist are copies of the last: no load of a product has a mask for them.
    row = tl.minimum(row, rows - 1)

    # p: the projection of each column, a number where a tile has one; column: its place in it.
    if SPAN:
        place = column_tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        p = owner(place, width0, width1, COUNT)
        column = place - pick(p, 0, width0, width0 + width1, COUNT)
        first = owner(column_tile * COLUMNS, width0, width1, COUNT)
        stop = tl.minimum((column_tile + 1) * COLUMNS, width0 + width1 + width2)
        last = owner(stop - 1, width0, width1, COUNT)
        column_exists = place < width0 + width1 + width2
    else:
        p = owner(column_tile, tiles0, tiles1, COUNT)
        first, last = p, p
        column = (column_tile - pick(p, 0, tiles0, tiles0 + tiles1, COUNT)) * COLUMNS
        column += tl.arange(0, COLUMNS)[None, :]
    width = pick(p, width0, width1, width2, COUNT)
    if not SPAN:
        column_exists = column < width

    source = x + row * inner
    source_weight = pick(p, weight0, weight1, weight2, COUNT) + tl.minimum(column, width - 1).to(tl.int64) * inner
    if SPAN and ALIGNED:
        # A choice for each column hides from the compiler that all it chooses from is aligned.
        source_weight = tl.multiple_of(source_weight, (16, 16))
    center, inverse = 0.0, 1.0
    if NORM == _GIVEN:
        center, inverse = tl.load(mean + row), tl.load(inverse_deviation + row)
    if NORM == _COMPUTED:
        center, inverse = row_statistics(source, inner, eps, ROWS, DEPTH, EVEN)
        if mean is not None:
            if column_tile == 0:
                tl.store(mean + row, center, row_exists)
                tl.store(inverse_deviation + row, inverse, row_exists)

    # The low-rank columns of the tile's projections, from `low` on; q: whose each is.
    if RANKS > 0:
        low = pick(first, 0, rank0, rank0 + rank1, COUNT)
        high = pick(last, rank0, rank0 + rank1, rank0 + rank1 + rank2, COUNT)
    if FUSED and RANKS > 0:
        j = low + tl.arange(0, RANKS)[None, :]
        q = owner(j, rank0, rank1, COUNT)
        line = (j - pick(q, 0, rank0, rank0 + rank1, COUNT)).to(tl.int64)
        source_a = pick(q, a0, a1, a2, COUNT) + line * inner
        if A_ALIGNED:
            source_a = tl.multiple_of(source_a, (16, 16))
        shrunk = tl.zeros((ROWS, RANKS), tl.float32)

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, inner, DEPTH):
        k = start + tl.arange(0, DEPTH)
        across, down = k[None, :], k[:, None]
        if EVEN:
            n = tl.load(source + across)
            weight = tl.load(source_weight + down)
        else:
            n = tl.load(source + across, across < inner, other=0.0)
            weight = tl.load(source_weight + down, down < inner, other=0.0)
        if NORM != 0:
            known = None if EVEN else across < inner
            n = normalised(n, center, inverse, norm_weight, norm_bias, across, known).to(x.dtype.element_ty)
        total = tl.dot(n, weight, total, input_precision=PRECISION)
        if FUSED and RANKS > 0:
            if EVEN:
                a = tl.load(source_a + down, j < high, other=0.0)
            else:
                a = tl.load(source_a + down, (j < high) & (down < inner), other=0.0)
            shrunk = tl.dot(n, a.to(n.dtype), shrunk, input_precision=PRECISION)

    if RANKS > 0:
        j = low + tl.arange(0, RANKS)[None, :]
        q = owner(j, rank0, rank1, COUNT)
        if not FUSED:
            shrunk = tl.load(h + row * (rank0 + rank1 + rank2) + j, j < high, other=0.0).to(tl.float32)
        shrunk *= pick(q, scale0, scale1, scale2, COUNT)
        j = low + tl.arange(0, RANKS)[:, None]
        q = owner(j, rank0, rank1, COUNT)
        # A column takes part in its own projection's adapter only.
        theirs = (j < high) & column_exists
        if COUNT > 1:
            theirs &= q == p
        rank = pick(q, rank0, rank1, rank2, COUNT)
        line = j - pick(q, 0, rank0, rank0 + rank1, COUNT)
        b = tl.load(pick(q, b0, b1, b2, COUNT) + column.to(tl.int64) * rank + line, theirs, other=0.0)
        shrunk = shrunk.to(b.dtype)
        if LOW_RANK == "tf32" and b.dtype == tl.float32 and x.dtype.element_ty == tl.float16:
            # In bf16 its own rounding hides what is cut off.
            shrunk, b = rounded_to_tf32(shrunk), rounded_to_tf32(b)
        total = tl.dot(shrunk, b, total, input_precision=LOW_RANK)
    if BIASES != 0:
        has_bias = column_exists
        if BIASES != 2**COUNT - 1:
            mine = pick(p, BIASES & 1, BIASES >> 1 & 1, BIASES >> 2 & 1, COUNT)
            has_bias = column < width * mine
        total += tl.load(pick(p, bias0, bias1, bias2, COUNT) + column, has_bias, other=0.0).to(tl.float32)
    place = row * width + column
    exists = row_exists & column_exists
    if residual is not None:
        total += tl.load(residual + place, exists, other=0.0).to(tl.float32)
    target = pick(p, y0, y1, y2, COUNT) + place
    if SPAN and ALIGNED:
        target = tl.max_contiguous(tl.multiple_of(target, (1, 16)), (1, 16))
    tl.store(target, total.to(y0.dtype.element_ty), exists)


@triton.jit
def _strip_kernel(
    x, mean, inverse_deviation, norm_weight, norm_bias, eps, weight0, weight1, weight2, bias0, bias1, bias2,
    a0, a1, a2, b0, b1, b2, scale0, scale1, scale2, residual, y0, y1, y2,
    rows, inner, width0, width1, width2, rank0, rank1, rank2,
    COUNT: tl.constexpr, BIASES: tl.constexpr, NORM: tl.constexpr, RANKS: tl.constexpr, A_ALIGNED: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    row_exists = row < rows
    row = tl.minimum(row, rows - 1)
    source = x + row * inner
    # A row's size is no power of two: it is a head and a tail that are.
    if NORM != 0:
        center, inverse = row_statistics(source, inner, eps, ROWS, DEPTH, EVEN)
        if mean is not None:
            if tl.program_id(1) == 0:
                tl.store(mean + row, center, row_exists)
                tl.store(inverse_deviation + row, inverse, row_exists)
    k_head = tl.arange(0, HEAD)[None, :]
    head = tl.load(source + k_head)
    if TAIL > 0:
        k_tail = HEAD + tl.arange(0, TAIL)[None, :]
        tail_exists = None if EVEN else k_tail < inner
        tail = load_existing(source + k_tail, tail_exists)
    if NORM != 0:
        head = normalised(head, center, inverse, norm_weight, norm_bias, k_head, None).to(x.dtype.element_ty)
        if TAIL > 0:
            tail = normalised(tail, center, inverse, norm_weight, norm_bias, k_tail, tail_exists)
            tail = tail.to(x.dtype.element_ty)

    if RANKS > 0:
        ranks = rank0 + rank1 + rank2
        j = tl.arange(0, RANKS)[:, None]
        q = owner(j, rank0, rank1, COUNT)
        line = j - pick(q, 0, rank0, rank0 + rank1, COUNT)
        source_a = pick(q, a0, a1, a2, COUNT) + line.to(tl.int64) * inner
        if A_ALIGNED:
            source_a = tl.multiple_of(source_a, (16, 16))
        a = tl.load(source_a + k_head, j < ranks, other=0.0)
        shrunk = tl.dot(a.to(head.dtype), tl.trans(head), input_precision=PRECISION)
        if TAIL > 0:
            a = tl.load(source_a + k_tail, (j < ranks) & (k_tail < inner), other=0.0)
            shrunk = tl.dot(a.to(head.dtype), tl.trans(tail), shrunk, input_precision=PRECISION)
        shrunk = (shrunk * pick(q, scale0, scale1, scale2, COUNT)).to(head.dtype)

    tiles0, tiles1 = tl.cdiv(width0, COLUMNS), tl.cdiv(width1, COLUMNS)
    tiles = tiles0 + tiles1 + tl.cdiv(width2, COLUMNS)
    share = tl.cdiv(tiles, tl.num_programs(1))
    start = tl.program_id(1) * share
    for tile in range(start, tl.minimum(start + share, tiles)):
        p = owner(tile, tiles0, tiles1, COUNT)
        width = pick(p, width0, width1, width2, COUNT)
        first = (tile - pick(p, 0, tiles0, tiles0 + tiles1, COUNT)) * COLUMNS
        down = first + tl.arange(0, COLUMNS)[:, None]
        source_weight = pick(p, weight0, weight1, weight2, COUNT) + tl.minimum(down, width - 1).to(tl.int64) * inner
        # The transposed product: of the two operands it is the second that stays in shared memory, without a copy.
        weight = tl.load(source_weight + k_head)
        total = tl.dot(weight, tl.trans(head), input_precision=PRECISION)
        if TAIL > 0:
            weight = load_existing(source_weight + k_tail, tail_exists)
            total = tl.dot(weight, tl.trans(tail), total, input_precision=PRECISION)
        if RANKS > 0:
            rank = pick(p, rank0, rank1, rank2, COUNT)
            r = tl.arange(0, RANKS)[None, :] - pick(p, 0, rank0, rank0 + rank1, COUNT)
            theirs = (r >= 0) & (r < rank) & (down < width)
            b = tl.load(pick(p, b0, b1, b2, COUNT) + down.to(tl.int64) * rank + r, theirs, other=0.0)
            total = tl.dot(b.to(head.dtype), shrunk, total, input_precision=PRECISION)
        if BIASES != 0:
            has_bias = down < width
            if BIASES != 2**COUNT - 1:
                has_bias = down < width * pick(p, BIASES & 1, BIASES >> 1 & 1, BIASES >> 2 & 1, COUNT)
            total += tl.load(pick(p, bias0, bias1, bias2, COUNT) + down, has_bias, other=0.0).to(tl.float32)
        total = tl.trans(total)
        column = first + tl.arange(0, COLUMNS)[None, :]
        place = row * width + column
        exists = row_exists & (column < width)
        if residual is not None:
            total += tl.load(residual + place, exists, other=0.0).to(tl.float32)
        tl.store(pick(p, y0, y1, y2, COUNT) + place, total.to(y0.dtype.element_ty), exists)


def low_rank_shape(rows: int, projections: Sequence) -> tuple[int, int]:
    """Of h and g: (M, sum of the ranks)."""
    return rows, sum(adapters_of(projections).ranks)


def shrink(
    x, projections: Sequence = (), norm=None, mean=None, inverse_deviation=None, h=None, *,
    given: bool = False, config: ShrinkConfig | None = None,
) -> Launch:  # fmt: skip
    """Writes the statistics of x's norm, unless they are given, and h = norm(x) [A_0; A_1; A_2]^T.

    Shapes: x (M, K); mean and inverse_deviation (M,), fp32, None without a norm; h (M, sum of ranks) in the adapters'
    dtype, or None: the statistics only.
    """
    rows, inner = x.shape
    adapters = adapters_of(projections or [(None, None, ())])
    config = config or shrink_heuristic(x.element_size() if h is None else h.element_size())
    ranks = 0 if h is None else min(adapters.width(span=True), WIDEST)
    arguments = {name: value for name, value in adapters.arguments.items() if name[0] in "ar"}
    arguments |= norm_arguments(x, norm, mean, inverse_deviation) | {"rows": rows, "inner": inner, "h": h}
    arguments |= {"COUNT": max(len(projections), 1)}
    arguments |= {"NORM": 0 if norm is None else (_GIVEN if given else _COMPUTED).value, "RANKS": ranks}
    arguments |= {"EVEN": inner % config.depth == 0, "PRECISION": config.precision}
    arguments |= {"ROWS": config.rows, "DEPTH": config.depth, "A_ALIGNED": aligned(adapters.a)}
    grid = cdiv(rows, config.rows), cdiv(sum(adapters.ranks), ranks) if ranks else 1
    return Launch(_shrink_kernel, grid, arguments, config.num_warps, config.num_stages)


def project(
    x, projections: Sequence, outputs: Sequence, norm=None, mean=None, inverse_deviation=None, h=None, residual=None, *,
    config: ProjectConfig | StripConfig | None = None, capability: int = 80,
) -> Launch:  # fmt: skip
    """Writes all projections of norm(x) to `outputs`, (M, N_p) each.

    Where the config is fused, the statistics are written, if given, and h is not read; else they and h are `shrink`'s.

    Shapes: x (M, K); mean and inverse_deviation (M,), fp32; h (M, sum of ranks); residual (M, N), of one projection.
    """
    adapters = adapters_of(projections)
    if config is None:
        config = default_config(x, projections, norm, capability)
    if residual is not None and len(projections) != 1:
        raise ValueError(f"project: residual is given with {len(projections)} projections; it is added to one.")
    rows, inner = x.shape
    widths = [weight.shape[0] for weight, *_ in projections]
    biases = [bias for _, bias, *_ in projections]
    present = [bias for bias in biases if bias is not None]
    arguments = norm_arguments(x, norm, mean, inverse_deviation) | adapters.arguments
    arguments |= {"rows": rows, "inner": inner, "residual": residual}
    arguments |= numbered("weight", [weight for weight, *_ in projections]) | numbered("y", outputs)
    arguments |= numbered("bias", [bias if bias is not None else present[0] for bias in biases] if present else [])
    arguments |= numbered("width", widths, 0)
    arguments |= {"COUNT": len(projections), "BIASES": sum(1 << i for i, bias in enumerate(biases) if bias is not None)}
    arguments |= {"PRECISION": config.precision, "ROWS": config.rows, "COLUMNS": config.columns}
    arguments |= {"A_ALIGNED": aligned(adapters.a)}
    options = config.num_warps, config.num_stages
    if isinstance(config, StripConfig):
        head, tail = strip_parts(inner)
        ranks = adapters.width(span=True)
        if ranks > WIDEST:
            raise ValueError(
                f"project: the adapters have rank {sum(adapters.ranks)} together; a StripConfig takes {WIDEST}. "
                "Give a ProjectConfig."
            )
        # In the shape of a tile of the weights the low-rank products need no registers for another layout of n.
        ranks = max(ranks, min(config.columns, WIDEST)) if ranks else 0
        arguments |= {"NORM": norm is not None, "RANKS": ranks, "EVEN": head + tail == inner}
        arguments |= {"HEAD": head, "TAIL": tail, "DEPTH": tail or min(head, 64)}
        return Launch(_strip_kernel, (cdiv(rows, config.rows), config.parts), arguments, *options)
    span, low_rank = config.span, low_rank_precision(x, adapters, config.precision)
    arguments |= {
        "LOW_RANK": low_rank,
        "NORM": 0 if norm is None else (_COMPUTED if config.fused else _GIVEN).value,
        "FUSED": config.fused,
    }
    arguments |= {"h": None if config.fused else h, "RANKS": adapters.width(span), "SPAN": span}
    arguments |= {"ALIGNED": aligned([weight for weight, *_ in projections], outputs)}
    arguments |= {"EVEN": inner % config.depth == 0, "DEPTH": config.depth, "GROUP": config.group}
    tiles = cdiv(sum(widths), config.columns) if span else sum(cdiv(width, config.columns) for width in widths)
    return Launch(_project_kernel, (cdiv(rows, config.rows) * tiles,), arguments, *options)


def strip_parts(inner: int) -> tuple[int, int]:
    """The powers of two that a row of a strip is held in: the largest one in it, and one that has the rest, or 0."""
    if inner < 16:
        raise ValueError(f"project: rows of {inner} are less than a StripConfig takes, 16; give a ProjectConfig.")
    head = 1 << (inner.bit_length() - 1)
    return head, max(16, triton.next_power_of_2(inner - head)) if inner > head else 0


def default_config(x, projections: Sequence, norm, capability: int = 80) -> ProjectConfig | StripConfig:
    """What `project` takes where it is given none: the caller sees by it whether a `shrink` comes first."""
    widths = [weight.shape[0] for weight, *_ in projections]
    ranks = adapters_of(projections).ranks
    return project_heuristic(*x.shape, widths, ranks, x.element_size(), norm is not None, capability)


def counts(
    rows: int, inner: int, widths: Sequence[int], ranks: Sequence[int], itemsize: int, adapter_itemsize: int
) -> dict:
    """Of the `shrink` with a norm and the `project` after it, and of both in one pass; each operand moves once."""
    base, low = sum(widths), sum(ranks)
    statistics = 2 * rows * 4
    a, b = low * inner * adapter_itemsize, sum(map(int.__mul__, widths, ranks)) * adapter_itemsize
    h = rows * low * adapter_itemsize
    x, weights, outputs = rows * inner * itemsize, base * (inner + 1) * itemsize, rows * base * itemsize
    up = 2 * rows * sum(map(int.__mul__, widths, ranks))
    shrunk = Count(x + statistics + a + h, 2 * rows * inner * low)
    projected = Count(x + statistics + h + weights + b + outputs, 2 * rows * inner * base + up)
    fused = Count(x + statistics + a + b + weights + outputs, shrunk.flops + projected.flops)
    return {"shrink": shrunk, "project": projected, "fused": fused}
