"""A block as a list of steps: run forward, and backward with some values kept and the others made again.

Autograd keeps what each of its nodes happens to read. Here a whole block is one node, every intermediate value has a
name, and what is kept is decided for the block at once: what the backward reads and is not kept is made again from what
is. Without further say (`drop`) exactly those values are kept that only a matrix product or a convolution can make.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from rftcore.ops import autocast, compiled


class Kind:
    """What a step does. Hashable, without tensors; `lower` is autocast's dtype, or None.

    Attributes:
        cheap: whether its outputs are made again rather than kept: it is no matrix product and no convolution.
    """

    cheap: ClassVar[bool]

    def reads(self, needs: Sequence[bool]) -> tuple[Sequence[int], Sequence[int], bool]:
        """Which inputs, which outputs, and whether the statistics are read by the backward.

        Args:
            needs: which inputs and parameters, in this order, want a gradient.
        """
        raise NotImplementedError

    def unread(self) -> Sequence[int]:
        """Positions of parameters of which the backward reads no more than the dtype."""
        return ()

    def forward(self, inputs, parameters, lower, state=None) -> tuple[Sequence[Tensor], Sequence[Tensor], Any]:
        """Outputs, statistics, and a small state for the backward; given that state, the same once more."""
        raise NotImplementedError

    def backward(self, grads, inputs, outputs, statistics, parameters, state, needs, lower) -> Sequence[Tensor | None]:
        """Gradients of inputs and parameters, None where not needed. What `reads` does not name is None here.

        `grads` have the outputs' dtypes; gradients of inputs are cast to theirs by the caller.
        """
        raise NotImplementedError


class Step(NamedTuple):
    """One operation of a block.

    Attributes:
        inputs, outputs: names of values.
        statistics: names of what else it makes for its backward, small beside the outputs.
        parameters: positions among the program's parameters.
    """

    kind: Kind
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    statistics: tuple[str, ...]
    parameters: range


class Program(NamedTuple):
    """The steps of a block. The last step's output is the block's; their parameters follow one another.

    Attributes:
        boundaries: names of values with which one block inside ends and another begins.
    """

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    boundaries: tuple[str, ...] = ()

    @property
    def output(self) -> str:
        return self.steps[-1].outputs[0]


class Plan(NamedTuple):
    """What a program keeps and what its backward makes again, for one way of needing gradients.

    Attributes:
        kept: names of the values to keep.
        remade: positions of the steps that run again.
        remembered: names that are wanted more than once: not to be made a third time.
        needs: for each step, which of its inputs and parameters want a gradient.
        read_parameters: positions of the parameters whose values the backward reads.
        released: for each step, the names that the forward needs no longer after it.
    """

    kept: tuple[str, ...]
    remade: frozenset[int]
    remembered: frozenset[str]
    needs: tuple[tuple[bool, ...], ...]
    read_parameters: frozenset[int]
    released: tuple[tuple[str, ...], ...]


def needs_of_steps(program: Program, needs: tuple[bool, ...]) -> list[tuple[bool, ...]]:
    """For each step, which of its inputs and parameters want a gradient, where `needs` says which of the program's do."""
    wanted = dict(zip(program.inputs, needs, strict=False))
    found = []
    for step in program.steps:
        own = (*(wanted[name] for name in step.inputs), *(needs[len(program.inputs) + i] for i in step.parameters))
        wanted.update(dict.fromkeys(step.outputs, any(own)))
        found.append(own)
    return found


def read_by_backward(program: Program, needs: tuple[bool, ...]) -> frozenset[str]:
    """The values that the steps' backwards read, kept or made again."""
    read: set[str] = set()
    for step, own in zip(program.steps, needs_of_steps(program, needs), strict=True):
        if any(own):
            of_inputs, of_outputs, statistics = step.kind.reads(own)
            read.update(step.inputs[i] for i in of_inputs)
            read.update(step.outputs[i] for i in of_outputs)
            read.update(step.statistics if statistics else ())
    return frozenset(read)


