"""A mypy plugin: what a module holds is known when it runs, and torch's own guess, Tensor | Module, is seldom right."""

from __future__ import annotations

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny, UnionType, get_proper_type

_MODULE = "torch.nn.modules.module.Module."


class Modules(Plugin):
    """Attributes that `nn.Module.__getattr__` finds are Any: layers' sizes, lists of blocks, configs of diffusers."""

    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return _found if fullname.startswith(_MODULE) else None


def _found(context: AttributeContext) -> Type:
    # What the class declares (training, forward) keeps its type.
    guess = get_proper_type(context.default_attr_type)
    return AnyType(TypeOfAny.special_form) if isinstance(guess, UnionType) else guess


def plugin(version: str) -> type[Plugin]:
    """mypy's way in."""
    return Modules
