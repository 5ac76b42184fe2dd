"""Attention, its log-sum-exp, and its backward from them: probabilities are never kept."""

import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.backends import cuda as switches

from rftcore.ops import backends, compiled, cpu_attention, fused_attention

aten = torch.ops.aten


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, backend: str = "auto") -> Tensor:
    """softmax(q k^T scale) v, the stock `scaled_dot_product_attention` without mask, dropout and causality.

    Saves q, k, v, the output and the log-sum-exp of each row; the backward does not rerun the forward. Gradients flow,
    exactly and once, to those of q, k and v that require one. Autocast casts the inputs as it does PyTorch's.

    Args:
        q: (B, heads, N, d), fp64, fp32, bf16 or fp16, any strides, such as a (B, N, heads * d) tensor's view.
        k, v: (B, heads, M, d), of q's dtype.
        scale: None: 1 / sqrt(d).
        backend: "auto", "cpu", "flash", "cudnn", "efficient", "math", "triton" or "reference".
            `torch.nn.attention.sdpa_kernel` switches PyTorch's off, and "cpu" with "flash", for the forward; the
            backward is that of the forward's backend. "reference" keeps probabilities.

    Shapes: (B, heads, N, d).
    Raises: ValueError for inputs that do not fit; RuntimeError where `backend` cannot serve them.
    """
    q, k, v = _autocast(q, k, v)
    check(q, k, v)
    scale = _scale(q, scale)
    backend = OP.choose(backend, q, k, v)
    if backend == "reference":
        return attention_reference(q, k, v, scale)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        return _Attention.apply(q, k, v, scale, backend)
    return _KERNELS[backend].forward(q, k, v, scale)[0]


def attention_reference(q, k, v, scale) -> Tensor:
    """The specification, in plain PyTorch. Arguments as in `attention`, unchecked."""
    return _math_forward(q, k, v, scale)[0]


@torch.no_grad()
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The output of `attention` and its log-sum-exp, for `attention_backward`; no autograd.

    The inputs are not cast by autocast: they are what a backward will be given again.

    Shapes: (B, heads, N, d), and (B, heads, N), fp32 (fp64 with fp64 inputs), on CUDA padded as its kernel wants it.
    """
    check(q, k, v)
    return run_forward(kernel_of(backend, q, k, v), q, k, v, _scale(q, scale))


@torch.no_grad()
def attention_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float | None = None,
    *,
    needs: tuple[bool, bool, bool] = (True, True, True),
    backend: str = "auto",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of q, k and v from what `attention_forward` returned; None where `needs` is False; no autograd.

    Args:
        backend: the one that made `o` and `lse`. "auto" finds it again only under the forward's `sdpa_kernel`.
    """
    check(q, k, v)
    return run_backward(kernel_of(backend, q, k, v), grad_o, q, k, v, o, lse, _scale(q, scale), needs)


