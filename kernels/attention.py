"""Attention over many keys without mask, dropout and causality, and its backward: three launches, no atomics.

Bound by exp2 and the matrix units. The head dimension is kept in two pieces (`pieces`), so that 40, 80 and 160 are not
padded to the next power of two. Logits are kept in units of log2(e): one multiply-add and one exp2 an element.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from rftcore.kernels import pieces as pc
from rftcore.kernels.launch import Launch, cdiv

MAX_HEAD_DIM = 160
"""The head dimension is a multiple of 8 up to this."""

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class Config:
    """A program's tile.

    Attributes:
        kept: rows that the program owns: queries, or keys in the launch for dk and dv.
        taken: rows of the others that it takes at a time.
        head_dim: the two pieces that hold the head dimension; None: the least padded.
        precision: of fp32 products: "ieee" or "tf32x3". Half precision is exact in fp32 anyway.
    """

    kept: int
    taken: int
    num_warps: int
    num_stages: int
    head_dim: tuple[int, int] | None = None
    precision: str = "ieee"


def heuristic(launch: str, head_dim: int, queries: int, keys: int, itemsize: int, capability: int) -> Config:
    """For the launch "forward", "dq" or "dkdv" on a chip of this compute capability, such as 90.

    By what the compiler makes of them: on sm_90 two programs of 8 warps fit where one has 128 registers a thread.
    """
    # sm_120 has sm_80's matrix instructions.
    old = not 90 <= capability < 120
    if itemsize == 4:
        return Config(16 if launch == "forward" and head_dim > 128 else 32, 16, 4, 2)
    if launch == "forward":
        if head_dim > 96:
            return Config(64, 32, 4, 2) if old else Config(64, 64, 4, 2)
        return Config(128, 64, 8, 3)
    if launch == "dq":
        if head_dim > 96:
            return Config(64, 32, 8, 2) if old else Config(64, 64, 4, 2)
        return Config(128, 64 if head_dim <= 64 else 32, 8, 2)
    if head_dim > 96:
        return Config(64, 16 if old else 32, 8, 2)
    return Config(64, 64, 4, 2) if head_dim > 48 and capability == 90 else Config(128, 32, 8, 2)


@triton.jit
def _place(rows, heads, ROWS: tl.constexpr):
    """This program's batch, head and (batch, head), int64, and its first row; blocks of one head are neighbours."""
    blocks = tl.cdiv(rows, ROWS)
    which = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * ROWS
    return (which // heads).to(tl.int64), (which % heads).to(tl.int64), which.to(tl.int64), first


@triton.jit
def _attend(
    q0, q1, k, v, k_row, v_row, count, o0, o1, top, total, scale,
    D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: `top` is the greatest logit so far, `total` and o are sums relative to it."""
    key = tl.arange(0, KEYS)
    k0, k1 = pc.load(k, key, k_row, count, D, FIRST, SECOND, MASKED)
    logits = pc.inner(q0, q1, k0, k1, SECOND, PRECISION)
    if MASKED:
        logits = tl.where(key[None, :] < count, logits, float("-inf"))
    # Every block has a key that exists, so that this is finite from the first one on.
    higher = tl.maximum(top, tl.max(logits, 1) * scale)
    p = tl.exp2(logits * scale - higher[:, None])
    fade = tl.exp2(top - higher)
    v0, v1 = pc.load(v, key, v_row, count, D, FIRST, SECOND, MASKED)
    o0 = o0 * fade[:, None]
    if SECOND > 0:
        o1 = o1 * fade[:, None]
    o0, o1 = pc.add_product(o0, o1, p.to(v0.dtype), v0, v1, SECOND, PRECISION)
    return o0, o1, higher, total * fade + tl.sum(p, 1)


@triton.jit
def _forward_kernel(
    q, k, v, o, lse, q_batch, q_row, k_batch, k_row, v_batch, v_row, heads, queries, keys, scale,
    D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    QUERY_TAIL: tl.constexpr, KEY_TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head, which, start = _place(queries, heads, QUERIES)
    query = tl.arange(0, QUERIES)
    q += batch * q_batch + head * D + start.to(tl.int64) * q_row
    k += batch * k_batch + head * D
    v += batch * v_batch + head * D
    scale *= _LOG2_E
    q0, q1 = pc.load(q, query, q_row, queries - start, D, FIRST, SECOND, QUERY_TAIL)
    o0, o1 = pc.zeros(QUERIES, FIRST, SECOND)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    for _ in range(0, keys // KEYS):
        o0, o1, top, total = _attend(
            q0, q1, k, v, k_row, v_row, KEYS, o0, o1, top, total, scale, D, FIRST, SECOND, KEYS, False, PRECISION
        )
        k += KEYS * k_row
        v += KEYS * v_row
    if KEY_TAIL:
        o0, o1, top, total = _attend(
            q0, q1, k, v, k_row, v_row, keys % KEYS, o0, o1, top, total, scale, D, FIRST, SECOND, KEYS, True, PRECISION
        )
    weight = (1.0 / total)[:, None]
    o0 = o0 * weight
    if SECOND > 0:
        o1 = o1 * weight
    o += ((batch * queries + start) * heads + head) * D
    pc.store(o, query, heads * D, queries - start, o0, o1, D, FIRST, SECOND, QUERY_TAIL)
    lse += which * queries + start
    value = (top + tl.log2(total)) * _LN_2
    if QUERY_TAIL:
        tl.store(lse + query, value, query < queries - start)
    else:
        tl.store(lse + query, value)


@triton.jit
def _delta_kernel(
    grad_o, o, delta, grad_o_batch, grad_o_row, heads, queries,
    D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    batch, head, which, start = _place(queries, heads, QUERIES)
    query = tl.arange(0, QUERIES)
    count = queries - start
    grad_o += batch * grad_o_batch + head * D + start.to(tl.int64) * grad_o_row
    o += ((batch * queries + start) * heads + head) * D
    g0, g1 = pc.load(grad_o, query, grad_o_row, count, D, FIRST, SECOND, True)
    o0, o1 = pc.load(o, query, heads * D, count, D, FIRST, SECOND, True)
    value = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
    if SECOND > 0:
        value += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    tl.store(delta + which * queries + start + query, value, query < count)


@triton.jit
def _add_to_dq(
    q0, q1, g0, g1, lse, delta, k, v, k_row, v_row, count, dq0, dq1, scale,
    D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    key = tl.arange(0, KEYS)
    k0, k1 = pc.load(k, key, k_row, count, D, FIRST, SECOND, MASKED)
    v0, v1 = pc.load(v, key, v_row, count, D, FIRST, SECOND, MASKED)
    p = tl.exp2(pc.inner(q0, q1, k0, k1, SECOND, PRECISION) * scale - lse[:, None])
    if MASKED:
        # Not by the zeros of k alone: exp2(-lse) may be infinite.
        p = tl.where(key[None, :] < count, p, 0.0)
    ds = p * (pc.inner(g0, g1, v0, v1, SECOND, PRECISION) - delta[:, None])
    return pc.add_product(dq0, dq1, ds.to(k0.dtype), k0, k1, SECOND, PRECISION)


@triton.jit
def _dq_kernel(
    grad_o, q, k, v, lse, delta, dq, grad_o_batch, grad_o_row, q_batch, q_row, k_batch, k_row, v_batch, v_row,
    heads, queries, keys, scale,
    D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    QUERY_TAIL: tl.constexpr, KEY_TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head, which, start = _place(queries, heads, QUERIES)
    query = tl.arange(0, QUERIES)
    count = queries - start
    q += batch * q_batch + head * D + start.to(tl.int64) * q_row
    grad_o += batch * grad_o_batch + head * D + start.to(tl.int64) * grad_o_row
    k += batch * k_batch + head * D
    v += batch * v_batch + head * D
    q0, q1 = pc.load(q, query, q_row, count, D, FIRST, SECOND, QUERY_TAIL)
    g0, g1 = pc.load(grad_o, query, grad_o_row, count, D, FIRST, SECOND, QUERY_TAIL)
    lse += which * queries + start
    delta += which * queries + start
    if QUERY_TAIL:
        lse_value = tl.load(lse + query, query < count, other=0.0) * _LOG2_E
        delta_value = tl.load(delta + query, query < count, other=0.0)
    else:
        lse_value = tl.load(lse + query) * _LOG2_E
        delta_value = tl.load(delta + query)
    dq0, dq1 = pc.zeros(QUERIES, FIRST, SECOND)
    log2_scale = scale * _LOG2_E
    for _ in range(0, keys // KEYS):
        dq0, dq1 = _add_to_dq(
            q0, q1, g0, g1, lse_value, delta_value, k, v, k_row, v_row, KEYS, dq0, dq1, log2_scale,
            D, FIRST, SECOND, KEYS, False, PRECISION,
        )  # fmt: skip
        k += KEYS * k_row
        v += KEYS * v_row
    if KEY_TAIL:
        dq0, dq1 = _add_to_dq(
            q0, q1, g0, g1, lse_value, delta_value, k, v, k_row, v_row, keys % KEYS, dq0, dq1, log2_scale,
            D, FIRST, SECOND, KEYS, True, PRECISION,
        )  # fmt: skip
    dq0 = dq0 * scale
    if SECOND > 0:
        dq1 = dq1 * scale
    dq += ((batch * queries + start) * heads + head) * D
    pc.store(dq, query, heads * D, count, dq0, dq1, D, FIRST, SECOND, QUERY_TAIL)


@triton.jit
def _add_to_dkdv(
    k0, k1, v0, v1, q, grad_o, lse, delta, q_row, grad_o_row, count, dk0, dk1, dv0, dv1, scale,
    D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, QUERIES: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys are the rows of p and ds, so that both are left operands as they come.

    Rows of keys that do not exist may become infinite; they meet no other row and are not stored.
    """
    query = tl.arange(0, QUERIES)
    q0, q1 = pc.load(q, query, q_row, count, D, FIRST, SECOND, MASKED)
    g0, g1 = pc.load(grad_o, query, grad_o_row, count, D, FIRST, SECOND, MASKED)
    if MASKED:
        # A query that does not exist: p = exp2(0 - inf) = 0.
        lse_value = tl.load(lse + query, query < count, other=float("inf")) * _LOG2_E
        delta_value = tl.load(delta + query, query < count, other=0.0)
    else:
        lse_value = tl.load(lse + query) * _LOG2_E
        delta_value = tl.load(delta + query)
    p = tl.exp2(pc.inner(k0, k1, q0, q1, SECOND, PRECISION) * scale - lse_value[None, :])
    dv0, dv1 = pc.add_product(dv0, dv1, p.to(g0.dtype), g0, g1, SECOND, PRECISION)
    ds = p * (pc.inner(v0, v1, g0, g1, SECOND, PRECISION) - delta_value[None, :])
    dk0, dk1 = pc.add_product(dk0, dk1, ds.to(q0.dtype), q0, q1, SECOND, PRECISION)
    return dk0, dk1, dv0, dv1


@triton.jit
def _dkdv_kernel(
    grad_o, q, k, v, lse, delta, dk, dv, grad_o_batch, grad_o_row, q_batch, q_row, k_batch, k_row, v_batch, v_row,
    heads, queries, keys, scale,
    D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    QUERY_TAIL: tl.constexpr, KEY_TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    batch, head, which, start = _place(keys, heads, KEYS)
    key = tl.arange(0, KEYS)
    count = keys - start
    k += batch * k_batch + head * D + start.to(tl.int64) * k_row
    v += batch * v_batch + head * D + start.to(tl.int64) * v_row
    q += batch * q_batch + head * D
    grad_o += batch * grad_o_batch + head * D
    lse += which * queries
    delta += which * queries
    k0, k1 = pc.load(k, key, k_row, count, D, FIRST, SECOND, KEY_TAIL)
    v0, v1 = pc.load(v, key, v_row, count, D, FIRST, SECOND, KEY_TAIL)
    dk0, dk1 = pc.zeros(KEYS, FIRST, SECOND)
    dv0, dv1 = pc.zeros(KEYS, FIRST, SECOND)
    log2_scale = scale * _LOG2_E
    for _ in range(0, queries // QUERIES):
        dk0, dk1, dv0, dv1 = _add_to_dkdv(
            k0, k1, v0, v1, q, grad_o, lse, delta, q_row, grad_o_row, QUERIES, dk0, dk1, dv0, dv1, log2_scale,
            D, FIRST, SECOND, QUERIES, False, PRECISION,
        )  # fmt: skip
        q += QUERIES * q_row
        grad_o += QUERIES * grad_o_row
        lse += QUERIES
        delta += QUERIES
    if QUERY_TAIL:
        dk0, dk1, dv0, dv1 = _add_to_dkdv(
            k0, k1, v0, v1, q, grad_o, lse, delta, q_row, grad_o_row, queries % QUERIES, dk0, dk1, dv0, dv1, log2_scale,
            D, FIRST, SECOND, QUERIES, True, PRECISION,
        )  # fmt: skip
    dk0 = dk0 * scale
    if SECOND > 0:
        dk1 = dk1 * scale
    place = ((batch * keys + start) * heads + head) * D
    pc.store(dk + place, key, heads * D, count, dk0, dk1, D, FIRST, SECOND, KEY_TAIL)
    pc.store(dv + place, key, heads * D, count, dv0, dv1, D, FIRST, SECOND, KEY_TAIL)


def forward(q, k, v, o, lse, scale: float, *, capability: int = 90, config: Config | None = None) -> Launch:
    """o = softmax(scale q k^T) v and lse, the natural logarithm of the sum of exp(scale q k^T).

    q (B, N, H, d), k and v (B, M, H, d), of one dtype: fp32, bf16 or fp16; (H, d) contiguous, rows on 16 bytes. N, M
    and scale are positive. o like q and lse (B, H, N) fp32 are contiguous.
    """
    config = config or heuristic("forward", q.shape[3], q.shape[1], k.shape[1], q.element_size(), capability)
    arguments = {"q": q, "k": k, "v": v, "o": o, "lse": lse, **strides(q=q, k=k, v=v), "scale": float(scale)}
    return _launch(_forward_kernel, arguments, q, k, config, keys_are_kept=False)


def backward(
    grad_o,
    q,
    k,
    v,
    o,
    lse,
    delta,
    dq,
    dk,
    dv,
    scale: float,
    *,
    capability: int = 90,
    dq_config: Config | None = None,
    dkdv_config: Config | None = None,
) -> list[Launch]:
    """The launches, to be run in this order. grad_o as q in `forward`; delta (B, H, N) fp32 is a workspace.

    dq like q, dk and dv like k are contiguous; dq None, or dk and dv both None: not needed.
    """
    launches = [_delta(grad_o, o, delta)]
    sizes = q.shape[3], q.shape[1], k.shape[1], q.element_size(), capability
    inputs = {"grad_o": grad_o, "q": q, "k": k, "v": v, "lse": lse, "delta": delta, "scale": float(scale)}
    inputs |= strides(grad_o=grad_o, q=q, k=k, v=v)
    if dq is not None:
        config = dq_config or heuristic("dq", *sizes)
        launches.append(_launch(_dq_kernel, {**inputs, "dq": dq}, q, k, config, keys_are_kept=False))
    if dk is not None:
        config = dkdv_config or heuristic("dkdv", *sizes)
        launches.append(_launch(_dkdv_kernel, {**inputs, "dk": dk, "dv": dv}, q, k, config, keys_are_kept=True))
    return launches


def strides(**tensors) -> dict[str, int]:
    """Those of batches and of rows, by the kernels' names for them."""
    return {
        f"{name}_{of}": tensor.stride(i) for name, tensor in tensors.items() for i, of in enumerate(("batch", "row"))
    }


def _delta(grad_o, o, delta):
    batch, queries, heads, head_dim = o.shape
    first, second = pc.pieces(head_dim)
    sizes = {"heads": heads, "queries": queries, "D": head_dim, "FIRST": first, "SECOND": second, "QUERIES": 64}
    arguments = {"grad_o": grad_o, "o": o, "delta": delta, **strides(grad_o=grad_o), **sizes}
    return Launch(_delta_kernel, (cdiv(queries, 64) * batch * heads,), arguments)


def _launch(kernel, arguments, q, k, config, keys_are_kept):
    (batch, queries, heads, head_dim), keys = q.shape, k.shape[1]
    first, second = config.head_dim or pc.pieces(head_dim)
    query_rows, key_rows = (config.taken, config.kept) if keys_are_kept else (config.kept, config.taken)
    sizes = {
        "heads": heads,
        "queries": queries,
        "keys": keys,
        "D": head_dim,
        "FIRST": first,
        "SECOND": second,
        "QUERIES": query_rows,
        "KEYS": key_rows,
        "QUERY_TAIL": queries % query_rows != 0,
        "KEY_TAIL": keys % key_rows != 0,
        "PRECISION": config.precision if q.element_size() == 4 else "ieee",
    }
    grid = (cdiv(keys if keys_are_kept else queries, config.kept) * batch * heads,)
    return Launch(kernel, grid, {**arguments, **sizes}, config.num_warps, config.num_stages)


def counts(batch: int, queries: int, keys: int, heads: int, head_dim: int, itemsize: int) -> dict[str, tuple[int, int]]:
    """The bytes that the forward, and the backward, must move, and their FLOPs, nothing padded and nothing repeated.

    The backward reads grad_o, q, k, v, o and the log-sum-exp and writes three gradients; of its five products, the
    launches here do two twice.
    """
    query, key = batch * queries * heads * head_dim * itemsize, batch * keys * heads * head_dim * itemsize
    lse, product = 4 * batch * heads * queries, 2 * batch * heads * queries * keys * head_dim
    return {"forward": (2 * query + 2 * key + lse, 2 * product), "backward": (4 * query + 4 * key + lse, 5 * product)}
