"""LoRA adapters of projections on the CPU: all of them in one call forward, and in one backward."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils import flop_counter

from rftcore.ops import autocast, compiled
from rftcore.ops.projections import Norm, Projection, adapters_of


def arguments(projections: Sequence[Projection], lower: torch.dtype | None) -> tuple[list, ...]:
    """Of all adapters, as the compiled functions take them: a, b, scale, place of the output, and code of the dtype.

    Each adapter's a, b, input and gradient are rounded to its dtype; sums are fp32, or fp64 where any tensor is.
    """
    adapters = adapters_of(projections)
    return (
        [adapter.a for adapter in adapters],
        [adapter.b for adapter in adapters],
        [adapter.scale for adapter in adapters],
        [i for i, p in enumerate(projections) for _ in p.adapters],
        [compiled.DTYPES[autocast.lowered(adapter.a, lower)] for adapter in adapters],
    )


def _launch_add(outputs, n, a, b, scales, places, dtypes, residual):
    n, *matrices = (t.contiguous() for t in (n, *a, *b))
    residual = None if residual is None else residual.contiguous()
    compiled.launch(
        "lora_add", n.device, math.prod(n.shape[:-1]), n.shape[-1], compiled.vector(n),
        _structs(matrices, scales, places, dtypes),
        [(y.shape[-1], compiled.vector(y), compiled.vector(residual)) for y in outputs],
    )  # fmt: skip


def _change_grads(n, grads, a, b, scales, places, dtypes, needs, grad_n):
    """As the op, but grad_n is changed in place."""
    if n is None and any(needs):
        raise ValueError("lora_grads: n is None; the gradients of a and b are made of it.")
    found = _gradients_of(a, b, needs)
    own = iter(found)
    vectors = [compiled.vector(next(own) if want else None) for want in needs]
    n = None if n is None else n.contiguous()
    grads, matrices = [grad.contiguous() for grad in grads], [t.contiguous() for t in (*a, *b)]
    compiled.launch(
        "lora_grads", grads[0].device, math.prod(grads[0].shape[:-1]), a[0].shape[1], compiled.vector(n),
        _structs(matrices, scales, places, dtypes, vectors),
        [(grad.shape[-1], compiled.vector(grad)) for grad in grads], compiled.vector(grad_n),
    )  # fmt: skip
    return found if grad_n is None else [grad_n, *found]


def _launch_grads(n, grads, a, b, scales, places, dtypes, needs, grad_n):
    copied = None if grad_n is None else grad_n.clone(memory_format=torch.contiguous_format)
    return _change_grads(n, grads, a, b, scales, places, dtypes, needs, copied)


def _fake_grads(n, grads, a, b, scales, places, dtypes, needs, grad_n):
    found = _gradients_of(a, b, needs)
    return found if grad_n is None else [grad_n.new_empty(grad_n.shape), *found]


def _gradients_of(a, b, needs):
    """Uninitialised gradients of the a and b that need one: of each adapter's a, then its b."""
    matrices = (t for pair in zip(a, b, strict=True) for t in pair)
    return [t.new_empty(t.shape) for t, want in zip(matrices, needs, strict=True) if want]


def _structs(matrices, scales, places, dtypes, grads=None):
    """csrc/common/lora_linear.h's adapters; `matrices`: all a, then all b; `grads`: vectors, an a's, then its b's."""
    count = len(scales)
    grads = grads or [(0, 0)] * (2 * count)
    return [
        (
            places[i], matrices[i].shape[0], dtypes[i], scales[i],
            compiled.vector(matrices[i]), compiled.vector(matrices[count + i]), grads[2 * i], grads[2 * i + 1],
        )
        for i in range(count)
    ]  # fmt: skip


