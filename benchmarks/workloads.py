"""The ops at the shapes of SD1.5, SDXL and their VAE, each with what it replaces and what it must move and compute."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rftcore import ops
from rftcore.ops.backends import OPS

GROUPS, EPS = 32, 1e-5


class Work(NamedTuple):
    """What a pass cannot do without: bytes of device memory, and floating-point operations of its matrix products."""

    bytes: int
    flops: int = 0


@dataclasses.dataclass(frozen=True)
class Workload:
    """One op at one shape.

    Attributes:
        op: its name among the ops; shape: in words.
        inputs: makes fresh random inputs; those that require grad get a gradient.
        ours: op(inputs, backend); stock: the eager chain that it replaces.
        question: what the op's backends are asked of inputs.
        forward, backward: what each pass must do.
        references: further forward passes to compare with, by name; given inputs, each prepares a call.
    """

    op: str
    shape: str
    inputs: Callable[[], list[Tensor]]
    ours: Callable[[Sequence[Tensor], str], Tensor]
    stock: Callable[[Sequence[Tensor]], Tensor]
    question: Callable[[Sequence[Tensor]], tuple]
    forward: Work
    backward: Work
    references: dict[str, Callable[[Sequence[Tensor]], Callable[[], object]]] = dataclasses.field(default_factory=dict)

    def backends(self, inputs: Sequence[Tensor]) -> list[str]:
        """Those that serve these inputs, without the specification."""
        question = self.question(inputs)
        names = OPS[self.op].not_supported_reasons
        return [name for name, reasons in names.items() if name != "reference" and not reasons(*question)]


def workloads(dtype: torch.dtype, device: torch.device, small: bool = False) -> list[Workload]:
    """All of them; `small`: one of each op and size that even the interpreter of the kernels can do."""
    make = Maker(dtype, device)
    if small:
        return [
            make.group_norm_silu(1, 32, 4, 4),
            make.geglu(8, 32),
            make.sampler_step(2, 8, 8),
            make.lora_qkv(16, 32, 4),
            make.out_projection(16, 32, 4),
            make.gated_linear(16, 32),
            make.attention(1, 2, 16, 16, 40),
            make.attention(1, 2, 16, 77, 40),
        ]
    return [
        # ResNets of SD1.5 at 8 sample-evals and of SDXL at 4; the VAE's decoder at 4 images of 512 px.
        *(make.group_norm_silu(8, c, s, s) for c, s in ((320, 64), (640, 32), (1280, 16), (1280, 8))),
        *(make.group_norm_silu(4, c, s, s) for c, s in ((320, 128), (640, 64), (1280, 32))),
        *(make.group_norm_silu(4, c, s, s) for c, s in ((512, 64), (512, 128), (256, 256), (128, 512))),
        *(make.geglu(8 * n, c) for n, c in ((4096, 1280), (1024, 2560), (256, 5120))),
        *(make.geglu(4 * n, c) for n, c in ((4096, 2560), (1024, 5120))),
        make.sampler_step(8, 64, 64),
        make.sampler_step(4, 128, 128),
        *(make.lora_qkv(8 * n, c, 4) for n, c in ((4096, 320), (1024, 640), (256, 1280))),
        *(make.lora_qkv(4 * n, c, 16) for n, c in ((4096, 640), (1024, 1280))),
        *(make.out_projection(8 * n, c, 4) for n, c in ((4096, 320), (1024, 640), (256, 1280))),
        *(make.gated_linear(8 * n, c) for n, c in ((4096, 320), (1024, 640), (256, 1280))),
        *(make.gated_linear(4 * n, c) for n, c in ((4096, 640), (1024, 1280))),
        *(make.attention(8, 8, n, n, d) for n, d in ((4096, 40), (1024, 80), (256, 160))),
        *(make.attention(4, h, n, n, 64) for n, h in ((4096, 10), (1024, 20))),
        *(make.attention(8, 8, n, 77, d) for n, d in ((4096, 40), (1024, 80), (256, 160))),
        *(make.attention(4, h, n, 77, 64) for n, h in ((4096, 10), (1024, 20))),
    ]


class Maker:
    """Makes workloads of one dtype on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._options = {"dtype": dtype, "device": device}
        self._size = dtype.itemsize

    def group_norm_silu(self, n: int, channels: int, height: int, width: int) -> Workload:
        """As in a ResNet under a LoRA: frozen scale and bias, the time embedding before it, channels_last."""
        bytes_of_x = n * channels * height * width * self._size

        def inputs():
            x = self._normal(n, channels, height, width).to(memory_format=torch.channels_last).requires_grad_()
            return [x, 1 + self._normal(channels) / 2, self._normal(channels), self._normal(n, channels)]

        def ours(tensors, backend):
            x, weight, bias, add = tensors
            return ops.group_norm_silu(x, weight, bias, GROUPS, EPS, channel_bias=add, backend=backend)

        def stock(tensors):
            x, weight, bias, add = tensors
            return F.silu(F.group_norm(x + add[:, :, None, None], GROUPS, weight, bias, EPS))

        return Workload(
            "group_norm_silu", f"({n}, {channels}, {height}, {width})", inputs, ours, stock, _first,
            Work(2 * bytes_of_x), Work(3 * bytes_of_x),
        )  # fmt: skip

    def geglu(self, rows: int, columns: int) -> Workload:
        unit = rows * columns * self._size

        def stock(tensors):
            hidden, gate = tensors[0].chunk(2, dim=-1)
            return hidden * F.gelu(gate)

        return Workload(
            "geglu", f"({rows}, {2 * columns})", lambda: [self._normal(rows, 2 * columns).requires_grad_()],
            lambda tensors, backend: ops.geglu(*tensors, backend=backend), stock, _first, Work(3 * unit), Work(5 * unit),
        )  # fmt: skip

    def sampler_step(self, n: int, height: int, width: int) -> Workload:
        """Guided, with noise and log-probability; sample and noise in fp32."""
        device = self._options["device"]
        elements = n * 4 * height * width
        # x0 of x and m, its clip, the mean of x0, x and m, sigma, eps of m, guidance.
        coefficients = torch.tensor([1.2, -0.7, math.inf, 0.5, 0.6, -0.1, 0.1, 1.0, 7.5], device=device)

        def inputs():
            sample, noise = (torch.randn(n, 4, height, width, device=device) for _ in range(2))
            return [sample.requires_grad_(), self._normal(2 * n, 4, height, width).requires_grad_(), noise]

        def ours(tensors, backend):
            sample, output, noise = tensors
            return ops.sampler_step(sample, output, coefficients, noise=noise, backend=backend)[:2]

        def stock(tensors):
            sample, output, noise = tensors
            return ops.sampler_step_reference(sample, output, coefficients, noise)[:2]

        return Workload(
            "sampler_step", f"({n}, 4, {height}, {width})", inputs, ours, stock, lambda tensors: tensors[:2],
            Work(elements * (3 * 4 + 2 * self._size)), Work(elements * (4 * 4 + 4 * self._size)),
        )  # fmt: skip

    def lora_qkv(self, rows: int, width: int, rank: int) -> Workload:
        """LayerNorm, queries, keys and values, with trained adapters. The bare product beside it is cuBLAS's."""

        def inputs():
            found = [self._normal(rows, width).requires_grad_(), 1 + self._normal(width) / 2, self._normal(width)]
            for _ in range(3):
                found += [self._weight(width, width), *self._adapter(width, width, rank)]
            return found

        def parts(tensors):
            x, weight, bias, *others = tensors
            projections = [
                ops.Projection(w, None, (ops.Adapter(a, b, 1.0),))
                for w, a, b in zip(others[::3], others[1::3], others[2::3], strict=True)
            ]
            return x, projections, ops.Norm(weight, bias, EPS)

        flops = 2 * rows * width * 3 * width
        bytes_of_all = (4 * rows * width + 3 * width * width) * self._size
        return Workload(
            "lora_linear", f"LN + q, k, v ({rows}, {width}), r={rank}", inputs,
            lambda tensors, backend: ops.lora_linears(*parts(tensors), backend=backend),
            lambda tensors: ops.lora_linears_reference(*parts(tensors)),
            lambda tensors: (*parts(tensors)[:2], None, parts(tensors)[2]),
            Work(bytes_of_all, flops), Work(bytes_of_all + rows * width * self._size, flops),
            {"base product": _product},
        )  # fmt: skip

    def out_projection(self, rows: int, width: int, rank: int) -> Workload:
        """The projection behind an attention, with bias and a trained adapter."""

        def inputs():
            x = self._normal(rows, width).requires_grad_()
            return [x, self._weight(width, width), *self._adapter(width, width, rank), self._normal(width)]

        def parts(tensors):
            x, weight, a, b, bias = tensors
            return x, (ops.Projection(weight, bias, (ops.Adapter(a, b, 1.0),)),), None

        work = Work((2 * rows * width + width * width) * self._size, 2 * rows * width * width)
        return Workload(
            "lora_linear", f"out ({rows}, {width}), r={rank}", inputs,
            lambda tensors, backend: ops.lora_linears(*parts(tensors), backend=backend),
            lambda tensors: ops.lora_linears_reference(*parts(tensors)),
            lambda tensors: (*parts(tensors)[:2], None),
            work, work._replace(bytes=work.bytes + rows * width * self._size), {"base product": _product},
        )  # fmt: skip

    def gated_linear(self, rows: int, width: int) -> Workload:
        """LayerNorm, the feed-forward's first projection and its gate; the backward computes the projection again."""

        def inputs():
            x = self._normal(rows, width).requires_grad_()
            norm = 1 + self._normal(width) / 2, self._normal(width)
            return [x, self._weight(8 * width, width), self._normal(8 * width), *norm]

        def parts(tensors):
            x, weight, bias, *norm = tensors
            return x, ops.Projection(weight, bias), ops.Norm(*norm, EPS)

        def stock(tensors):
            hidden, gate = ops.lora_linears_reference(*_listed(*parts(tensors)))[0].chunk(2, dim=-1)
            return hidden * F.gelu(gate)

        flops = 2 * rows * width * 8 * width
        forward = (5 * rows * width + 8 * width * width) * self._size
        backward = (7 * rows * width + 8 * width * width) * self._size
        return Workload(
            "gated_linear", f"LN + FF1 + GEGLU ({rows}, {width})", inputs,
            lambda tensors, backend: ops.gated_linear(*parts(tensors), backend=backend), stock,
            lambda tensors: (*parts(tensors)[:2], None, parts(tensors)[2]),
            Work(forward, flops), Work(backward, 2 * flops), {"base product": _product},
        )  # fmt: skip

    def attention(self, batch: int, heads: int, queries: int, keys: int, head_dim: int) -> Workload:
        """Of views into (B, N, heads d) tensors, as projections leave them."""

        def inputs():
            sizes = (queries, keys, keys)
            return [self._normal(batch, n, heads * head_dim).requires_grad_() for n in sizes]

        def split(tensors):
            return tuple(t.unflatten(-1, (heads, head_dim)).transpose(1, 2) for t in tensors)

        bytes_of_all = 2 * batch * heads * (queries + keys) * head_dim * self._size
        flops = 4 * batch * heads * queries * keys * head_dim
        return Workload(
            "attention", f"({batch}, {heads}, {queries}, {head_dim}), {keys} keys", inputs,
            lambda tensors, backend: ops.attention(*split(tensors), backend=backend),
            lambda tensors: F.scaled_dot_product_attention(*split(tensors)), split,
            Work(bytes_of_all, flops), Work(2 * bytes_of_all, 5 * flops // 2),
        )  # fmt: skip

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, **self._options)

    def _weight(self, out: int, width: int) -> Tensor:
        return self._normal(out, width) / width**0.5

    def _adapter(self, out: int, width: int, rank: int) -> list[Tensor]:
        return [(self._normal(*shape) / width**0.5).requires_grad_() for shape in ((rank, width), (out, rank))]


def _listed(x, projection, norm):
    return x, (projection,), norm


def _first(tensors: Sequence[Tensor]) -> tuple:
    return (tensors[0],)


def _product(tensors: Sequence[Tensor]) -> Callable[[], Tensor]:
    """x by the frozen weights as one matrix, and nothing else."""
    x, *others = tensors
    weight = torch.cat([t for t in others if t.dim() == 2 and not t.requires_grad])
    return lambda: F.linear(x.detach(), weight)
