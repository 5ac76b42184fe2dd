"""Up to three projections of one x in one kernel: which of them a place belongs to, and how they are passed.

No weight is transformed, joined or copied: a kernel takes up to three of each and chooses by the place of its tile, the
adapters' few rows too.

Projections are `(weight, bias, adapters)` with none or one `(a, b, scale)` in `adapters`, and a norm is `(weight, bias,
eps)`, as of `rftcore.ops`. All matrices are contiguous, of x's dtype but for a and b, which may be fp32 together. The
low-rank columns of all adapters lie side by side, in the order of their projections: h (M, sum of ranks).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

MAX_PROJECTIONS, MAX_RANK = 3, 64
# Columns of adapters in one product; tiles that span projections hold the columns of all.
WIDEST = 64


@triton.jit
def pick(p, first, second, third, COUNT: tl.constexpr):
    """The one of the first COUNT that p names; of pointers too, whose alignment stays known."""
    chosen = first
    if COUNT > 1:
        chosen = tl.where(p == 1, second, chosen)
    if COUNT > 2:
        chosen = tl.where(p == 2, third, chosen)
    return chosen


@triton.jit
def owner(place, first, second, COUNT: tl.constexpr):
    """Which of COUNT parts of a row a place is in; the first two parts have these sizes, zero also."""
    p = place * 0
    if COUNT > 1:
        p = tl.where(place >= first, 1, 0)
    if COUNT > 2:
        p += tl.where(place >= first + second, 1, 0)
    return p


@triton.jit
def grouped_tile(row_tiles, column_tiles, GROUP: tl.constexpr):
    """This program's tile: GROUP tiles of rows take all columns before the next do."""
    here = tl.program_id(0)
    group = here // (GROUP * column_tiles)
    first = group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    place = here - group * GROUP * column_tiles
    return first + place % size, place // size


@triton.jit
def rounded_to_tf32(value):
    """fp32 values with TF32's digits, to nearest: matrix instructions cut the others off, which is a bias."""
    bits = value.to(tl.int32, bitcast=True)
    rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    # Not a number may have all its bits set.
    return tl.where(value == value, rounded, value)


@triton.jit
def load_existing(source, exists):
    """Zero where it does not exist; `exists` is None where all does."""
    if exists is None:
        value = tl.load(source)
    else:
        value = tl.load(source, exists, other=0.0)
    return value


@triton.jit
def normalised(value, mean, inverse_deviation, norm_weight, norm_bias, k, exists):
    """norm(value) in fp32, zero where k does not exist; `exists` is None where all do."""
    n = (value.to(tl.float32) - mean) * inverse_deviation
    if norm_weight is not None:
        n *= load_existing(norm_weight + k, exists).to(tl.float32)
    if norm_bias is not None:
        n += load_existing(norm_bias + k, exists).to(tl.float32)
    if exists is not None:
        n = tl.where(exists, n, 0.0)
    return n


@triton.jit
def row_statistics(source, inner, eps, ROWS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr):
    """Mean and reciprocal deviation (ROWS, 1) of rows at `source`: moments of parts, merged as Chan et al. do."""
    mean = tl.zeros((ROWS, 1), tl.float32)
    moment = tl.zeros((ROWS, 1), tl.float32)
    for start in range(0, inner, DEPTH):
        k = start + tl.arange(0, DEPTH)[None, :]
        size = tl.minimum(inner - start, DEPTH) * 1.0
        if EVEN:
            value = tl.load(source + k).to(tl.float32)
        else:
            value = tl.load(source + k, k < inner, other=0.0).to(tl.float32)
        here = tl.sum(value, 1, keep_dims=True) / size
        centred = value - here
        if not EVEN:
            centred = tl.where(k < inner, centred, 0.0)
        before = start * 1.0
        share = size / (before + size)
        delta = here - mean
        mean += delta * share
        moment += tl.sum(centred * centred, 1, keep_dims=True) + delta * delta * (before * share)
    return mean, tl.rsqrt(moment / inner + eps)


class Adapters(NamedTuple):
    """The adapters of some projections, as kernels take them.

    Attributes:
        arguments: a0 to a2, b0 to b2, scale0 to scale2 and rank0 to rank2 by name; rank 0 where there is none.
    """

    arguments: dict[str, Any]
    ranks: tuple[int, ...]
    dtype: Any

    @property
    def a(self) -> list:
        """Every a, more than once where it stands in for another."""
        return [self.arguments[name] for name in ("a0", "a1", "a2") if self.arguments[name] is not None]

    def width(self, span: bool) -> int:
        """Low-rank columns in a product: of all adapters, or of any one; 16 at least, as matrix instructions have."""
        needed = sum(self.ranks) if span else max(self.ranks, default=0)
        return 0 if needed == 0 else max(16, triton.next_power_of_2(needed))


def adapters_of(projections: Sequence) -> Adapters:
    """Raises: ValueError for what no kernel here takes."""
    if not 1 <= len(projections) <= MAX_PROJECTIONS:
        raise ValueError(f"lora_linear kernels: {len(projections)} projections; give 1 to {MAX_PROJECTIONS}.")
    present = [adapter for *_, own in projections for adapter in own]
    parts = []
    for *_, own in projections:
        if len(own) > 1:
            raise ValueError(f"lora_linear kernels: {len(own)} adapters of one projection; give at most one.")
        # Where there is none, another's matrices stand in, and none of their columns is this projection's.
        a, b, scale = own[0] if own else (*(present[0][:2] if present else (None, None)), 0.0)
        parts.append((a, b, float(scale), own[0][0].shape[0] if own else 0))
    ranks = tuple(rank for *_, rank in parts)
    if max(ranks) > MAX_RANK:
        raise ValueError(f"lora_linear kernels: an adapter has rank {max(ranks)}; it can be at most {MAX_RANK}.")
    arguments = {}
    for name, values, default in zip(
        ("a", "b", "scale", "rank"), zip(*parts, strict=True), (None, None, 0.0, 0), strict=True
    ):
        arguments |= numbered(name, values, default)
    return Adapters(arguments, ranks, present[0][0].dtype if present else None)


def numbered(name: str, values: Sequence, default=None) -> dict[str, Any]:
    """name0 to name2."""
    return {f"{name}{i}": values[i] if i < len(values) else default for i in range(MAX_PROJECTIONS)}


def aligned(*groups: Sequence) -> bool:
    """Whether every row of every matrix starts at a multiple of 16 bytes, and 16 values never cross its end."""
    return all(matrix.shape[-1] % 16 == 0 and matrix.data_ptr() % 16 == 0 for group in groups for matrix in group)


def low_rank_precision(x, adapters: Adapters, precision: str) -> str:
    """Of what adapters add to a product: fp32 adapters of a half-precision base need no more than TF32's digits."""
    return precision if adapters.dtype == x.dtype else "tf32"


def norm_arguments(x, norm, mean, inverse_deviation) -> dict[str, Any]:
    """Of a kernel that reads x and its norm, all None where it does not."""
    weight, bias, eps = norm or (None, None, 0.0)
    return {
        "x": x, "mean": mean, "inverse_deviation": inverse_deviation, "norm_weight": weight, "norm_bias": bias,
        "eps": float(eps),
    }  # fmt: skip


class Count(NamedTuple):
    """What a pass must move and compute."""

    bytes: int
    flops: int