# The outputs are contiguous, and changed in place.
add = compiled.define(
    "lora_add(Tensor(a!)[] outputs, Tensor n, Tensor[] a, Tensor[] b, float[] scales, int[] places, int[] dtypes, "
    "Tensor? residual) -> ()",
    _launch_add, lambda *arguments: None, ["CPU"],
)  # fmt: skip
# The sum of grad_n, where it is given, and what the adapters add to it; then the gradients that are needed. An op that
# returns a list may not change an argument: grad_n changes in place past the dispatcher only, and is contiguous.
gradients = compiled.define(
    "lora_grads(Tensor? n, Tensor[] grads, Tensor[] a, Tensor[] b, float[] scales, int[] places, int[] dtypes, "
    "bool[] needs, Tensor? grad_n) -> Tensor[]",
    _launch_grads, _fake_grads, ["CPU"], in_place=_change_grads,
)  # fmt: skip


def _add_flops(outputs, n, a, b, scales, places, dtypes, residual, **others) -> int:
    """Multiplications and additions, from shapes: down to the rank and up from it."""
    rows = math.prod(n[:-1])
    return sum(2 * rows * (math.prod(a_) + math.prod(b_)) for a_, b_ in zip(a, b, strict=True))


def _grads_flops(n, grads, a, b, scales, places, dtypes, needs, grad_n, **others) -> int:
    """The gradient of what a makes of n; a's, b's, for which that is made again, and what the gradient of n receives."""
    rows = math.prod(grads[0][:-1])
    of_a, of_b = (sum(2 * rows * math.prod(t) for t in own) for own in (a, b))
    needs_a, needs_b = any(needs[::2]), any(needs[1::2])
    return of_b + needs_b * (of_a + of_b) + needs_a * of_a + (grad_n is not None) * of_a


# Without them PyTorch's counter would take these products for free.
flop_counter.register_flop_formula(torch.ops.rftcore.lora_add)(_add_flops)
flop_counter.register_flop_formula(torch.ops.rftcore.lora_grads)(_grads_flops)

# The rank of a projection's adapters, on average, up to which the compiled functions are the faster ones. Speed against
# PyTorch's products, forward / backward, one thread of an EPYC with AVX-512, 128 to 8192 rows of 320 to 1280, one
# projection and three. fp32, rank 4: 1.2 to 5 / 3.4 to 10 times, 16: 1.1 to 3 / 1.2 to 3, 32: 1.1 to 1.5 / 1.1 to 1.4,
# 64: 1.1 to 1.5 / 0.8 to 1.2. fp64, fp16 and fp32 adapters on a bf16 base gain more. All in bf16, for which PyTorch has
# instructions of its own there, rank 4: 0.6 to 2 / 1 to 2.5, 8: 0.6 to 2 / 0.8 to 2, 16: 0.3 to 1.7 / 0.5 to 1.7.
_HIGHEST_RANK, _HIGHEST_RANK_IN_BF16 = 32, 4

_of_compiled = compiled.reasons("_cpu", "cpu", "x")


def reasons(
    x: Tensor, projections: Sequence[Projection] = (), lower: torch.dtype | None = None, norm: Norm | None = None
) -> list[str]:
    """Why the compiled functions do not serve these projections; PyTorch's products serve any."""
    found = _of_compiled(x)
    adapters = adapters_of(projections)
    if not adapters:
        found.append("no projection has an adapter, and without one it is a product of PyTorch's")
        return found
    tensors = [t for p in projections for t in (p.weight, *(adapter.a for adapter in p.adapters))]
    in_bf16 = all(autocast.lowered(t, lower) == torch.bfloat16 for t in tensors)
    highest = _HIGHEST_RANK_IN_BF16 if in_bf16 else _HIGHEST_RANK
    ranks = sum(adapter.a.shape[0] for adapter in adapters)
    if ranks > highest * len(projections):
        found.append(
            f"its adapters have rank {ranks / len(projections):g} a projection; over {highest}"
            f"{', all in bf16,' if in_bf16 else ''} PyTorch's products are faster"
        )
    return found
