"""What a module computes besides its parameters' values: modes and adapters, as they were at the forward."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

# What PEFT's switches change on an adapted layer.
_ADAPTER_ATTRIBUTES = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


@dataclasses.dataclass(frozen=True)
class ModuleState:
    """Training flags, the adapters' switches, and the versions of the frozen tensors, at the time of `capture`."""

    training: tuple[tuple[nn.Module, bool], ...]
    adapters: tuple[tuple[BaseTunerLayer, dict[str, Any]], ...]
    versions: tuple[tuple[str, Tensor, int], ...]

    @classmethod
    def capture(cls, module: nn.Module) -> ModuleState:
        modules = list(module.modules())
        frozen = [(n, p) for n, p in module.named_parameters() if not p.requires_grad]
        return cls(
            training=tuple((child, child.training) for child in modules),
            adapters=tuple((child, _switches(child)) for child in modules if isinstance(child, BaseTunerLayer)),
            versions=tuple((name, tensor, tensor._version) for name, tensor in frozen if not tensor.is_inference()),
        )

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """The captured modes and switches for the length of a block.

        Raises:
            RuntimeError: for what cannot be brought back: a merge, or a frozen weight that was written to.
        """
        for layer, then in self.adapters:
            if list(layer.merged_adapters) != then["merged_adapters"]:
                raise RuntimeError(
                    "an adapter was merged or unmerged between the sampling and its backward pass, which would replay "
                    "other weights; call backward() first."
                )
        for name, tensor, version in self.versions:
            if tensor._version != version:
                raise RuntimeError(
                    f"the frozen weight {name!r} was written to between the sampling and its backward pass, which would "
                    "replay another model; call backward() first."
                )
        modes = [(child, child.training) for child, then in self.training if child.training != then]
        now = [(layer, _switches(layer)) for layer, then in self.adapters if _switches(layer) != then]
        try:
            for child, mode in modes:
                child.training = not mode
            for layer, then in self.adapters:
                _set_switches(layer, then)
            yield
        finally:
            for child, mode in modes:
                child.training = mode
            for layer, switches in now:
                _set_switches(layer, switches)


def _switches(layer: BaseTunerLayer) -> dict[str, Any]:
    found = {name: getattr(layer, name) for name in _ADAPTER_ATTRIBUTES if hasattr(layer, name)}
    return {name: value.copy() if isinstance(value, (dict, list)) else value for name, value in found.items()}


def _set_switches(layer: BaseTunerLayer, switches: dict[str, Any]) -> None:
    for name, value in switches.items():
        if getattr(layer, name) != value:
            setattr(layer, name, value.copy() if isinstance(value, (dict, list)) else value)
