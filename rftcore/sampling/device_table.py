"""A scheduler's table on the device and in the dtype that a chain runs in."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from rftcore.sampling.multistep import MultistepTable
from rftcore.sampling.schedule import StepTable


class DeviceTable(NamedTuple):
    """What a chain reads at every step, without waiting for a number.

    Attributes:
        timesteps: (T,) the model's times.
        coefficients: (T, 9), the columns of `rftcore.ops.sampler_step.Coefficient`.
        input_scales: (T,) factors of the states as the model sees them; None where it sees them as they are.
        weights: (T, T+1) of a multistep scheduler; None for one of single steps.
    """

    timesteps: Tensor
    coefficients: Tensor
    input_scales: Tensor | None
    weights: Tensor | None

    @classmethod
    def of(cls, table: StepTable | MultistepTable, device: torch.device, dtype: torch.dtype) -> DeviceTable:
        """A table's copy there."""
        scaled = bool((table.input_scales != 1).any())
        return cls(
            table.timesteps.to(device),
            table.coefficients.to(device, dtype),
            table.input_scales.to(device, dtype) if scaled else None,
            table.weights.to(device, dtype) if isinstance(table, MultistepTable) else None,
        )


class DeviceTables:
    """A table's copies, made once each.

    Args:
        table: of the whole chain.
    """

    def __init__(self, table: StepTable | MultistepTable) -> None:
        self.table = table
        self._made: dict[tuple, DeviceTable] = {}

    def on(
        self, device: torch.device, dtype: torch.dtype, steps: int | None = None, output: str = "latents"
    ) -> DeviceTable:
        """The copy of a chain's first `steps` steps, None for all, that ends in that output."""
        key = (device, dtype, len(self.table) if steps is None else steps, output)
        if key not in self._made:
            # The copy outlives this call, which may be made under inference mode, or one that counts.
            with torch.inference_mode(False), _disable_current_modes():
                self._made[key] = DeviceTable.of(self.table.stopped(*key[2:]), device, dtype)
        return self._made[key]
