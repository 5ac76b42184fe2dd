"""`attention` as Triton launches: of many keys, and of the few of a text, which stay on chip."""

from __future__ import annotations

import torch
from torch import Tensor

from rftcore.ops import backends, compiled, jit
from rftcore.ops.measured import bucket

_MAX_HEAD_DIM, _FEW_KEYS = 160, 128  # the kernels'

_of_triton = jit.reasons("q")


def reasons(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Why the kernels do not serve these inputs."""
    found = _of_triton(q)
    if q.numel() == 0 or k.numel() == 0:
        found.append(f"there is nothing to attend to: q is {tuple(q.shape)}, k is {tuple(k.shape)}")
    elif q.shape[-1] % 8 or q.shape[-1] > _MAX_HEAD_DIM:
        found.append(f"the head dimension {q.shape[-1]} is not a multiple of 8 up to {_MAX_HEAD_DIM}")
    return found


def heuristic(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Where nothing was measured: PyTorch's kernels pad few keys and loop over them; of many they are hard to beat."""
    return "triton" if k.shape[2] <= _FEW_KEYS else None


def key(q: Tensor, k: Tensor, v: Tensor) -> str:
    """What measurements tell inputs apart by."""
    batch, heads, queries, head_dim = q.shape
    return f"{q.dtype}, {bucket(batch * heads)} x {bucket(queries)} x {head_dim}, {k.shape[2]} keys"


def _run_forward(q, k, v, scale):
    o, lse = _outputs(q, k, v, scale)
    kernels, kind, config = _kernels(q, k, v)
    inputs = [_ready(t) for t in (q, k, v)]
    of_chip = {"capability": jit.capability(q.device), "config": config(f"{kind}.Config:forward")}
    jit.run(q.device, kernels.forward(*inputs, o.transpose(1, 2), lse, scale, **of_chip))
    return o, lse


def _run_backward(grad_o, q, k, v, o, lse, scale, needs):
    grads = _gradients(grad_o, q, k, v, o, lse, scale, needs)
    kernels, kind, config = _kernels(q, k, v)
    dq, dk, dv = (_tokens(grad) if grad.numel() else None for grad in grads)
    # The kernels make both of dk and dv, or neither.
    if dk is None and dv is not None:
        dk = torch.empty_like(dv)
    if dv is None and dk is not None:
        dv = torch.empty_like(dk)
    grad_o, q, k, v = (_ready(t) for t in (grad_o, q, k, v))
    lse = lse.contiguous()
    chip = jit.capability(q.device)
    if kind == "cross_attention" and q.shape[3] <= kernels.MAX_BACKWARD_HEAD_DIM:
        tiles = config("cross_attention.Config:backward")
        shape = None if dk is None else kernels.partials_shape(q, k, capability=chip, config=tiles)
        partials = None if shape is None else q.new_empty(shape, dtype=torch.float32)
        launches = kernels.backward(grad_o, q, k, v, lse, dq, dk, dv, partials, scale, capability=chip, config=tiles)
    else:
        # Of few keys too, where sums over all of them would not stay on chip.
        kernels, delta = jit.kernels("attention"), torch.empty_like(lse)
        tiles = {"dq_config": config("attention.Config:dq"), "dkdv_config": config("attention.Config:dkdv")}
        o = _tokens(o).contiguous()
        launches = kernels.backward(grad_o, q, k, v, o, lse, delta, dq, dk, dv, scale, capability=chip, **tiles)
    jit.run(q.device, *launches)
    return grads


def _kernels(q, k, v):
    """The module that serves these inputs, its name, and the way from a Config's name to measured tile sizes."""
    kind = "cross_attention" if k.shape[2] <= _FEW_KEYS else "attention"
    winner = backends.OPS["attention"].winner(q, k, v)
    return jit.kernels(kind), kind, lambda name: jit.config(name, winner)


def _tokens(tensor: Tensor) -> Tensor:
    """(B, heads, N, d) as (B, N, heads, d), as the kernels take it."""
    return tensor.transpose(1, 2)


def _ready(tensor: Tensor) -> Tensor:
    """The same, with each row contiguous and on 16 bytes; a copy where it is laid out otherwise."""
    rows = _tokens(tensor)
    batch, row, head, last = rows.stride()
    wide = 16 // rows.element_size()
    fits = last == 1 and (head == rows.shape[3] or rows.shape[2] == 1) and row % wide == 0 and batch % wide == 0
    return rows if fits and rows.data_ptr() % 16 == 0 else rows.clone(memory_format=torch.contiguous_format)


def _empty_like(tensor: Tensor) -> Tensor:
    """Uninitialised (B, heads, N, d), rows of tokens in memory, as a projection takes them."""
    batch, heads, tokens, head_dim = tensor.shape
    return tensor.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def _outputs(q, k, v, scale):
    return _empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _gradients(grad_o, q, k, v, o, lse, scale, needs):
    """Uninitialised; empty where not needed."""
    return tuple(_empty_like(t) if need else t.new_empty(0) for t, need in zip((q, k, v), needs, strict=True))


_forward = compiled.define(
    "attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)", _run_forward, _outputs, ["CPU", "CUDA"]
)
_backward = compiled.define(
    "attention_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
    _run_backward, _gradients, ["CPU", "CUDA"],
)  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """o (B, heads, N, d) and the log-sum-exp (B, heads, N), fp32."""
    sign, scale = _sign(scale)
    return _forward(q if sign == 1 else q * sign, k, v, scale)


def backward(grad_o, q, k, v, o, lse, scale, needs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k and v; None where not needed."""
    sign, scale = _sign(scale)
    grads = _backward(grad_o, q if sign == 1 else q * sign, k, v, o, lse, scale, list(needs))
    dq, dk, dv = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return dq if dq is None or sign == 1 else dq * sign, dk, dv


def _sign(scale: float) -> tuple[int, float]:
    """Of q, and a positive scale: the kernels find the largest logit before they scale it."""
    return (1, float(scale)) if scale > 0 else (-1, -float(scale)) if scale < 0 else (0, 1.0)
