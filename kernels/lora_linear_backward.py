"""The backward of `lora_linear`: the gradients of n, and through the rank those of the adapters' a and b.

g_p = scale_p dY_p B_p, dn = sum of dY_p W_p + g_p A_p, dA_p = g_p^T n, dB_p = scale_p dY_p^T h_p. n is made again of x
and the norm's statistics. Projections, norms and the places of low-rank columns are as in `projections`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl

from rftcore.kernels.launch import Launch, cdiv
from rftcore.kernels.projections import (
    WIDEST,
    Count,
    adapters_of,
    aligned,
    grouped_tile,
    low_rank_precision,
    norm_arguments,
    normalised,
    numbered,
    owner,
    pick,
    rounded_to_tf32,
)


@dataclass(frozen=True)
class LowRankConfig:
    """A program's rows, and how many columns of a gradient a step takes."""

    rows: int
    depth: int
    num_warps: int = 4
    num_stages: int = 3
    precision: str = "tf32x3"


@dataclass(frozen=True)
class InputConfig:
    """A program's tile of the gradient of n, columns of dY in a step, and tiles of rows that go together."""

    rows: int
    columns: int
    depth: int
    group: int = 8
    num_warps: int = 8
    num_stages: int = 3
    precision: str = "tf32x3"


@dataclass(frozen=True)
class AdaptersConfig:
    """A program's columns of n or a dY, how many rows a step takes, and into how many parts the rows are split.

    Attributes:
        columns_summed, parts_summed: of the partial sums, in a program that adds them.
    """

    columns: int
    rows: int
    splits: int
    num_warps: int = 4
    num_stages: int = 3
    precision: str = "tf32x3"
    columns_summed: int = 256
    parts_summed: int = 8


def low_rank_heuristic(itemsize: int) -> LowRankConfig:
    """Bound by reading every dY once: few rows a program, so that many are in flight."""
    return LowRankConfig(32, 128 if itemsize == 2 else 64)


def input_heuristic(rows: int, inner: int, itemsize: int) -> InputConfig:
    """Tiles for wgmma with two groups of warps; the depth decides how a value is summed and does not depend on rows."""
    if itemsize == 4:
        return InputConfig(64, 64, 32, num_warps=4, num_stages=2)
    if rows <= 1024:
        return InputConfig(64, 64, 64, num_warps=4, num_stages=4)
    return InputConfig(128, 128, 64)


def adapters_heuristic(rows: int, inner: int, widths: Sequence[int], itemsize: int) -> AdaptersConfig:
    """About 1024 programs, each with rows enough that its partial sums are few against what it reads."""
    columns = 128 if itemsize == 2 else 64
    tiles = cdiv(inner, columns) + sum(cdiv(width, columns) for width in widths)
    step = 64 if itemsize == 2 else 32
    return AdaptersConfig(columns, step, max(1, min(cdiv(1024, tiles), cdiv(rows, 4 * step))))