@functools.lru_cache(maxsize=1024)
def plan(program: Program, needs: tuple[bool, ...], drop: frozenset[str]) -> Plan:
    """Decides what is kept.

    Args:
        needs: which inputs and parameters of the program require a gradient.
        drop: names of values to be made again at the price of a matrix product or a convolution.
    """
    steps, inputs = program.steps, program.inputs
    step_needs = needs_of_steps(program, needs)
    read = read_by_backward(program, needs)

    # What can be had again at a price that is accepted.
    remakeable = {*inputs, *drop}
    for step in steps:
        if step.kind.cheap and all(name in remakeable or name in read for name in step.inputs):
            remakeable.update(step.outputs)
    outputs = {name: i for i, step in enumerate(steps) for name in step.outputs}
    kept = {name for name in read if name in inputs or (name in outputs and name not in remakeable)}
    remade: set[int] = set()

    wanted_again = list(read & outputs.keys())
    while wanted_again:
        name = wanted_again.pop()
        if name in inputs:
            kept.add(name)
        elif name not in kept and outputs[name] not in remade:
            remade.add(outputs[name])
            wanted_again += steps[outputs[name]].inputs
    for i, step in enumerate(steps):
        # A step that runs again brings its statistics with it.
        kept.update(name for name in step.statistics if name in read and i not in remade)

    read_parameters = {
        place
        for i, step in enumerate(steps)
        for position, place in enumerate(step.parameters)
        if i in remade or (any(step_needs[i]) and position not in step.kind.unread())
    }
    readers = collections.Counter(name for i in remade for name in steps[i].inputs)
    last_use = {name: i for i, step in enumerate(steps) for name in (*step.inputs, *step.outputs, *step.statistics)}
    released = tuple(
        tuple(name for name, last in last_use.items() if last == i and name not in kept and name != program.output)
        for i in range(len(steps))
    )
    remembered = read | {name for name, count in readers.items() if count > 1}
    return Plan(
        tuple(sorted(kept)),
        frozenset(remade),
        frozenset(remembered),
        tuple(step_needs),
        frozenset(read_parameters),
        released,
    )


def run(
    program: Program, inputs: Sequence[Tensor], parameters: Sequence[Tensor | None], drop: frozenset[str]
) -> Tensor:
    """The program's output, differentiable with respect to inputs and parameters."""
    lower = autocast.active(inputs[0].device)
    tensors = (*inputs, *parameters)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _Program.apply((program, drop, lower), *tensors)
    nothing = plan(program, (False,) * len(tensors), frozenset())
    with autocast.disabled(inputs[0].device) if lower is not None else contextlib.nullcontext():
        return execute(program, tensors, nothing.released, lower)[0][program.output]


def execute(
    program: Program, tensors: Sequence[Tensor | None], released: Sequence[Sequence[str]], lower: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, torch.dtype], list]:
    """The values that `released` leaves, and the dtypes of all, by name; and the steps' states. No autograd."""
    count = len(program.inputs)
    # None are parameters alone.
    inputs, parameters = cast(Sequence[Tensor], tensors[:count]), tensors[count:]
    values = dict(zip(program.inputs, inputs, strict=True))
    dtypes = {name: tensor.dtype for name, tensor in values.items()}
    states = []
    for (kind, ins, outs, stats, places), names in zip(program.steps, released, strict=True):
        own = parameters[places.start : places.stop]
        outputs, statistics, state = kind.forward([values[name] for name in ins], own, lower)
        for name, tensor in zip(outs, outputs, strict=True):
            values[name], dtypes[name] = tensor, tensor.dtype
        values.update(zip(stats, statistics, strict=True))
        states.append(state)
        for name in names:
            del values[name]
    return values, dtypes, states