def kernel_of(backend: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    """The name of the kernel that serves these inputs here and now, for `run_forward` and `run_backward`.

    "reference" has the formulas of "math".
    """
    backend = OP.choose(backend, q, k, v)
    return "math" if backend == "reference" else backend


@torch.no_grad()
def run_forward(kernel: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`attention_forward` by the kernel of this name, whatever `sdpa_kernel` says now: for a pass that is repeated."""
    return _KERNELS[kernel].forward(q, k, v, scale)


@torch.no_grad()
def run_backward(kernel, grad_o, q, k, v, o, lse, scale, needs):
    """`attention_backward` by the kernel of this name, whatever `sdpa_kernel` says now."""
    grads = _KERNELS[kernel].backward(grad_o, q, k, v, o, lse, scale, needs)
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


class _Attention(torch.autograd.Function):
    """Saves the inputs, the output and the log-sum-exp."""

    @staticmethod
    def forward(ctx, q, k, v, scale, backend):
        o, lse = _KERNELS[backend].forward(q, k, v, scale)
        ctx.options = scale, backend
        ctx.save_for_backward(q, k, v, o, lse)
        return o

    @staticmethod
    def backward(ctx, grad_o):
        scale, kernel = ctx.options
        grads = compiled.backward(
            _AttentionBackward, kernel, grad_o, *ctx.saved_tensors, scale, ctx.needs_input_grad[:3]
        )
        return *grads, None, None


class _AttentionBackward(torch.autograd.Function):
    """The backward as a node of its own, so that differentiating it again is an error."""

    @staticmethod
    def forward(ctx, kernel, *inputs):
        return run_backward(kernel, *inputs)

    @staticmethod
    def backward(ctx, *grads):
        raise compiled.differentiated_twice("attention")


class _Kernel(NamedTuple):
    """forward(q, k, v, scale) -> (o, lse); backward(grad_o, q, k, v, o, lse, scale, needs) -> (dq, dk, dv)."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor | None, Tensor | None, Tensor | None]]


def _no_autocast(device: torch.device):
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _math_forward(q, k, v, scale):
    dtype = compiled.maths_dtype(q)
    with _no_autocast(q.device):
        logits = q.to(dtype) @ k.to(dtype).mT * scale  # (B, heads, N, M)
        lse = logits.logsumexp(-1)
        o = (logits - lse[..., None]).exp() @ v.to(dtype)
    return o.to(q.dtype), lse


def _math_backward(grad_o, q, k, v, o, lse, scale, needs):
    dtype, stored = lse.dtype, q.dtype
    grad_o, q, k, v, o = (t.to(dtype) for t in (grad_o, q, k, v, o))
    with _no_autocast(q.device):
        p = (q @ k.mT * scale - lse[..., None]).exp()  # (B, heads, N, M)
        grad_v = p.mT @ grad_o if needs[2] else None
        grad_logits = p.mul_(grad_o @ v.mT - (grad_o * o).sum(-1, keepdim=True)).mul_(scale)
        grad_q = grad_logits @ k if needs[0] else None
        grad_k = grad_logits.mT @ q if needs[1] else None
    return tuple(None if grad is None else grad.to(stored) for grad in (grad_q, grad_k, grad_v))


def _rows(*tensors: Tensor) -> list[Tensor]:
    """With neighbouring elements in each row: the fused kernels read nothing else, and do not say so on the CPU."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _flash_forward(q, k, v, scale):
    q, k, v = _rows(q, k, v)
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]


def _flash_backward(grad_o, q, k, v, o, lse, scale, needs):
    tensors = *_rows(grad_o, q, k, v), o, lse
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, 0.0, False, scale=scale)
    # Read for dropout only, as are the seed and offset of the other kernels.
    seed, offset = q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)
    return aten._scaled_dot_product_flash_attention_backward(
        *tensors, None, None, q.shape[2], k.shape[2], 0.0, False, seed, offset, scale=scale
    )


def _cudnn_forward(q, k, v, scale):
    return aten._scaled_dot_product_cudnn_attention(*_rows(q, k, v), None, True, scale=scale)[:2]


def _cudnn_backward(grad_o, q, k, v, o, lse, scale, needs):
    seed, offset = q.new_empty((), dtype=torch.int64), q.new_empty((), dtype=torch.int64)
    return aten._scaled_dot_product_cudnn_attention_backward(
        *_rows(grad_o, q, k, v), o, lse, seed, offset, None, None, None, q.shape[2], k.shape[2], 0.0, False, scale=scale
    )


def _efficient_forward(q, k, v, scale):
    return aten._scaled_dot_product_efficient_attention(*_rows(q, k, v), None, True, scale=scale)[:2]


def _efficient_backward(grad_o, q, k, v, o, lse, scale, needs):
    grad_o, q, k, v = _rows(grad_o, q, k, v)
    seed, offset = q.new_empty((), dtype=torch.int64), q.new_empty((), dtype=torch.int64)
    return aten._scaled_dot_product_efficient_attention_backward(
        grad_o, q, k, v, None, o, lse, seed, offset, 0.0, [*needs, False], scale=scale
    )[:3]


_KERNELS = {
    "cpu": _Kernel(cpu_attention.forward, cpu_attention.backward),
    "flash": _Kernel(_flash_forward, _flash_backward),
    "cudnn": _Kernel(_cudnn_forward, _cudnn_backward),
    "efficient": _Kernel(_efficient_forward, _efficient_backward),
    "triton": _Kernel(fused_attention.forward, fused_attention.backward),
    "math": _Kernel(_math_forward, _math_backward),
}


def _switched_off(kernel: str) -> list[str]:
    """Why `sdpa_kernel` keeps a kernel from serving."""
    return [] if _is_on(kernel) else ["it is switched off by torch.nn.attention.sdpa_kernel or torch.backends.cuda"]


def _is_on(kernel: str) -> bool:
    return getattr(switches, f"{kernel}_sdp_enabled")()


# torch.compile reads it while it traces: torch.compiler.assume_constant_result, without the import of dynamo.
_is_on._dynamo_marked_constant = True  # type: ignore[attr-defined]  # functions take attributes


def _fused_reasons(kernel: str, devices: tuple[str, ...], can_use: Callable[..., bool]) -> Callable:
    """`not_supported_reasons` of a fused kernel. On CUDA the last word is PyTorch's own check `can_use`."""

    def not_supported_reasons(q, k, v):
        found = backends.transform_reasons() + _switched_off(kernel)
        if q.device.type not in devices:
            return [*found, f"it serves {' and '.join(devices)} tensors, q is on {q.device}"]
        if q.numel() == 0 or k.numel() == 0:
            found.append(f"there is nothing to attend to: q is {tuple(q.shape)}, k is {tuple(k.shape)}")
        if q.device.type == "cuda" and not found:
            if not switches.is_built():
                found.append("this PyTorch is built without CUDA")
            # Stock SDPA pads to a multiple of 8 before its kernels; here they are called themselves.
            elif q.shape[-1] % 8:
                found.append(f"the head dimension {q.shape[-1]} is not a multiple of 8")
            elif not can_use(switches.SDPAParams(q, k, v, None, 0.0, False, False)):
                found.append(f"torch.backends.cuda.{can_use.__name__} refuses this input; with debug=True it says why")
        return found

    return not_supported_reasons


def _heuristic(q, k, v):
    return (cpu_attention if q.device.type == "cpu" else fused_attention).heuristic(q, k, v)


OP = backends.register(
    backends.Op(
        "attention",
        {
            "cpu": lambda q, k, v: _switched_off("flash") + cpu_attention.reasons(q, k, v),
            "flash": _fused_reasons("flash", ("cpu", "cuda"), switches.can_use_flash_attention),
            "cudnn": _fused_reasons("cudnn", ("cuda",), switches.can_use_cudnn_attention),
            "efficient": _fused_reasons("mem_efficient", ("cuda",), switches.can_use_efficient_attention),
            "triton": fused_attention.reasons,
            "math": lambda q, k, v: backends.transform_reasons() + _switched_off("math"),
            "reference": lambda q, k, v: _switched_off("math"),
        },
        lambda device, dtype: tuple(torch.empty(2, 8, n, 40, device=device, dtype=dtype) for n in (4096, 77, 77)),
        fused_attention.key,
        _heuristic,
    )
)


def _scale(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast casts the inputs of PyTorch's attention: to its dtype, but for fp64."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 or not t.is_floating_point() else t.to(dtype) for t in tensors)


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises: ValueError where these are not an attention's inputs; the kernels do not look."""
    compiled.check_tensor("attention", "q", q)
    if q.dim() != 4:
        raise ValueError(f"attention: q is {tuple(q.shape)}; it must be (B, heads, N, d).")
    keys: Any = k.shape[2] if k.dim() == 4 else "M"
    for name, tensor in (("k", k), ("v", v)):
        compiled.check_like("attention", name, tensor, (*q.shape[:2], keys, q.shape[3]), q.device, "q")
        if tensor.dtype != q.dtype:
            raise ValueError(f"attention: {name} is {tensor.dtype}, q {q.dtype}; convert it: {name}.to(q.dtype).")
