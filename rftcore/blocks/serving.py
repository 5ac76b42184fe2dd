"""How a block is served: its place in the accelerated module, what was asked for, and the way to its own forward."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rftcore.blocks import cutting, fusion, levels, modules
from rftcore.blocks.builder import Builder
from rftcore.blocks.modules import Unserved
from rftcore.blocks.program import Program, run
from rftcore.blocks.served import served
from rftcore.ops import autocast, backends
from rftcore.ops.compiled import DTYPES


class Chooser(Protocol):
    """What divides a budget among layers: `budget.Budget`."""

    def drop(self, name: str, program: Program, parameters, x: Tensor, lower, given: bool) -> frozenset[str] | None: ...


@dataclasses.dataclass
class Serving:
    """What the blocks of one accelerated module share.

    Attributes:
        recompute: a level of `levels`, or "auto".
        backends: of an op's name, the backend asked for.
        refusals: of a block's name, why its last call ran its own forward.
        budget: chooses what a layer makes again where `recompute` is "auto"; None for a block copied out of its model.
        drops: a level or, of a layer's name, the values that it makes again, in place of both; None: they decide.
        given: of a layer's name, its output, made beforehand, as `once.given` sets it.
    """

    recompute: str
    backends: dict[str, str]
    refusals: dict[str, str] = dataclasses.field(default_factory=dict)
    budget: Chooser | None = None
    drops: Mapping[str, frozenset[str]] | str | None = None
    given: Mapping[str, Tensor] | None = None


def servings(module: nn.Module) -> list[Serving]:
    """Of what is accelerated inside `module`, each model's."""
    found = {id(ours.place.serving): ours.place.serving for block in module.modules() if (ours := served(block))}
    return list(found.values())


@contextlib.contextmanager
def setting(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute of every serving inside `module`, and takes it back.

    Raises: ValueError where nothing is accelerated.
    """
    found = servings(module)
    if not found:
        raise ValueError(f"module={type(module).__name__} is not accelerated; call rftcore.accelerate(module) first.")
    before = [getattr(serving, name) for serving in found]
    for serving in found:
        setattr(serving, name, value)
    try:
        yield
    finally:
        for serving, value_before in zip(found, before, strict=True):
            setattr(serving, name, value_before)


@dataclasses.dataclass
class Place:
    """One block of an accelerated module."""

    serving: Serving
    name: str

    def builder(self, *inputs: str) -> Builder:
        return Builder(inputs, self.serving.backends, self.serving.given)

    def run(self, builder: Builder, inputs: Sequence[Tensor]) -> Tensor:
        """The block's program on these inputs.

        Raises:
            ValueError: for inputs that are not floating point or not where the block's weights are.
        """
        self.served()
        return self._run(builder, inputs, None)

    def evaluate(self, builder: Builder, inputs: Sequence[Tensor]) -> Tensor:
        """The same outside of a call of the block: it keeps what takes a matrix product, and nothing is noted."""
        return self._run(builder, inputs, frozenset())

    def _run(self, builder: Builder, inputs: Sequence[Tensor], drop: frozenset[str] | None) -> Tensor:
        program, parameters, inputs = builder.program, builder.parameters, [*inputs, *builder.taken.values()]
        _check(self.name, program.inputs, inputs, parameters)
        _check_rows(self.name, builder.taken, inputs[0].shape[0])
        if drop is None:
            drop = self._drop(program, inputs, parameters)
        given, before = dict(zip(program.inputs, inputs, strict=True)), inputs[0]
        for part, places in cutting.cut(program, drop):
            tensors = [before, *(given[name] for name in part.inputs[1:])]
            own = parameters[places.start : places.stop]
            # Of the tensors alone: without a graph, too, the steps are those that a replay with one takes, bit for bit.
            needs = fusion.wants(tensors, own)
            before = run(fusion.fuse(part, needs, drop), tensors, own, drop)
        return before

    def _drop(self, program: Program, inputs: Sequence[Tensor], parameters) -> frozenset[str]:
        """The values to make again."""
        if len(program.steps) == 1:
            return frozenset()
        if not torch.is_grad_enabled():
            return levels.drop(program, "block")
        recompute, budget, drops = self.serving.recompute, self.serving.budget, self.serving.drops
        if isinstance(drops, str):
            return levels.drop(program, drops)
        if drops is not None:
            return drops.get(self.name, frozenset())
        if recompute != "auto":
            return levels.drop(program, recompute)
        lower = autocast.active(inputs[0].device)
        chosen = None
        if budget is not None:
            chosen = budget.drop(self.name, program, parameters, inputs[0], lower, bool(self.serving.given))
        # A block that the budget does not know of keeps the least there is.
        return levels.drop(program, "block") if chosen is None else chosen

    def served(self) -> None:
        """Notes that the last call was served, and with it the blocks inside."""
        refusals = self.serving.refusals
        if not refusals:
            return
        for name in [name for name in refusals if name == self.name or name.startswith(f"{self.name}.")]:
            del refusals[name]

    def stock(self, block: nn.Module, reason: str, *args, **kwargs):
        """The block's own forward, with the reason kept for the report."""
        self.serving.refusals[self.name] = reason
        return type(block).forward(block, *args, **kwargs)


def check_call(*tensors: Tensor | None) -> None:
    """Raises: Unserved where PyTorch does something with a call on these tensors that no program can stand for."""
    if reasons := backends.transform_reasons():
        raise Unserved("; ".join(reasons))
    modules.check_global_hooks()
    for tensor in tensors:
        if tensor is not None and type(tensor) not in modules.TENSORS:
            raise Unserved(f"it was called with a {type(tensor).__name__}")


def _check(name: str, names: Sequence[str], inputs: Sequence[Tensor], parameters: Sequence[Tensor | None]) -> None:
    device = next((p.device for p in parameters if p is not None), inputs[0].device)
    for argument, tensor in zip(names, inputs, strict=True):
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{name}: {argument} is {tensor.dtype}; it must be fp64, fp32, bf16 or fp16. "
                "Convert it: .to(torch.float32)."
            )
        if tensor.device != device:
            raise ValueError(
                f"{name}: {argument} is on {tensor.device}, its weights are on {device}; move one of them."
            )


def _check_rows(name: str, taken: Mapping[str, Tensor], rows: int) -> None:
    """Raises: ValueError where the values of another number of rows are given."""
    for value, tensor in taken.items():
        # Of an embedding, one row may stand for all.
        if tensor.shape[0] != rows and not (tensor.dim() == 2 and tensor.shape[0] == 1):
            raise ValueError(
                f"{name}: {value} is given as {tuple(tensor.shape)}, for {rows} rows; give once.given the rows that "
                "the model is called with, such as tensor[:rows]."
            )