class _Program(torch.autograd.Function):
    """Saves what the plan keeps."""

    @staticmethod
    def forward(ctx, options, *tensors):
        program, drop, lower = options
        chosen = plan(program, tuple(ctx.needs_input_grad[1:]), drop)
        with autocast.disabled(tensors[0].device):
            values, dtypes, states = execute(program, tensors, chosen.released, lower)
        ctx.options = program, chosen, dtypes, states, lower
        # Of what is not read, an alias: changing it before the backward is then no error. Trained as it is: backends ask.
        parameters = (
            p if p is None or i in chosen.read_parameters else p.data.requires_grad_(p.requires_grad)
            for i, p in enumerate(tensors[len(program.inputs) :])
        )
        ctx.save_for_backward(*(values[name] for name in chosen.kept), *parameters)
        return values[program.output]

    @staticmethod
    def backward(ctx, grad):
        if not torch.is_grad_enabled():
            return None, *_backward(ctx.options, grad, ctx.saved_tensors)
        # With create_graph=True the gradients require one themselves, whatever was saved, and that is then an error.
        mark = grad.new_empty(0).requires_grad_()
        return None, *_ProgramBackward.apply(ctx.options, mark, grad, *ctx.saved_tensors)


class _ProgramBackward(torch.autograd.Function):
    """The backward as a node of its own, so that differentiating it again is an error."""

    @staticmethod
    def forward(ctx, options, mark, grad, *saved):
        return _backward(options, grad, saved)

    @staticmethod
    def backward(ctx, *grads):
        raise compiled.differentiated_twice("an accelerated block", "rftcore.restore(module) does")


def _backward(options, grad, saved) -> tuple[Tensor | None, ...]:
    program, chosen, dtypes, states, lower = options
    with autocast.disabled(grad.device):
        return tuple(_differentiate(program, chosen, dtypes, states, lower, grad, saved))


class _Values:
    """The values of a backward: what was kept, and what is made again when it is asked for."""

    def __init__(self, program: Program, chosen: Plan, states: Sequence, lower, saved: Sequence[Tensor | None]) -> None:
        count = len(chosen.kept)
        self._values = dict(zip(chosen.kept, cast(Sequence[Tensor], saved[:count]), strict=True))
        self.parameters = saved[count:]
        self._steps, self._states, self._lower = program.steps, states, lower
        self._remembered = chosen.remembered
        self._maker = {name: i for i, step in enumerate(program.steps) for name in (*step.outputs, *step.statistics)}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._values:
            return self._values[name]
        i = self._maker[name]
        step = self._steps[i]
        outputs, statistics, _ = step.kind.forward(
            [self[n] for n in step.inputs], self.own(step), self._lower, self._states[i]
        )
        made = dict(zip((*step.outputs, *step.statistics), (*outputs, *statistics), strict=True))
        for n in self._remembered & made.keys():
            self._values.setdefault(n, made[n])
        return made[name]

    def own(self, step: Step) -> Sequence[Tensor | None]:
        """The step's parameters."""
        return self.parameters[step.parameters.start : step.parameters.stop]

    def forget(self, names: Iterable[str]) -> None:
        """For the end of a step's backward: nothing before it reads what it made."""
        for name in names:
            self._values.pop(name, None)


def _differentiate(program, chosen: Plan, dtypes, states, lower, grad, saved) -> list[Tensor | None]:
    """Gradients of the program's inputs and parameters, each in the dtype of what it is a gradient of."""
    values = _Values(program, chosen, states, lower, saved)
    grads: dict[str, Tensor] = {program.output: grad}
    found: list[Tensor | None] = [None] * len(values.parameters)
    for step, needs, state in reversed(list(zip(program.steps, chosen.needs, states, strict=True))):
        if any(needs):
            of_inputs, of_outputs, of_statistics = step.kind.reads(needs)
            below = step.kind.backward(
                [grads.pop(name, None) for name in step.outputs],
                [values[name] if j in of_inputs else None for j, name in enumerate(step.inputs)],
                [values[name] if j in of_outputs else None for j, name in enumerate(step.outputs)],
                [values[name] if of_statistics else None for name in step.statistics],
                values.own(step),
                state,
                needs,
                lower,
            )
            for name, gradient in zip(step.inputs, below, strict=False):
                if gradient is not None:
                    gradient = gradient.to(dtypes[name])
                    grads[name] = grads[name] + gradient if name in grads else gradient
            found[step.parameters.start : step.parameters.stop] = below[len(step.inputs) :]
            del below
        values.forget((*step.outputs, *step.statistics))
    return [*(grads.get(name) for name in program.inputs), *found]
