"""recompute: what each layer makes again in the calls inside a block, whatever its model was accelerated with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from rftcore.blocks import levels
from rftcore.blocks.serving import setting


@contextlib.contextmanager
def recompute(module: nn.Module, drops: Mapping[str, Iterable[str]] | str) -> Iterator[None]:
    """Sets what the layers of an accelerated model make again, for the calls inside. The innermost one counts.

    A backward makes again what its forward was told to. What torch.utils.checkpoint or diffusers' gradient checkpointing
    runs a second time has to run inside, too.

    Args:
        module: an accelerated model, or one that wraps it.
        drops: of a layer's name, the names of the values that it makes again, as `costs.priced` has them; a layer that
            is not named makes nothing again that takes a matrix product or a convolution, and names that it has no
            value of are passed over. Or a level, as `accelerate` takes it: "none", "ff", "qkv" or "block".

    Raises:
        ValueError: for a level it does not know, and for a module that is not accelerated.
    """
    if isinstance(drops, str) and drops not in levels.LEVELS:
        known = ", ".join(repr(level) for level in levels.LEVELS)
        raise ValueError(f"drops={drops!r} is unknown; choose one of {known}, or give a mapping from layers to values.")
    chosen = drops if isinstance(drops, str) else {name: frozenset(values) for name, values in drops.items()}
    with setting(module, "drops", chosen):
        yield
