"""Attention over a few keys (77 text tokens), and its backward in one pass over the queries.

Bound by memory. All keys and values of a head stay in a program that takes several blocks of its queries; a row's
logits are there at once, so that nothing is rescaled, and the backward needs neither the output nor a pass for
sum(grad_o * o): that is the mean of dp under p. Keys and the head dimension are kept in two pieces each (`pieces`);
below, a and b are the pieces of the keys, 0 and 1 those of the head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from rftcore.kernels import pieces as pc
from rftcore.kernels.attention import strides
from rftcore.kernels.launch import Launch, cdiv

MAX_KEYS = 128
"""More do not stay in a program."""
MAX_BACKWARD_HEAD_DIM = 64
"""Sums of dk and dv do not fit in registers beyond it; `attention.backward` takes what this forward left."""

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_SUMMED = 1024


@dataclass(frozen=True)
class Config:
    """A program's tiles.

    Attributes:
        queries: taken at a time.
        blocks: of so many queries, one after the other. In the backward, each program leaves one partial sum.
        head_dim: the two pieces that hold the head dimension; None: the least padded.
        precision: of fp32 products: "ieee" or "tf32x3". Half precision is exact in fp32 anyway.
    """

    queries: int
    blocks: int
    num_warps: int
    num_stages: int
    head_dim: tuple[int, int] | None = None
    precision: str = "ieee"


def heuristic(launch: str, head_dim: int, queries: int, keys: int, itemsize: int, capability: int) -> Config:
    """For the launch "forward" or "backward" on a chip of this compute capability, such as 90.

    The batch does not count: how partial sums are cut never depends on it.
    """
    if launch == "forward":
        return Config(16, 8, 8, 1) if itemsize == 4 else Config(64, 4, 4, 2)
    # The backward's second piece of keys has the head dimension for rows, of which a matrix instruction takes 64.
    whole = (64, 0) if head_dim < 64 else None
    rows = 512 if queries >= 4096 else 256
    if itemsize == 4:
        return Config(16, rows // 16, 4, 1, whole)
    taken = 64 if 90 <= capability < 120 else 32
    return Config(taken, rows // taken, 8, 2, whole)


@triton.jit
def _place(queries, heads, ROWS: tl.constexpr):
    """This program's batch and head, int64, its chunk and how many there are; heads, which share sectors, in a row."""
    chunks = tl.cdiv(queries, ROWS)
    head = tl.program_id(0) % heads
    rest = tl.program_id(0) // heads
    return (rest // chunks).to(tl.int64), head.to(tl.int64), rest % chunks, chunks


@triton.jit
def _resident(
    pointer,
    stride,
    M: tl.constexpr,
    KEYS_A: tl.constexpr,
    KEYS_B: tl.constexpr,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """All M rows: a0, a1, b0, b1, zero beyond M."""
    a0, a1 = pc.load(pointer, tl.arange(0, KEYS_A), stride, M, D, FIRST, SECOND, KEYS_A > M)
    b0, b1 = a0, a1
    if KEYS_B > 0:
        key = KEYS_A + tl.arange(0, KEYS_B)
        b0, b1 = pc.load(pointer, key, stride, M, D, FIRST, SECOND, KEYS_A + KEYS_B > M)
    return a0, a1, b0, b1


@triton.jit
def _keep(value, START: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, otherwise):
    """The value where its key exists."""
    if START + WIDTH > M:
        value = tl.where((START + tl.arange(0, WIDTH))[None, :] < M, value, otherwise)
    return value


@triton.jit
def _product(a0, a1, b0, b1, SECOND: tl.constexpr, PRECISION: tl.constexpr):
    """a b, where `pc.inner` has b^T."""
    product = tl.dot(a0, b0, input_precision=PRECISION)
    if SECOND > 0:
        product = tl.dot(a1, b1, product, input_precision=PRECISION)
    return product


@triton.jit
def _forward_kernel(
    q, k, v, o, lse, q_batch, q_row, k_batch, k_row, v_batch, v_row, heads, queries, scale,
    M: tl.constexpr, KEYS_A: tl.constexpr, KEYS_B: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, QUERIES: tl.constexpr, BLOCKS: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head, chunk, _ = _place(queries, heads, QUERIES * BLOCKS)
    ka0, ka1, kb0, kb1 = _resident(k + batch * k_batch + head * D, k_row, M, KEYS_A, KEYS_B, D, FIRST, SECOND)
    va0, va1, vb0, vb1 = _resident(v + batch * v_batch + head * D, v_row, M, KEYS_A, KEYS_B, D, FIRST, SECOND)
    # Here, because tiles that the loop transposes stay in registers, and go to shared memory once a block.
    ka0, ka1, kb0, kb1 = tl.trans(ka0), tl.trans(ka1), tl.trans(kb0), tl.trans(kb1)
    scale *= _LOG2_E
    query = tl.arange(0, QUERIES)
    start = chunk * (QUERIES * BLOCKS)
    q += batch * q_batch + head * D + start.to(tl.int64) * q_row
    o += ((batch * queries + start) * heads + head) * D
    lse += (batch * heads + head) * queries + start
    count = queries - start
    for _ in range(0, tl.minimum(BLOCKS, tl.cdiv(count, QUERIES))):
        q0, q1 = pc.load(q, query, q_row, count, D, FIRST, SECOND, TAIL)
        logits_a = _keep(_product(q0, q1, ka0, ka1, SECOND, PRECISION), 0, KEYS_A, M, float("-inf"))
        top = tl.max(logits_a, 1)
        if KEYS_B > 0:
            logits_b = _keep(_product(q0, q1, kb0, kb1, SECOND, PRECISION), KEYS_A, KEYS_B, M, float("-inf"))
            top = tl.maximum(top, tl.max(logits_b, 1))
        top *= scale
        p_a = tl.exp2(logits_a * scale - top[:, None])
        total = tl.sum(p_a, 1)
        o0, o1 = pc.zeros(QUERIES, FIRST, SECOND)
        o0, o1 = pc.add_product(o0, o1, p_a.to(va0.dtype), va0, va1, SECOND, PRECISION)
        if KEYS_B > 0:
            p_b = tl.exp2(logits_b * scale - top[:, None])
            total += tl.sum(p_b, 1)
            o0, o1 = pc.add_product(o0, o1, p_b.to(vb0.dtype), vb0, vb1, SECOND, PRECISION)
        weight = (1.0 / total)[:, None]
        o0 = o0 * weight
        if SECOND > 0:
            o1 = o1 * weight
        pc.store(o, query, heads * D, count, o0, o1, D, FIRST, SECOND, TAIL)
        value = (top + tl.log2(total)) * _LN_2
        if TAIL:
            tl.store(lse + query, value, query < count)
        else:
            tl.store(lse + query, value)
        q += QUERIES * q_row
        o += QUERIES * heads * D
        lse += QUERIES
        count -= QUERIES


@triton.jit
def _probabilities(q0, q1, k0, k1, lse, scale, START, WIDTH, M, SECOND, PRECISION):
    p = tl.exp2(pc.inner(q0, q1, k0, k1, SECOND, PRECISION) * scale - lse[:, None])
    # Not by the zeros of k alone: exp2(-lse) may be infinite.
    return _keep(p, START, WIDTH, M, 0.0)


@triton.jit
def _zeros_of_columns(COLUMNS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    first = tl.zeros([FIRST, COLUMNS], tl.float32)
    second = first
    if SECOND > 0:
        second = tl.zeros([SECOND, COLUMNS], tl.float32)
    return first, second


@triton.jit
def _add_transposed_product(sum0, sum1, a0, a1, b, SECOND: tl.constexpr, PRECISION: tl.constexpr):
    """sum + a^T b, for each piece of a's columns."""
    sum0 = tl.dot(tl.trans(a0), b, sum0, input_precision=PRECISION)
    if SECOND > 0:
        sum1 = tl.dot(tl.trans(a1), b, sum1, input_precision=PRECISION)
    return sum0, sum1


@triton.jit
def _backward_kernel(
    grad_o, q, k, v, lse, dq, dk, dv, grad_o_batch, grad_o_row, q_batch, q_row, k_batch, k_row, v_batch, v_row,
    heads, queries, scale,
    M: tl.constexpr, KEYS_A: tl.constexpr, KEYS_B: tl.constexpr, D: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, QUERIES: tl.constexpr, BLOCKS: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv: (batch, chunks, M, heads, D), this program's chunk of them. dq, or both of these, may be None."""
    batch, head, chunk, chunks = _place(queries, heads, QUERIES * BLOCKS)
    ka0, ka1, kb0, kb1 = _resident(k + batch * k_batch + head * D, k_row, M, KEYS_A, KEYS_B, D, FIRST, SECOND)
    va0, va1, vb0, vb1 = _resident(v + batch * v_batch + head * D, v_row, M, KEYS_A, KEYS_B, D, FIRST, SECOND)
    # As in the forward.
    va0, va1, vb0, vb1 = tl.trans(va0), tl.trans(va1), tl.trans(vb0), tl.trans(vb1)
    if dk is not None:
        dka0, dka1 = pc.zeros(KEYS_A, FIRST, SECOND)
        dva0, dva1 = pc.zeros(KEYS_A, FIRST, SECOND)
        if KEYS_B > 0:
            # Transposed: wgmma takes 64 rows, which the head dimension has and this piece of the keys has not.
            dkb0, dkb1 = _zeros_of_columns(KEYS_B, FIRST, SECOND)
            dvb0, dvb1 = _zeros_of_columns(KEYS_B, FIRST, SECOND)
    log2_scale = scale * _LOG2_E
    query = tl.arange(0, QUERIES)
    start = chunk * (QUERIES * BLOCKS)
    q += batch * q_batch + head * D + start.to(tl.int64) * q_row
    grad_o += batch * grad_o_batch + head * D + start.to(tl.int64) * grad_o_row
    lse += (batch * heads + head) * queries + start
    if dq is not None:
        dq += ((batch * queries + start) * heads + head) * D
    count = queries - start
    for _ in range(0, tl.minimum(BLOCKS, tl.cdiv(count, QUERIES))):
        q0, q1 = pc.load(q, query, q_row, count, D, FIRST, SECOND, TAIL)
        g0, g1 = pc.load(grad_o, query, grad_o_row, count, D, FIRST, SECOND, TAIL)
        if TAIL:
            # A query that does not exist: p = exp2(0 - inf) = 0.
            lse_value = tl.load(lse + query, query < count, other=float("inf")) * _LOG2_E
        else:
            lse_value = tl.load(lse + query) * _LOG2_E
        p_a = _probabilities(q0, q1, ka0, ka1, lse_value, log2_scale, 0, KEYS_A, M, SECOND, PRECISION)
        dp_a = _product(g0, g1, va0, va1, SECOND, PRECISION)
        delta, total = tl.sum(p_a * dp_a, 1), tl.sum(p_a, 1)
        if KEYS_B > 0:
            p_b = _probabilities(q0, q1, kb0, kb1, lse_value, log2_scale, KEYS_A, KEYS_B, M, SECOND, PRECISION)
            dp_b = _product(g0, g1, vb0, vb1, SECOND, PRECISION)
            delta += tl.sum(p_b * dp_b, 1)
            total += tl.sum(p_b, 1)
        # The rounding of lse scales a row of p: by its sum, for a row that is all in one key has ds = 0.
        if TAIL:
            total = tl.where(query < count, total, 1.0)
        delta /= total
        ds_a = (p_a * (dp_a - delta[:, None])).to(ka0.dtype)
        if KEYS_B > 0:
            ds_b = (p_b * (dp_b - delta[:, None])).to(ka0.dtype)
        if dq is not None:
            dq0, dq1 = pc.zeros(QUERIES, FIRST, SECOND)
            dq0, dq1 = pc.add_product(dq0, dq1, ds_a, ka0, ka1, SECOND, PRECISION)
            if KEYS_B > 0:
                dq0, dq1 = pc.add_product(dq0, dq1, ds_b, kb0, kb1, SECOND, PRECISION)
            dq0 = dq0 * scale
            if SECOND > 0:
                dq1 = dq1 * scale
            pc.store(dq, query, heads * D, count, dq0, dq1, D, FIRST, SECOND, TAIL)
            dq += QUERIES * heads * D
        if dk is not None:
            dva0, dva1 = pc.add_product(dva0, dva1, tl.trans(p_a.to(g0.dtype)), g0, g1, SECOND, PRECISION)
            dka0, dka1 = pc.add_product(dka0, dka1, tl.trans(ds_a), q0, q1, SECOND, PRECISION)
            if KEYS_B > 0:
                dvb0, dvb1 = _add_transposed_product(dvb0, dvb1, g0, g1, p_b.to(g0.dtype), SECOND, PRECISION)
                dkb0, dkb1 = _add_transposed_product(dkb0, dkb1, q0, q1, ds_b, SECOND, PRECISION)
        q += QUERIES * q_row
        grad_o += QUERIES * grad_o_row
        lse += QUERIES
        count -= QUERIES
    if dk is not None:
        place = ((batch * chunks + chunk) * M * heads + head) * D
        dka0 = dka0 * scale
        if SECOND > 0:
            dka1 = dka1 * scale
        key = tl.arange(0, KEYS_A)
        pc.store(dk + place, key, heads * D, M, dka0, dka1, D, FIRST, SECOND, KEYS_A > M)
        pc.store(dv + place, key, heads * D, M, dva0, dva1, D, FIRST, SECOND, KEYS_A > M)
        if KEYS_B > 0:
            dkb0, dkb1 = tl.trans(dkb0) * scale, tl.trans(dkb1) * scale
            key = KEYS_A + tl.arange(0, KEYS_B)
            pc.store(dk + place, key, heads * D, M, dkb0, dkb1, D, FIRST, SECOND, KEYS_A + KEYS_B > M)
            pc.store(
                dv + place, key, heads * D, M, tl.trans(dvb0), tl.trans(dvb1), D, FIRST, SECOND, KEYS_A + KEYS_B > M
            )


@triton.jit
def _sum_kernel(partials, dk, dv, batches, chunks, size, SIZE: tl.constexpr):
    """dk and dv (batches, size), from partials (2, batches, chunks, size), in the order of the chunks."""
    blocks = tl.cdiv(size, SIZE)
    which = (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.program_id(0) % blocks * SIZE + tl.arange(0, SIZE)
    exists = place < size
    partials += which * chunks * size
    total = tl.zeros([SIZE], tl.float32)
    for _ in range(0, chunks):
        total += tl.load(partials + place, exists, other=0.0)
        partials += size
    value = total.to(dk.dtype.element_ty)
    if which < batches:
        tl.store(dk + which * size + place, value, exists)
    else:
        tl.store(dv + (which - batches) * size + place, value, exists)


def forward(q, k, v, o, lse, scale: float, *, capability: int = 90, config: Config | None = None) -> Launch:
    """As `attention.forward`, for M <= MAX_KEYS."""
    config = config or heuristic("forward", q.shape[3], q.shape[1], k.shape[1], q.element_size(), capability)
    arguments = {"q": q, "k": k, "v": v, "o": o, "lse": lse, **strides(q=q, k=k, v=v), "scale": float(scale)}
    return _launch(_forward_kernel, arguments, q, k, config)


def backward(
    grad_o,
    q,
    k,
    v,
    lse,
    dq,
    dk,
    dv,
    partials,
    scale: float,
    *,
    capability: int = 90,
    config: Config | None = None,
) -> list[Launch]:
    """The launches, to be run in this order. grad_o as q in `forward`; the output is not read.

    dq like q, dk and dv like k are contiguous; dq None, or dk and dv both None: not needed. partials: a workspace of
    `partials_shape`, fp32; None where that is None.
    """
    (batch, queries, heads, head_dim), keys = q.shape, k.shape[1]
    config = config or heuristic("backward", head_dim, queries, keys, q.element_size(), capability)
    inputs = {"grad_o": grad_o, "q": q, "k": k, "v": v, "lse": lse, "scale": float(scale)}
    inputs |= strides(grad_o=grad_o, q=q, k=k, v=v)
    chunks = cdiv(queries, config.queries * config.blocks)
    if dk is None or chunks == 1:
        return [_launch(_backward_kernel, {**inputs, "dq": dq, "dk": dk, "dv": dv}, q, k, config)]
    outputs = {"dq": dq, "dk": partials[0], "dv": partials[1]}
    size = keys * heads * head_dim
    sizes = {"batches": batch, "chunks": chunks, "size": size, "SIZE": _SUMMED}
    grid = (2 * batch * cdiv(size, _SUMMED),)
    return [
        _launch(_backward_kernel, {**inputs, **outputs}, q, k, config),
        Launch(_sum_kernel, grid, {"partials": partials, "dk": dk, "dv": dv, **sizes}),
    ]


def partials_shape(q, k, *, capability: int = 90, config: Config | None = None) -> tuple[int, ...] | None:
    """Of the workspace for dk and dv: (2, B, chunks, M, H, d); None where one chunk holds all queries."""
    (batch, queries, heads, head_dim), keys = q.shape, k.shape[1]
    config = config or heuristic("backward", head_dim, queries, keys, q.element_size(), capability)
    chunks = cdiv(queries, config.queries * config.blocks)
    return (2, batch, chunks, keys, heads, head_dim) if chunks > 1 else None


def _launch(kernel, arguments, q, k, config):
    (batch, queries, heads, head_dim), keys = q.shape, k.shape[1]
    keys_a, keys_b = pc.pieces(keys)
    first, second = config.head_dim or pc.pieces(head_dim)
    sizes = {
        "heads": heads,
        "queries": queries,
        "M": keys,
        "KEYS_A": keys_a,
        "KEYS_B": keys_b,
        "D": head_dim,
        "FIRST": first,
        "SECOND": second,
        "QUERIES": config.queries,
        "BLOCKS": config.blocks,
        "TAIL": queries % config.queries != 0,
        "PRECISION": config.precision,
    }
    grid = (cdiv(queries, config.queries * config.blocks) * heads * batch,)
    return Launch(kernel, grid, {**arguments, **sizes}, config.num_warps, config.num_stages)


def counts(batch: int, queries: int, keys: int, heads: int, head_dim: int, itemsize: int) -> dict[str, tuple[int, int]]:
    """The bytes that the forward, and the backward, must move, and their FLOPs, nothing padded; without partial sums.

    The backward reads grad_o, q, k, v and the log-sum-exp and writes three gradients.
    """
    query, key = batch * queries * heads * head_dim * itemsize, batch * keys * heads * head_dim * itemsize
    lse, product = 4 * batch * heads * queries, 2 * batch * heads * queries * keys * head_dim
    return {"forward": (2 * query + 2 * key + lse, 2 * product), "backward": (3 * query + 4 * key + lse, 5 * product)}
