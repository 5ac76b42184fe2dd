"""What is made of adapters alone, casts and concatenations, held while a chain runs, and no longer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence

from torch import Tensor

_holding: dict[Hashable, tuple[Sequence[Tensor], Tensor]] | None = None


@contextlib.contextmanager
def held() -> Iterator[None]:
    """For the calls inside, what `made_of` makes is made once. It goes at the end: a weight may be written to unseen."""
    global _holding
    before, _holding = _holding, {}
    try:
        yield
    finally:
        _holding = before


def made_of(tensors: Sequence[Tensor], how: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """What `make` makes of these tensors; inside `held`, what it made of them before.

    Args:
        how: tells apart what else it depends on, such as a dtype.
    """
    if _holding is None:
        return make()
    # By places in memory: an op of the dispatcher gets other Python objects. Held, no other tensor takes their place.
    key = (how, *((t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()) for t in tensors))
    if key not in _holding:
        _holding[key] = (tensors, make())
    return _holding[key][1]
