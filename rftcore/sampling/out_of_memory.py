"""What to say, and to do, when a chain runs out of memory half-way."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from rftcore.sampling.plan import Plan


@contextlib.contextmanager
def explained(where: str, plan: Plan | None, release: Callable[[], None]) -> Iterator[None]:
    """Says which step and which plan it was, and which plan to try next.

    Args:
        where: the part of the chain that the block runs.
        release: lets go of what the chain holds.

    Raises:
        torch.OutOfMemoryError: in place of the allocator's own error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        release()
        raise torch.OutOfMemoryError(f"out of memory in {where} of the chain. {_advice(plan)}") from error


def _is_out_of_memory(error: Exception) -> bool:
    # A CPU's allocator has no error of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _advice(plan: Plan | None) -> str:
    if plan is None:
        return "Nothing was kept for a gradient: make the batch smaller, or free what else is on the device."
    smaller = plan.smaller()
    if smaller is None:
        advice = "There is no smaller one: make the batch smaller, or free what else is on the device."
    else:
        budget = f"memory_budget={smaller.peak_bytes} or " if smaller.peak_bytes else ""
        advice = f"The next smaller one, by {budget}plan=sampler.plan.smaller(): {smaller}"
    return f"No gradient was written. The plan: {plan}. {advice}"
