"""An exponential moving average of the trained weights, which can take their place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn


class Ema:
    """diffusers' `EMAModel` of parameters on their device, in their dtype: ema <- d * ema + (1 - d) * weight.

    d is min(decay, (1 + n) / (10 + n)) after update n + 1, and 0 after the first, so that the random start is forgotten.

    Its own swap is not used: it goes through the CPU, and by `.data`, unseen by autograd's version counters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self._parameters = list(parameters)
        self._average = EMAModel(self._parameters, decay=decay, foreach=True)
        self._applied = False

    def step(self) -> None:
        """Takes the weights into the average; once after each optimizer step."""
        self._average.step(self._parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the parameters hold the average; after it, bit for bit what they held before.

        Copied into the same memory, which optimizers and captured graphs know by its address.

        Raises: RuntimeError inside another such block: what is saved as the weights there would be the average.
        """
        if self._applied:
            raise RuntimeError("the averaged weights are in place already; leave that block first")
        weights = [parameter.detach().clone() for parameter in self._parameters]
        self._applied = True
        self._write(self._average.shadow_params)
        try:
            yield
        finally:
            self._write(weights)
            self._applied = False

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return self._average.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._average.load_state_dict(state)
        # A checkpoint is read to the CPU.
        self._average.shadow_params = [
            value.to(parameter) for value, parameter in zip(self._average.shadow_params, self._parameters, strict=True)
        ]
