"""Neighbouring steps that one kernel does are made one step, before a program runs.

Programs are written, planned for and priced in small steps; which of them are one launch is decided here alone.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Sequence
from typing import NamedTuple, cast

from rftcore.blocks import kinds
from rftcore.blocks.program import Program, Step, plan, read_by_backward


class _Group(NamedTuple):
    """Steps that become one: of `size` steps, the first may be a norm, the last may be a gate.

    Attributes:
        keeps: whether what the gate reads is an output too.
    """

    size: int
    normed: bool = False
    gated: bool = False
    keeps: bool = False


def fuse(program: Program, needs: tuple[bool, ...], drop: frozenset[str]) -> Program:
    """The same program in fewer steps.

    Args:
        needs: which inputs and parameters of the program want a gradient.
        drop: names of values to be made again.
    """
    groups, steps = _groups(program, needs, drop), iter(program.steps)
    joined = (_joined(group, [next(steps) for _ in range(group.size)]) for group in groups)
    return Program(program.inputs, tuple(joined), program.boundaries)


def wants(inputs: Sequence, parameters: Sequence) -> tuple[bool, ...]:
    """Which of these tensors require a gradient."""
    return tuple(t is not None and t.requires_grad for t in (*inputs, *parameters))


# Kept apart from the steps: programs that differ in an adapter's scale only are equal, and share it.
@functools.lru_cache(maxsize=1024)
def _groups(program: Program, needs: tuple[bool, ...], drop: frozenset[str]) -> tuple[_Group, ...]:
    steps, found = program.steps, []
    uses = collections.Counter(name for step in steps for name in step.inputs)
    read, remade = read_by_backward(program, needs), plan(program, needs, drop).remade

    def leads(i: int, first: type, second: type) -> bool:
        """Whether step i + 1 is all that takes the single output of step i."""
        if i + 1 >= len(steps) or not (isinstance(steps[i].kind, first) and isinstance(steps[i + 1].kind, second)):
            return False
        outputs = steps[i].outputs
        return len(outputs) == 1 and steps[i + 1].inputs[0] == outputs[0] and uses[outputs[0]] == 1

    i = 0
    while i < len(steps):
        normed = leads(i, kinds.LayerNorm, kinds.Linear)
        linear = i + normed
        # A gate's output that a backward reads costs no matrix product where it is made again from what the gate reads.
        gated = (
            leads(linear, kinds.Linear, kinds.GEGLU)
            and not cast(kinds.Linear, steps[linear].kind).residual
            and steps[linear + 1].outputs[0] not in read
        )
        # Where the gate's output is wanted again, what it reads is made on the way there, and once is enough.
        keeps = gated and any(needs) and (steps[linear].outputs[0] not in drop or linear + 1 in remade)
        found.append(_Group(1 + normed + gated, normed, gated, keeps))
        i += found[-1].size
    return tuple(found)


def _joined(group: _Group, steps: list[Step]) -> Step:
    if group.size == 1:
        return steps[0]
    # `_groups` has seen to their classes.
    eps = cast(kinds.LayerNorm, steps[0].kind).eps if group.normed else None
    linear = steps[1 if group.normed else 0]
    kind = cast(kinds.Linear, linear.kind)
    inputs, parameters = linear.inputs, linear.parameters
    if group.normed:
        # A builder adds a norm's parameters right before the projection's.
        inputs, parameters = (*steps[0].inputs, *inputs[1:]), range(steps[0].parameters.start, parameters.stop)
    if not group.gated:
        return Step(
            kinds.Linear(kind.adapters, kind.scales, kind.residual, eps, kind.backend),
            inputs, linear.outputs, (), parameters,
        )  # fmt: skip
    gate = steps[-1]
    return Step(
        kinds.GatedLinear(
            kind.adapters[0], kind.scales[0], eps, group.keeps, cast(kinds.GEGLU, gate.kind).joint_backend
        ),
        inputs, (*gate.outputs, *linear.outputs) if group.keeps else gate.outputs, (), parameters,
    )  # fmt: skip
