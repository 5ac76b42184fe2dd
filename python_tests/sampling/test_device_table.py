"""A table as a chain reads it: on its device, in its dtype, without what it does without."""

import pytest
import torch
from chains import STABLE_DIFFUSION, table_of
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

from rftcore.sampling.device_table import DeviceTable

META = torch.device("meta")


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_every_kind(scheduler, dtype):
    table = table_of(scheduler(**STABLE_DIFFUSION), 4)
    made = DeviceTable.of(table, torch.device("cpu"), dtype)
    assert torch.equal(made.timesteps, table.timesteps)
    assert made.coefficients.dtype == dtype and torch.equal(made.coefficients, table.coefficients.to(dtype))
    scaled, weighted = scheduler is EulerDiscreteScheduler, scheduler is DPMSolverMultistepScheduler
    assert (made.input_scales is not None) == scaled and (made.weights is not None) == weighted
    for found, right in ((made.input_scales, table.input_scales), (made.weights, getattr(table, "weights", None))):
        assert found is None or (found.dtype == dtype and torch.equal(found, right.to(dtype)))
    moved = DeviceTable.of(table, META, dtype)
    assert all(tensor is None or tensor.device == META for tensor in moved)
