"""Whether a sampler's next chain is launched as captured graphs, and why not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping

import torch
from torch import Tensor

from rftcore.sampling.capture_key import capture_key, reasons
from rftcore.sampling.cuda_recorder import CudaRecorder
from rftcore.sampling.denoiser import Denoiser
from rftcore.sampling.graphs import Graphs, Recorder, Run


class Captures:
    """The graphs of one sampler.

    Args:
        enabled: whether anything is captured at all.
        make_recorder: of a device, what captures there.
        device_type: where that is possible.

    Attributes:
        reason: why the last chain was not captured; None where it is or will be.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        enabled: bool,
        make_recorder: Callable[[torch.device], Recorder] = CudaRecorder,
        device_type: str = "cuda",
    ) -> None:
        self.reason: str | None = "no chain has run yet"
        self._denoiser, self._enabled, self._device_type = denoiser, enabled, device_type
        self._graphs = Graphs(functools.partial(_recorder_for, denoiser, make_recorder))

    @property
    def bytes(self) -> int:
        """What the graphs' pools hold."""
        return self._graphs.bytes

    def begin(
        self,
        latents: Tensor,
        conditioning: Mapping[str, Tensor],
        given: Hashable,
        *,
        differentiates: bool,
        merged: bool,
        passing: bool,
    ) -> Run:
        """The way of the next chain.

        Args:
            given: what of the chain is built into its graphs.
            differentiates: whether it has a backward pass.
            merged: whether it runs on weights that live for this chain only.
            passing: whether a chain like it may not come again.
        """
        run = self._begin(latents, conditioning, given, differentiates, merged, passing)
        self.reason = run.reason
        return run

    def _begin(
        self,
        latents: Tensor,
        conditioning: Mapping[str, Tensor],
        given: Hashable,
        differentiates: bool,
        merged: bool,
        passing: bool,
    ) -> Run:
        module, device = self._denoiser.module, latents.device
        if not self._enabled:
            return Run(None, "capture=False")
        if device.type != self._device_type:
            return Run(None, f"it runs on {device.type}; graphs are captured on {self._device_type}")
        if merged:
            return Run(None, "the merged weights live for one chain")
        if found := reasons(module, differentiates, self._device_type):
            return Run(None, "; ".join(found))
        key = capture_key(module, [latents, *conditioning.values()], given)
        return self._graphs.begin(key, passing=passing)


def _recorder_for(denoiser: Denoiser, make_recorder: Callable[[torch.device], Recorder]) -> Recorder:
    # Of the device that the UNet is on by then; a function of the module, which pickles.
    return make_recorder(denoiser.device)
