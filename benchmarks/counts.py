"""Exact counts of what a model computes: calls that launch something, and FLOPs; of fake tensors, too."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

from rftcore.counting import flops_of


class Counts(TorchDispatchMode):
    """Counts the calls inside the block that do something (ATen's and our own ops', no views), and their FLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.calls += launches(function)
        self.flops += flops_of(function, args, kwargs or {}, output)
        return output


# Allocations, questions and views that no schema tells from the rest.
_FREE = ("aten::empty", "aten::new_empty", "aten::_unsafe_view", "aten::detach", "aten::promote_types", "prim::device")


def launches(function) -> bool:
    schema = function._schema
    views = (r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return not any(views) and not schema.name.startswith(_FREE)
