"""An adapter with dropout in front: the mask is drawn again from the generator's state, not kept.

It is the mask that PEFT draws from the same state, except where activations are channels_last: there some layers of
diffusers' fall back to the contiguous format and ours do not, and a mask is drawn in the order of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from rftcore.blocks.program import Kind
from rftcore.ops import Geometry
from rftcore.ops.autocast import lowered
from rftcore.ops.frozen_conv2d import conv2d_grad_x


@dataclass(frozen=True)
class DroppedAdapter(Kind):
    """y + scale b a dropout(n), as PEFT adds an adapter with lora_dropout while it trains.

    Inputs n and y; n (..., in), or an image where there is a geometry. Parameters a and b.
    """

    cheap: ClassVar[bool] = False
    p: float
    scale: float = field(compare=False)
    geometry: Geometry | None = None

    def reads(self, needs):
        return (0,) if any(needs[2:]) else (), (), False

    def forward(self, inputs, parameters, lower, state=None):
        n, y = inputs
        a, b = (t.to(lowered(t, lower)) for t in parameters)
        if state is None:
            # The strides that dropout's own noise has.
            like = n.shape, torch.empty_like(n, device="meta").stride(), parameters[0].dtype, n.device
            state = _generator_state(n.device), like
            mask = self._draw(like)
        else:
            mask = self._drawn_again(state)
        h = self._shrink((n.to(parameters[0].dtype) * mask).to(a.dtype), a)
        return (y + self._expand(h, b).mul_(self.scale).to(y.dtype),), (), state

    def backward(self, grads, inputs, outputs, statistics, parameters, state, needs, lower):
        (grad,) = grads
        n, (a, b) = inputs[0], (t.to(lowered(t, lower)) for t in parameters)
        needs_n, needs_y, needs_a, needs_b = needs
        mask, g = self._drawn_again(state), grad.to(a.dtype)
        # None where no gradient is wanted that reads it.
        dropped: Any = None if n is None else (n.to(parameters[0].dtype) * mask).to(a.dtype)
        grad_n = grad_a = grad_b = None
        if self.geometry is None:
            below = (g @ b) * self.scale  # (..., r)
            if needs_n:
                grad_n = (below @ a).to(mask.dtype) * mask
            if needs_a:
                grad_a = below.flatten(0, -2).t() @ dropped.flatten(0, -2)
            if needs_b:
                grad_b = (g.flatten(0, -2).t() @ self._shrink(dropped, a).flatten(0, -2)) * self.scale
        else:
            narrow, pointwise = self._geometries()
            shape, strides, *_ = state[1]
            memory_format = torch.channels_last if strides[1] == 1 and shape[1] > 1 else torch.contiguous_format
            size = shape[2:]
            below = conv2d_grad_x(g, b, pointwise, g.shape[2:], memory_format) * self.scale  # (N, r, H', W')
            if needs_n:
                grad_n = conv2d_grad_x(below, a, narrow, size, memory_format).to(mask.dtype) * mask
            if needs_a:
                grad_a = conv2d_weight(dropped, a.shape, below, *narrow)
            if needs_b:
                grad_b = conv2d_weight(self._shrink(dropped, a), b.shape, g, *pointwise) * self.scale
        found = (None if t is None else t.to(p.dtype) for t, p in zip((grad_a, grad_b), parameters, strict=True))
        return [grad_n, grad if needs_y else None, *found]

    def _geometries(self) -> tuple[Geometry, Geometry]:
        """Of the convolutions by a and by b."""
        whole = cast(Geometry, self.geometry)
        return Geometry(whole.stride, whole.padding), Geometry(groups=whole.groups)

    def _shrink(self, n: Tensor, a: Tensor) -> Tensor:
        return F.linear(n, a) if self.geometry is None else F.conv2d(n, a, None, *self._geometries()[0])

    def _expand(self, h: Tensor, b: Tensor) -> Tensor:
        return F.linear(h, b) if self.geometry is None else F.conv2d(h, b, None, *self._geometries()[1])

    def _draw(self, like) -> Tensor:
        """What dropout multiplies by: 0, or 1 / (1 - p)."""
        shape, strides, dtype, device = like
        ones = torch.empty_strided(shape, strides, dtype=dtype, device=device).fill_(1)
        return F.dropout(ones, self.p, training=True)

    def _drawn_again(self, state) -> Tensor:
        generator, like = state
        with _restored(generator, like[-1]):
            return self._draw(like)


def _generator_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_generator_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@contextmanager
def _restored(state: Tensor, device: torch.device) -> Iterator[None]:
    """The default generator as it was then, for the length of a block."""
    before = _generator_state(device)
    _set_generator_state(state, device)
    try:
        yield
    finally:
        _set_generator_state(before, device)
