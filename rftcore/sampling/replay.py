"""An autograd node whose forward keeps no graph and whose backward replays it piece by piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Program(Protocol):
    """What the node runs. `leaves` are all the tensors that may receive a gradient."""

    def forward(self, leaves: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Runs without grad. Returns (differentiable outputs, constant outputs, what the replay needs)."""

    def backward(
        self, leaves: Sequence[Tensor], saved: Sequence[Tensor], grads: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradient of each leaf, given those of the differentiable outputs."""


def run(program: Program, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Runs `program` as one node of the graph; returns its differentiable, then its constant outputs."""
    return _Replayed.apply(program, *leaves)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, program: Program, *leaves: Tensor) -> tuple[Tensor, ...]:
        differentiable, constant, saved = program.forward(leaves)
        ctx.program = program
        ctx.leaf_count = len(leaves)
        ctx.differentiable_count = len(differentiable)
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)
        # The parameters are saved for their version check: an optimizer step between forward and backward would
        # replay another model.
        ctx.save_for_backward(*leaves, *saved)
        return (*differentiable, *constant)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        leaves, saved = tensors[: ctx.leaf_count], tensors[ctx.leaf_count :]
        needed = ctx.needs_input_grad[1:]
        return (None, *ctx.program.backward(leaves, saved, grads[: ctx.differentiable_count], needed))


def check_differentiable(reached: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """Raises ValueError unless something that the gradient reaches requires it, and everything can be saved for it."""
    if not any(tensor.requires_grad for tensor in reached):
        raise ValueError(
            "a gradient is asked for (grad mode is on), but nothing that it reaches requires grad: add an adapter with "
            "unet.add_adapter(LoraConfig(...)), or unet.requires_grad_(True); to run without a gradient use "
            "torch.no_grad(), or sample with backprop_steps=0."
        )
    if any(tensor.is_inference() for tensor in leaves):
        raise ValueError(
            "latents or embeddings were made under torch.inference_mode, whose tensors no gradient can pass: make them "
            "under torch.no_grad() instead."
        )


def check_reached(gradients: Sequence[Tensor | None], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises RuntimeError when trainable parameters were given and the replays reached none of them."""
    if parameters and all(gradient is None for gradient in gradients):
        raise RuntimeError(
            f"the gradient reached none of the {len(parameters)} trainable parameters, {next(iter(parameters))!r} among "
            "them: the UNet ran without its adapters (merged, fused, disabled, or another one active), what is "
            "trainable is not used, or it was switched off since (PEFT's switches take requires_grad away). Unmerge "
            "and enable the adapter that is to be trained, until after backward()."
        )


class GradientSum:
    """Sums the gradients of several replays, in fp32 where the tensors are of a lower precision."""

    def __init__(self, like: Sequence[Tensor]) -> None:
        self._dtypes = [tensor.dtype for tensor in like]
        self._sums: list[Tensor | None] = [None] * len(like)

    def add(self, grads: Sequence[Tensor | None]) -> None:
        for index, grad in enumerate(grads):
            if grad is None:
                continue
            wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
            if (total := self._sums[index]) is None:
                # A copy where nothing was widened: what autograd hands out may be shared between two inputs.
                self._sums[index] = wide.clone() if wide is grad else wide
            else:
                total += wide

    def clear(self) -> None:
        """Back to zero, in the same memory."""
        for total in self._sums:
            if total is not None:
                total.zero_()

    def result(self) -> list[Tensor | None]:
        return [None if s is None else s.to(dtype) for s, dtype in zip(self._sums, self._dtypes, strict=True)]


def replay_parameters(
    parameters: Mapping[str, nn.Parameter], own: bool = False
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The tensors to differentiate a replay by, one for each parameter, and those to swap in by name.

    Args:
        own: whether an alias is made of every parameter.

    A parameter stands for itself, unless it has a tensor hook: `torch.autograd.grad` would run the hook on the
    replay's share of the gradient, and autograd runs it again on the sum. Then an alias of it is swapped in.
    """
    swapped = {name: p.detach().requires_grad_() for name, p in parameters.items() if own or p._backward_hooks}
    return [swapped.get(name, parameter) for name, parameter in parameters.items()], swapped


def gradients(
    outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor],
    retain_graph: bool = False,
) -> list[Tensor | None]:
    """`torch.autograd.grad`, with None for inputs that are constants or not reached, and for outputs without grad."""
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    if not pairs or not wanted:
        return [None] * len(inputs)
    outputs, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, grads, retain_graph=retain_graph, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in inputs]
