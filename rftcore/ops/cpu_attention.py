"""`attention` in C++, for CPU tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils import flop_counter

from rftcore import build
from rftcore.ops import compiled

_of_module = compiled.reasons("_cpu", "cpu", "q")
_SIMD = None if build.why_not_loaded("_cpu") else build.load("_cpu").build_info()["simd"]
# Matrices of bf16 and fp16 in hardware, which PyTorch's kernel uses.
_AMX = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def reasons(q: Tensor, k: Tensor, v: Tensor) -> list[str]:
    """Why the kernel does not serve these inputs."""
    found = _of_module(q)
    if q.numel() == 0 or k.numel() == 0:
        found.append(f"there is nothing to attend to: q is {tuple(q.shape)}, k is {tuple(k.shape)}")
    return found


def heuristic(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """The backend that serves CPU tensors faster; None: this one.

    Against PyTorch's kernel on one Zen 4 core, 2 x 8 heads, fp32: with 1024 to 4096 keys 1.5 (head dimension 16), 1.3
    (32, 40) and 1.2 (64) times as fast forward and 2, 1.5 and 1.4 backward; with 77 keys 2.5 (16), 1.95 (32) and 1.8
    (40) forward, 1.5, 1.3 and 1.3 backward. In bf16 and fp16 1.2 or more, with AVX2's registers 1.15 or more.
    """
    vectors = _SIMD in ("avx2", "avx512f")  # 0.25 to 0.7 times as fast with smaller ones
    enough = q.shape[2] >= 16  # 0.35 times as fast with one query: a vector is of queries
    short = q.shape[3] <= 256  # 1.1 times as fast at 512, with twice the error: products are added one by one
    alone = q.dtype in (torch.float32, torch.float64) or not _AMX  # not measured
    return None if vectors and enough and short and alone else "flash"


def _problem(q, k, scale):
    return compiled.DTYPES[q.dtype], *q.shape[:3], k.shape[2], q.shape[3], scale


def _heads(tensor: Tensor) -> tuple[int, ...]:
    """A csrc/common/attention.h `Heads`."""
    return tensor.data_ptr(), *tensor.stride()


def _run_forward(q, k, v, scale):
    o, lse = _outputs(q, k, v, scale)
    heads = (_heads(t) for t in (q, k, v, o))
    compiled.launch("attention_forward", q.device, *_problem(q, k, scale), *heads, lse.data_ptr())
    return o, lse


def _run_backward(grad_o, q, k, v, o, lse, scale, needs):
    grads = _gradients(grad_o, q, k, v, o, lse, scale, needs)
    lse = lse.contiguous()
    given = (_heads(t) for t in (q, k, v, grad_o, o))
    wanted = (_heads(grad) if need else (0,) * 5 for grad, need in zip(grads, needs, strict=True))
    compiled.launch("attention_backward", q.device, *_problem(q, k, scale), *given, lse.data_ptr(), *wanted)
    return grads


def _empty_like(tensor: Tensor) -> Tensor:
    """Uninitialised (B, heads, N, d), rows of tokens in memory, as a projection takes them."""
    batch, heads, tokens, head_dim = tensor.shape
    return tensor.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)


def _outputs(q, k, v, scale):
    return _empty_like(q), q.new_empty(q.shape[:3], dtype=compiled.maths_dtype(q))


def _gradients(grad_o, q, k, v, o, lse, scale, needs):
    """Uninitialised; empty where not needed."""
    return tuple(_empty_like(t) if need else t.new_empty(0) for t, need in zip((q, k, v), needs, strict=True))


_forward = compiled.define(
    "cpu_attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)", _run_forward, _outputs, ["CPU"]
)
_backward = compiled.define(
    "cpu_attention_backward(Tensor grad_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale, "
    "bool[] needs) -> (Tensor, Tensor, Tensor)",
    _run_backward, _gradients, ["CPU"],
)  # fmt: skip


def _forward_flops(q, k, v, scale, **others) -> int:
    """Of the two products, from shapes."""
    return 4 * math.prod(q) * k[2]


def _backward_flops(grad_o, q, k, v, o, lse, scale, needs, **others) -> int:
    """Scores again, their gradients where q or k needs one, and a product for each gradient."""
    return 2 * (1 + (needs[0] or needs[1]) + sum(needs)) * math.prod(q) * k[2]


# Without them PyTorch's counter would take these products for free.
flop_counter.register_flop_formula(torch.ops.rftcore.cpu_attention)(_forward_flops)
flop_counter.register_flop_formula(torch.ops.rftcore.cpu_attention_backward)(_backward_flops)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """o (B, heads, N, d) and the log-sum-exp (B, heads, N), fp32, fp64 with fp64 inputs."""
    return _forward(q, k, v, float(scale))


def backward(grad_o, q, k, v, o, lse, scale, needs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k and v; None where not needed."""
    grads = _backward(grad_o, q, k, v, o, lse, float(scale), list(needs))
    of_q, of_k, of_v = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return of_q, of_k, of_v