@triton.jit
def _low_rank_kernel(
    grad0, grad1, grad2, b0, b1, b2, scale0, scale1, scale2, g,
    rows, width0, width1, width2, rank0, rank1, rank2,
    COUNT: tl.constexpr, RANKS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(1)
    width, rank = pick(p, width0, width1, width2, COUNT), pick(p, rank0, rank1, rank2, COUNT)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    exists = row < rows
    row = tl.minimum(row, rows - 1)
    source = pick(p, grad0, grad1, grad2, COUNT) + row * width
    r = tl.arange(0, RANKS)[None, :]
    source_b = pick(p, b0, b1, b2, COUNT) + r
    total = tl.zeros((ROWS, RANKS), tl.float32)
    for start in range(0, width, DEPTH):
        column = start + tl.arange(0, DEPTH)
        across, down = column[None, :], column[:, None]
        if EVEN:
            grad = tl.load(source + across)
            b = tl.load(source_b + down * rank, r < rank, other=0.0)
        else:
            grad = tl.load(source + across, across < width, other=0.0)
            b = tl.load(source_b + down * rank, (r < rank) & (down < width), other=0.0)
        total = tl.dot(grad.to(b.dtype), b, total, input_precision=PRECISION)
    total *= pick(p, scale0, scale1, scale2, COUNT)
    target = g + row * (rank0 + rank1 + rank2) + pick(p, 0, rank0, rank0 + rank1, COUNT) + r
    tl.store(target, total.to(g.dtype.element_ty), exists & (r < rank))


@triton.jit
def _input_kernel(
    grad0, grad1, grad2, weight0, weight1, weight2, a0, a1, a2, g, grad_n,
    rows, inner, width0, width1, width2, rank0, rank1, rank2,
    COUNT: tl.constexpr, RANKS: tl.constexpr, CHUNKS: tl.constexpr, A_ALIGNED: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, LOW_RANK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = grouped_tile(tl.cdiv(rows, ROWS), tl.cdiv(inner, COLUMNS), GROUP)
    row = (row_tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    row_exists = row < rows
    # Rows and columns that do not exist are copies of others: no load of a product has a mask for them.
    row = tl.minimum(row, rows - 1)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    column_exists = column < inner
    column %= inner

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    # The columns of all dY, in steps of which each belongs to one projection.
    steps0, steps1 = tl.cdiv(width0, DEPTH), tl.cdiv(width1, DEPTH)
    for step in range(0, steps0 + steps1 + tl.cdiv(width2, DEPTH)):
        p = owner(step, steps0, steps1, COUNT)
        width = pick(p, width0, width1, width2, COUNT)
        line = (step - pick(p, 0, steps0, steps0 + steps1, COUNT)) * DEPTH + tl.arange(0, DEPTH)
        across, down = line[None, :], line[:, None]
        source = pick(p, grad0, grad1, grad2, COUNT) + row * width + across
        source_weight = pick(p, weight0, weight1, weight2, COUNT) + down.to(tl.int64) * inner + column
        if EVEN:
            grad = tl.load(source)
            weight = tl.load(source_weight)
        else:
            grad = tl.load(source, across < width, other=0.0)
            weight = tl.load(source_weight, down < width, other=0.0)
        total = tl.dot(grad, weight, total, input_precision=PRECISION)
    if RANKS > 0:
        ranks = rank0 + rank1 + rank2
        for chunk in tl.static_range(CHUNKS):
            j = chunk * RANKS + tl.arange(0, RANKS)
            low = tl.load(g + row * ranks + j[None, :], j[None, :] < ranks, other=0.0)
            j = j[:, None]
            q = owner(j, rank0, rank1, COUNT)
            line = (j - pick(q, 0, rank0, rank0 + rank1, COUNT)).to(tl.int64)
            source_a = pick(q, a0, a1, a2, COUNT) + line * inner
            if A_ALIGNED:
                source_a = tl.multiple_of(source_a, (16, 16))
            a = tl.load(source_a + column, j < ranks, other=0.0)
            if LOW_RANK == "tf32" and a.dtype == tl.float32 and grad_n.dtype.element_ty == tl.float16:
                low, a = rounded_to_tf32(low), rounded_to_tf32(a)
            total = tl.dot(low, a, total, input_precision=LOW_RANK)
    target = grad_n + row * inner + column
    tl.store(target, total.to(grad_n.dtype.element_ty), row_exists & column_exists)


@triton.jit
def _weighted_sum(
    wide, width, skinny, skinny_width, first, count, center, inverse_deviation, norm_weight, norm_bias,
    column, start, stop, DTYPE: tl.constexpr,
    NORM: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """skinny^T wide (RANKS, COLUMNS) over rows start to stop, of skinny's `count` columns from `first` on."""
    j = tl.arange(0, RANKS)[:, None]
    total = tl.zeros((RANKS, COLUMNS), tl.float32)
    for begin in range(start, stop, ROWS):
        row = begin + tl.arange(0, ROWS)
        down, across = row[:, None].to(tl.int64), row[None, :].to(tl.int64)
        left = tl.load(skinny + across * skinny_width + first + j, (across < stop) & (j < count), other=0.0)
        right = tl.load(wide + down * width + column, (down < stop) & (column < width), other=0.0)
        if NORM:
            mean = tl.load(center + down, down < stop, other=0.0)
            inverse = tl.load(inverse_deviation + down, down < stop, other=0.0)
            n = normalised(right, mean, inverse, norm_weight, norm_bias, column, column < width)
            right = n.to(wide.dtype.element_ty)
        total = tl.dot(left, right.to(DTYPE), total, input_precision=PRECISION)
    return total


@triton.jit
def _adapters_kernel(
    x, mean, inverse_deviation, norm_weight, norm_bias, grad0, grad1, grad2, g, h,
    scale0, scale1, scale2, partials,
    rows, inner, width0, width1, width2, rank0, rank1, rank2, size, size_a, rows_of_split,
    COUNT: tl.constexpr, NORM: tl.constexpr, RANKS_A: tl.constexpr, RANKS_B: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    split = tl.program_id(1)
    start = split * rows_of_split
    stop = tl.minimum(start + rows_of_split, rows)
    ranks = rank0 + rank1 + rank2
    target = partials + split.to(tl.int64) * size
    tiles_a = 0
    if RANKS_A > 0:
        across = tl.cdiv(inner, COLUMNS)
        tiles_a = across * tl.cdiv(ranks, RANKS_A)
        if tile < tiles_a:
            first = tile // across * RANKS_A
            column = tile % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            total = _weighted_sum(
                x, inner, g, ranks, first, ranks - first, mean, inverse_deviation, norm_weight, norm_bias,
                column, start, stop, g.dtype.element_ty, NORM, RANKS_A, PRECISION, ROWS, COLUMNS,
            )  # fmt: skip
            j = first + tl.arange(0, RANKS_A)[:, None]
            tl.store(target + j * inner + column, total, (j < ranks) & (column < inner))
    if RANKS_B > 0:
        if tile >= tiles_a:
            tile -= tiles_a
            tiles0, tiles1 = tl.cdiv(width0, COLUMNS), tl.cdiv(width1, COLUMNS)
            p = owner(tile, tiles0, tiles1, COUNT)
            width, rank = pick(p, width0, width1, width2, COUNT), pick(p, rank0, rank1, rank2, COUNT)
            column = (tile - pick(p, 0, tiles0, tiles0 + tiles1, COUNT)) * COLUMNS
            column += tl.arange(0, COLUMNS)[None, :]
            total = _weighted_sum(
                pick(p, grad0, grad1, grad2, COUNT), width, h, ranks, pick(p, 0, rank0, rank0 + rank1, COUNT), rank,
                None, None, None, None,
                column, start, stop, h.dtype.element_ty, False, RANKS_B, PRECISION, ROWS, COLUMNS,
            )  # fmt: skip
            total *= pick(p, scale0, scale1, scale2, COUNT)
            target += size_a + pick(p, 0, width0 * rank0, width0 * rank0 + width1 * rank1, COUNT)
            j = tl.arange(0, RANKS_B)[:, None]
            tl.store(target + column * rank + j, total, (j < rank) & (column < width))


@triton.jit
def _sum_kernel(
    partials, grad_a0, grad_a1, grad_a2, grad_b0, grad_b1, grad_b2,
    inner, width0, width1, width2, rank0, rank1, rank2, size, splits,
    HAS_A: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((PARTS, COLUMNS), tl.float32)
    for start in range(0, splits, PARTS):
        part = (start + tl.arange(0, PARTS)[:, None]).to(tl.int64)
        total += tl.load(partials + part * size + place, (part < splits) & (place < size), other=0.0)
    total = tl.sum(total, 0, keep_dims=True)
    if HAS_A:
        place = _store_part(grad_a0, place, rank0 * inner, total)
        place = _store_part(grad_a1, place, rank1 * inner, total)
        place = _store_part(grad_a2, place, rank2 * inner, total)
    place = _store_part(grad_b0, place, width0 * rank0, total)
    place = _store_part(grad_b1, place, width1 * rank1, total)
    place = _store_part(grad_b2, place, width2 * rank2, total)


@triton.jit
def _store_part(target, place, size, value):
    """Stores what belongs to a target of this size, if there is one; the places as the next target counts them."""
    if target is not None:
        tl.store(target + place, value.to(target.dtype.element_ty), (place >= 0) & (place < size))
    return place - size


def low_rank_gradient(grads: Sequence, projections: Sequence, g, config: LowRankConfig | None = None) -> Launch:
    """Writes g = scale_p dY_p B_p of every adapter, one pass over those dY that have one.

    Shapes: grads (M, N_p) each, in x's dtype; g (M, sum of ranks) in the adapters' dtype.
    """
    grads, projections = _adapted(grads, projections)
    adapters = adapters_of(projections)
    config = config or low_rank_heuristic(g.element_size())
    widths = [grad.shape[1] for grad in grads]
    arguments = {name: value for name, value in adapters.arguments.items() if name[0] != "a"}
    arguments |= numbered("grad", grads) | numbered("width", widths, 0) | {"g": g, "rows": len(g), "COUNT": len(grads)}
    arguments |= {"RANKS": adapters.width(span=False), "EVEN": all(width % config.depth == 0 for width in widths)}
    arguments |= {"PRECISION": config.precision, "ROWS": config.rows, "DEPTH": config.depth}
    grid = cdiv(len(g), config.rows), len(grads)
    return Launch(_low_rank_kernel, grid, arguments, config.num_warps, config.num_stages)


def input_gradient(grads: Sequence, projections: Sequence, g, grad_n, config: InputConfig | None = None) -> Launch:
    """Writes the gradient of n, with what passes the adapters.

    Shapes: grads (M, N_p) each and grad_n (M, K), in x's dtype; g (M, sum of ranks), `low_rank_gradient`'s, or None
    where no projection has an adapter.
    """
    adapters = adapters_of(projections)
    rows, inner = grad_n.shape
    config = config or input_heuristic(rows, inner, grad_n.element_size())
    widths = [grad.shape[1] for grad in grads]
    ranks = min(adapters.width(span=True), WIDEST)
    arguments = {name: value for name, value in adapters.arguments.items() if name[0] in "ar"}
    arguments |= numbered("grad", grads) | numbered("weight", [weight for weight, *_ in projections])
    arguments |= numbered("width", widths, 0) | {"g": g, "grad_n": grad_n, "rows": rows, "inner": inner}
    arguments |= {"COUNT": len(grads), "RANKS": ranks, "CHUNKS": cdiv(sum(adapters.ranks), ranks) if ranks else 0}
    arguments |= {"EVEN": all(width % config.depth == 0 for width in widths), "PRECISION": config.precision}
    arguments |= {"LOW_RANK": low_rank_precision(grad_n, adapters, config.precision), "A_ALIGNED": aligned(adapters.a)}
    arguments |= {"ROWS": config.rows, "COLUMNS": config.columns, "DEPTH": config.depth, "GROUP": config.group}
    grid = (cdiv(rows, config.rows) * cdiv(inner, config.columns),)
    return Launch(_input_kernel, grid, arguments, config.num_warps, config.num_stages)


def adapter_gradients(
    x, grads: Sequence, projections: Sequence, norm, mean, inverse_deviation, g, h, found: Sequence, partials,
    config: AdaptersConfig | None = None,
) -> tuple[Launch, Launch]:  # fmt: skip
    """Writes the gradients of a and b: partial sums over the rows' splits, then their sums in a fixed order.

    Args:
        g, h: (M, sum of ranks), `low_rank_gradient`'s and `shrink`'s; g, x and the statistics are read where a gradient
            of an a is wanted, h and the grads where one of a b is.
        found: (grad_a, grad_b) for each projection, either or both None where not wanted or not there; of one dtype.
        partials: fp32, of `partials_shape`.
    """
    wants_a, wants_b = _wanted(found)
    like = x if x is not None else grads[0]
    config = config or _default(like, projections)
    shape = partials_shape(like, projections, found, config)
    if tuple(partials.shape) != shape:
        raise ValueError(f"adapter_gradients: partials is {tuple(partials.shape)}; it must be {shape}.")
    found = [pair for pair, (*_, own) in zip(found, projections, strict=True) if own]
    grads, projections = _adapted(grads, projections)
    adapters = adapters_of(projections)
    rows, inner = like.shape[0], projections[0][0].shape[1]
    widths = [weight.shape[0] for weight, *_ in projections]
    ranks_a = min(adapters.width(span=True), WIDEST) if wants_a else 0
    ranks_b = adapters.width(span=False) if wants_b else 0
    size_a = sum(adapters.ranks) * inner if wants_a else 0
    tiles = cdiv(inner, config.columns) * cdiv(sum(adapters.ranks), ranks_a) if wants_a else 0
    tiles += sum(cdiv(width, config.columns) for width in widths) if wants_b else 0
    sizes = {name: value for name, value in adapters.arguments.items() if name[:4] == "rank"}
    sizes |= numbered("width", widths, 0) | {"inner": inner, "size": shape[1], "partials": partials}
    arguments = {name: value for name, value in adapters.arguments.items() if name[0] == "s"} | sizes
    read = norm_arguments(x, norm, mean, inverse_deviation) if wants_a else norm_arguments(None, None, None, None)
    arguments |= numbered("grad", grads) | {name: value for name, value in read.items() if name != "eps"}
    # A split is a whole number of steps: only the last has rows missing.
    steps = cdiv(cdiv(rows, config.rows), max(shape[0], 1))
    arguments |= {"g": g, "h": h, "rows": rows, "size_a": size_a, "rows_of_split": steps * config.rows}
    arguments |= {"COUNT": len(projections), "NORM": norm is not None, "RANKS_A": ranks_a, "RANKS_B": ranks_b}
    arguments |= {"PRECISION": config.precision, "ROWS": config.rows, "COLUMNS": config.columns}
    parts = Launch(_adapters_kernel, (tiles, shape[0]), arguments, config.num_warps, config.num_stages)
    arguments = sizes | {"splits": shape[0], "HAS_A": wants_a}
    arguments |= numbered("grad_a", [pair[0] for pair in found]) | numbered("grad_b", [pair[1] for pair in found])
    arguments |= {"COLUMNS": config.columns_summed, "PARTS": config.parts_summed}
    return parts, Launch(_sum_kernel, (cdiv(shape[1], config.columns_summed),), arguments)


def partials_shape(
    like, projections: Sequence, found: Sequence, config: AdaptersConfig | None = None
) -> tuple[int, int]:
    """Of the fp32 workspace of `adapter_gradients`; `like`: x or, as good, any dY."""
    wants_a, wants_b = _wanted(found)
    config = config or _default(like, projections)
    own = [adapter for *_, own in projections for adapter in own]
    size = sum(a.numel() for a, *_ in own) * wants_a + sum(b.numel() for _, b, _ in own) * wants_b
    # No split is without rows.
    steps = cdiv(like.shape[0], config.rows)
    return cdiv(steps, cdiv(steps, min(config.splits, steps))) if steps else 0, size


def _wanted(found) -> tuple[bool, bool]:
    """Whether a gradient of any a, and of any b, is wanted."""
    return any(pair[0] is not None for pair in found), any(pair[1] is not None for pair in found)


def _default(like, projections) -> AdaptersConfig:
    widths = [weight.shape[0] for weight, _, own in projections if own]
    itemsize = max(a.element_size() for *_, own in projections for a, *_ in own)
    return adapters_heuristic(like.shape[0], projections[0][0].shape[1], widths, itemsize)


def _adapted(grads, projections):
    """Those of the projections that have an adapter."""
    pairs = [(grad, p) for grad, p in zip(grads, projections, strict=True) if p[2]]
    return [grad for grad, _ in pairs], [p for _, p in pairs]


def counts(
    rows: int, inner: int, widths: Sequence[int], ranks: Sequence[int], itemsize: int, adapter_itemsize: int
) -> dict:
    """Of each pass, without partial sums; each operand moves once. Rank 0 where there is no adapter."""
    base, low = sum(widths), sum(ranks)
    adapted = sum(width for width, rank in zip(widths, ranks, strict=True) if rank)
    up = sum(map(int.__mul__, widths, ranks))
    a, b, g = low * inner * adapter_itemsize, up * adapter_itemsize, rows * low * adapter_itemsize
    x, weights, statistics = rows * inner * itemsize, base * inner * itemsize, 2 * rows * 4
    above = rows * adapted * itemsize
    return {
        "low_rank_gradient": Count(above + b + g, 2 * rows * up),
        "input_gradient": Count(rows * base * itemsize + weights + g + a + x, 2 * rows * inner * (base + low)),
        "adapter_gradients": Count(x + statistics + above + 2 * g + a + b, 2 * rows * (inner * low + up)),
    }
