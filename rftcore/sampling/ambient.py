"""What surrounds a forward pass and has to be there again when it is replayed in a backward."""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclasses.dataclass(frozen=True)
class Ambient:
    """The autocast state and the choice of attention kernels at the time of `capture`."""

    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    sdpa_backends: tuple[SDPBackend, ...]

    @classmethod
    def capture(cls, device: torch.device) -> Ambient:
        kinds = sorted({"cpu", device.type})
        return cls(
            tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds),
            tuple(_enabled_sdpa_backends()),
        )

    @contextlib.contextmanager
    def restored(self):
        """The captured state for the length of a block."""
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                # A cast cached without a graph would silently cut a replay's gradient, one with a graph would be
                # backpropagated through twice: replays cache none.
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            stack.enter_context(sdpa_kernel(list(self.sdpa_backends)))
            yield


def _enabled_sdpa_backends() -> list[SDPBackend]:
    flags = {
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled(),
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
    }
    return [backend for backend, enabled in flags.items() if enabled]


@dataclasses.dataclass(frozen=True)
class RandomState:
    """The default generators' states, which dropout draws from."""

    cpu: torch.Tensor
    device: torch.device
    accelerator: torch.Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), device, accelerator)

    @contextlib.contextmanager
    def restored(self):
        """The captured state for the length of a block; what was there before comes back after it."""
        before = RandomState.capture(self.device)
        self._install()
        try:
            yield
        finally:
            before._install()

    def _install(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.cuda.set_rng_state(self.accelerator, self.device)
