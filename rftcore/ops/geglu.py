"""The gated GELU of a transformer's feed-forward, and its backward."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from rftcore.ops import backends, compiled


def geglu(u: Tensor, *, backend: str = "auto") -> Tensor:
    """u[..., :D] * gelu(u[..., D:]) with the exact (erf) GELU, computed in fp32 (fp64 with an fp64 input).

    Saves u only. The gradient flows to u, exactly and once.

    Args:
        u: (..., 2D), fp64, fp32, bf16 or fp16; diffusers' GEGLU projection: hidden states first, gate second.
        backend: "auto", "cpu" or "reference".

    Shapes: (..., D), contiguous.
    Raises: ValueError for inputs that do not fit; RuntimeError where `backend` cannot serve them.
    """
    compiled.check_tensor("geglu", "u", u)
    if u.dim() == 0 or u.shape[-1] % 2:
        raise ValueError(f"geglu: u is {tuple(u.shape)}; it must be (..., 2D): hidden states, then gate.")
    if OP.choose(backend, u) == "reference":
        return geglu_reference(u)
    if torch.is_grad_enabled() and u.requires_grad:
        return _GEGLU.apply(u)
    return _forward(u)


def geglu_reference(u: Tensor) -> Tensor:
    """The specification, in plain PyTorch."""
    hidden, gate = u.to(compiled.maths_dtype(u)).chunk(2, dim=-1)
    return (hidden * F.gelu(gate)).to(u.dtype)


@torch.no_grad()
def geglu_forward(u: Tensor, backend: str) -> Tensor:
    """The output of `geglu` by the backend of this name, which serves u; no autograd."""
    return _forward(u) if backend == "cpu" else geglu_reference(u)


@torch.no_grad()
def geglu_backward(grad_y: Tensor, u: Tensor, backend: str) -> Tensor:
    """The gradient of u; no autograd."""
    compiled.check_gradient("geglu", grad_y, u)
    if backend == "cpu":
        return _backward(grad_y, u)
    return compiled.differentiate(geglu_reference, (u,), (True,), grad_y)[0]


class _GEGLU(torch.autograd.Function):
    """Saves u; the backward recomputes the rest."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return _forward(u)

    @staticmethod
    def backward(ctx, grad_y):
        return compiled.backward(_GEGLUBackward, grad_y, *ctx.saved_tensors)


class _GEGLUBackward(torch.autograd.Function):
    """The backward as a node of its own, so that differentiating it again is an error."""

    @staticmethod
    def forward(ctx, grad_y, u):
        return _backward(grad_y, u)

    @staticmethod
    def backward(ctx, grad_u):
        raise compiled.differentiated_twice("geglu")


def _output(u):
    return u.new_empty((*u.shape[:-1], u.shape[-1] // 2))


def _gradient(grad_y, u):
    return u.new_empty(u.shape)


def _problem(u):
    return compiled.DTYPES[u.dtype], math.prod(u.shape[:-1]), u.shape[-1] // 2


def _launch_forward(u):
    y, u = _output(u), u.contiguous()
    compiled.launch("geglu_forward", u.device, *_problem(u), u.data_ptr(), y.data_ptr())
    return y


def _launch_backward(grad_y, u):
    grad_u, grad_y, u = _gradient(grad_y, u), grad_y.contiguous(), u.contiguous()
    compiled.launch("geglu_backward", u.device, *_problem(u), u.data_ptr(), grad_y.data_ptr(), grad_u.data_ptr())
    return grad_u


_forward = compiled.define("geglu(Tensor u) -> Tensor", _launch_forward, _output, ["CPU"])
_backward = compiled.define("geglu_backward(Tensor grad_y, Tensor u) -> Tensor", _launch_backward, _gradient, ["CPU"])

OP = backends.register(
    backends.Op(
        "geglu",
        {"cpu": compiled.reasons("_cpu", "cpu", "u"), "reference": lambda u: []},
        lambda device, dtype: (torch.empty(2, 4096, 2560, device=device, dtype=dtype),),
    )
)
