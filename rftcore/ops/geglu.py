"""The gated GELU of a transformer's feed-forward, and its backward."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rftcore.ops import backends, compiled, jit
from rftcore.ops.measured import bucket


def geglu(u: Tensor, *, backend: str = "auto") -> Tensor:
    """u[..., :D] * gelu(u[..., D:]) with the exact (erf) GELU, computed in fp32 (fp64 with an fp64 input).

    Saves u only. The gradient flows to u, exactly and once.

    Args:
        u: (..., 2D), fp64, fp32, bf16 or fp16; diffusers' GEGLU projection: hidden states first, gate second.
        backend: "auto", "cpu", "triton", "torch" (PyTorch's own operations, which round in between) or "reference".

    Shapes: (..., D), contiguous.
    Raises: ValueError for inputs that do not fit; RuntimeError where `backend` cannot serve them.
    """
    compiled.check_tensor("geglu", "u", u)
    if u.dim() == 0 or u.shape[-1] % 2:
        raise ValueError(f"geglu: u is {tuple(u.shape)}; it must be (..., 2D): hidden states, then gate.")
    backend = OP.choose(backend, u)
    if backend == "reference":
        return geglu_reference(u)
    if torch.is_grad_enabled() and u.requires_grad:
        return _GEGLU.apply(u, backend)
    return _forward(u, backend)


def geglu_reference(u: Tensor) -> Tensor:
    """The specification, in plain PyTorch."""
    hidden, gate = u.to(compiled.maths_dtype(u)).chunk(2, dim=-1)
    return (hidden * F.gelu(gate)).to(u.dtype)


@torch.no_grad()
def geglu_forward(u: Tensor, backend: str) -> Tensor:
    """The output of `geglu` by the backend of this name, which serves u; no autograd."""
    return geglu_reference(u) if backend == "reference" else _forward(u, backend)


@torch.no_grad()
def geglu_backward(grad_y: Tensor, u: Tensor, backend: str) -> Tensor:
    """The gradient of u; no autograd."""
    compiled.check_gradient("geglu", grad_y, u)
    if backend == "reference":
        return compiled.differentiate(geglu_reference, (u,), (True,), grad_y)[0]
    return _backward(grad_y, u, backend)


class _GEGLU(torch.autograd.Function):
    """Saves u; the backward recomputes the rest."""

    @staticmethod
    def forward(ctx, u, backend):
        ctx.backend = backend
        ctx.save_for_backward(u)
        return _forward(u, backend)

    @staticmethod
    def backward(ctx, grad_y):
        return compiled.backward(_GEGLUBackward, grad_y, *ctx.saved_tensors, ctx.backend), None


class _GEGLUBackward(torch.autograd.Function):
    """The backward as a node of its own, so that differentiating it again is an error."""

    @staticmethod
    def forward(ctx, grad_y, u, backend):
        return _backward(grad_y, u, backend)

    @staticmethod
    def backward(ctx, grad_u):
        raise compiled.differentiated_twice("geglu")


def _output(u, backend):
    return u.new_empty((*u.shape[:-1], u.shape[-1] // 2))


def _gradient(grad_y, u, backend):
    return u.new_empty(u.shape)


def _problem(u):
    return compiled.DTYPES[u.dtype], math.prod(u.shape[:-1]), u.shape[-1] // 2


def _launch_forward(u, backend):
    if backend == "torch":
        hidden, gate = u.chunk(2, dim=-1)
        return (hidden * F.gelu(gate)).contiguous()
    y, u = _output(u, backend), u.contiguous()
    if backend == "triton":
        config = jit.config("geglu.Config", OP.winner(u))
        jit.run(u.device, jit.kernels("geglu").forward(jit.rows(u), jit.rows(y), config))
    else:
        compiled.launch("geglu_forward", u.device, *_problem(u), u.data_ptr(), y.data_ptr())
    return y


def _launch_backward(grad_y, u, backend):
    if backend == "torch":
        hidden, gate = u.chunk(2, dim=-1)
        return torch.cat([grad_y * F.gelu(gate), torch.ops.aten.gelu_backward(grad_y * hidden, gate)], dim=-1)
    grad_u, grad_y, u = _gradient(grad_y, u, backend), grad_y.contiguous(), u.contiguous()
    if backend == "triton":
        config = jit.config("geglu.Config", OP.winner(u))
        jit.run(u.device, jit.kernels("geglu").backward(jit.rows(grad_y), jit.rows(u), jit.rows(grad_u), config))
    else:
        compiled.launch("geglu_backward", u.device, *_problem(u), u.data_ptr(), grad_y.data_ptr(), grad_u.data_ptr())
    return grad_u


_DEVICES = ["CPU", "CUDA"]
_forward = compiled.define("geglu(Tensor u, str backend) -> Tensor", _launch_forward, _output, _DEVICES)
_backward = compiled.define(
    "geglu_backward(Tensor grad_y, Tensor u, str backend) -> Tensor", _launch_backward, _gradient, _DEVICES
)

OP = backends.register(
    backends.Op(
        "geglu",
        {
            "cpu": compiled.reasons("_cpu", "cpu", "u"),
            "triton": jit.reasons("u"),
            "torch": compiled.torch_reasons("u"),
            "reference": lambda u: [],
        },
        lambda device, dtype: (torch.empty(2, 4096, 2560, device=device, dtype=dtype),),
        lambda u: f"{u.dtype} {bucket(math.prod(u.shape[:-1]))} x {u.shape[-1]}",
    )
)
