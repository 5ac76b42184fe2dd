"""What surrounds a forward pass and has to be there again when it is replayed in a backward."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes


@dataclasses.dataclass(frozen=True)
class Ambient:
    """The autocast state, and the attention kernels allowed with their order, at the time of `capture`."""

    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    sdpa_backends: tuple[SDPBackend, ...]

    @classmethod
    def capture(cls, device: torch.device) -> Ambient:
        kinds = sorted({"cpu", device.type})
        return cls(
            tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds),
            tuple(_cur_sdpa_kernel_backends(with_priority=True)),
        )

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """The captured state for the length of a block."""
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                # A cast cached without a graph would silently cut a replay's gradient, one with a graph would be
                # backpropagated through twice: replays cache none.
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            stack.enter_context(sdpa_kernel(list(self.sdpa_backends), set_priority=True))
            yield


@dataclasses.dataclass(frozen=True)
class RandomState:
    """The default generators' states, which dropout draws from."""

    cpu: torch.Tensor
    device: torch.device
    accelerator: torch.Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        with _disable_current_modes():
            accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
            return cls(torch.get_rng_state(), device, accelerator)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """The captured state for the length of a block; what was there before comes back after it."""
        before = RandomState.capture(self.device)
        self._install()
        try:
            yield
        finally:
            before._install()

    def drawn_from(self) -> bool:
        """Whether numbers were drawn since."""
        now = RandomState.capture(self.device)
        # States are on the CPU, and have data whatever a mode makes of the chain's tensors.
        with _disable_current_modes():
            same = torch.equal(self.cpu, now.cpu)
            if self.accelerator is not None and now.accelerator is not None:
                same = same and torch.equal(self.accelerator, now.accelerator)
            return not same

    def _install(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator, self.device)
