"""A program is cut at the boundaries that are kept: each part's values go as soon as its own backward is done."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from rftcore.blocks.program import Program, Step


def cut(program: Program, drop: frozenset[str]) -> Iterator[tuple[Program, range]]:
    """Programs that together are this one, and which of its parameters each has; the next begins with one's output.

    Args:
        drop: names of values to be made again: at these it is not cut.
    """
    ends = _ends(program, drop)
    if len(ends) == 1:
        yield program, range(program.steps[-1].parameters.stop)
        return
    start = 0
    for end in ends:
        steps = program.steps[start:end]
        first, past = steps[0].parameters.start, steps[-1].parameters.stop
        if first > 0:
            steps = tuple(
                Step(kind, inputs, outputs, statistics, range(places.start - first, places.stop - first))
                for kind, inputs, outputs, statistics, places in steps
            )
        # What it goes on with comes first, as the input that a program begins with does.
        before = program.inputs[:1] if start == 0 else (program.steps[start - 1].outputs[0],)
        read = {name for step in steps for name in step.inputs}
        inputs = (*before, *(name for name in program.inputs if name in read and name not in before))
        yield Program(inputs, steps, program.boundaries), range(first, past)
        start = end


# Positions alone: programs that differ in an adapter's scale only are equal, and share them.
@functools.lru_cache(maxsize=1024)
def _ends(program: Program, drop: frozenset[str]) -> tuple[int, ...]:
    """For each part, the position after its last step."""
    steps, kept, ends = program.steps, {*program.boundaries} - drop, []
    for i, step in enumerate(steps[:-1]):
        if len(step.outputs) == 1 and step.outputs[0] in kept:
            later = {name for other in steps[i + 1 :] for name in other.inputs}
            made = {name for other in steps[: i + 1] for name in other.outputs}
            if later & made == {step.outputs[0]}:
                ends.append(i + 1)
    return (*ends, len(steps))
