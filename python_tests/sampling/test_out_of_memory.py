"""What an error says of a chain that ran out of memory."""

import dataclasses

import pytest
import torch

from rftcore.sampling.out_of_memory import explained
from rftcore.sampling.plan import Plan

PLAN = Plan(2, (None, 0, 0), ({},), {}, 2, 2)


def message(error, plan=PLAN):
    """What `error` inside becomes, and how often memory was let go of."""
    released = []
    with pytest.raises(torch.OutOfMemoryError) as found:
        with explained("step 3", plan, lambda: released.append(1)):
            raise error
    assert found.value.__cause__ is error and released == [1]
    return str(found.value)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")],
)
def test_every_allocators_error_is_explained(error):
    assert message(error).startswith("out of memory in step 3 of the chain. No gradient was written. The plan: ")


def test_other_errors_are_left_alone():
    for error in (RuntimeError("shapes differ"), KeyError("x")):
        with pytest.raises(type(error)) as found, explained("step 3", PLAN, lambda: pytest.fail("let go")):
            raise error
        assert found.value is error
    with explained("step 3", PLAN, lambda: pytest.fail("let go")):
        pass


def test_the_next_plan_is_named():
    said = message(MemoryError())
    assert f"The next smaller one, by plan=sampler.plan.smaller(): {PLAN.smaller()}" in said
    assert "memory_budget" not in said


def test_a_predicted_peak_is_a_budget(monkeypatch):
    monkeypatch.setattr(Plan, "smaller", lambda self: dataclasses.replace(PLAN, peak_bytes=1234))
    assert "by memory_budget=1234 or plan=sampler.plan.smaller()" in message(MemoryError())


def test_where_nothing_is_smaller_the_batch_is():
    smallest = Plan(2, (None,), (), None, 1, 1)
    assert smallest.smaller() is None
    said = message(MemoryError(), smallest)
    assert f"The plan: {smallest}. There is no smaller one: make the batch smaller" in said


def test_without_a_gradient_there_is_no_plan():
    said = message(MemoryError(), None)
    assert said.endswith("Nothing was kept for a gradient: make the batch smaller, or free what else is on the device.")
