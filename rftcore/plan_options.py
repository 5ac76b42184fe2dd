"""What `rftcore plan` can be told. Imports no torch, so that `--help` is instant."""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass

from jsonargparse import ArgumentParser

from rftcore.training.config import option
from rftcore.training.errors import UsageError, nearest

# Bytes of an optimizer's state for each trained parameter, whose master is fp32.
OPTIMIZERS = {"adamw": 8, "adamw8bit": 2, "sgd": 0}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ATTENTION = "attention"


@dataclass
class PlanOptions:
    """Will it fit, and how slow will it be: a chain's memory plan, predicted without weights and without a GPU."""

    model: str | None = option(None, "sd15, sd21, sdxl, or the folder of a diffusers pipeline (its config.json files)")
    resolution: int | None = option(None, "image side in pixels; none: the model's own")
    batch: int = option(4, "images of a chain")
    steps: int = option(50, "sampling steps")
    backprop_steps: int | None = option(None, "how many of the last steps are differentiated; none: all")
    guidance_scale: float = option(7.5, "classifier-free guidance; 1.0 runs no negative branch")
    rank: int = option(4, "of the LoRA, whose masters are fp32")
    target: list[str] = option([ATTENTION], "modules with LoRA, by the ends of their names; attention: q, k, v and out")
    dtype: str = option("bf16", f"of the frozen weights: {', '.join(DTYPES)}")
    device_memory: str | None = option(None, "what the whole device may hold, such as 24GiB")
    memory_budget: str | None = option(None, "the sampler's memory_budget, instead: what its chain alone may take")
    optimizer: str = option("adamw", f"{', '.join(OPTIMIZERS)}")
    reward_memory: str = option("0", "what the reward takes beside the decoder, weights and activations")

    def validate(self) -> None:
        """Raises UsageError with every problem found, not only the first."""
        found = self.problems()
        if found:
            raise UsageError("; ".join(found))

    def problems(self) -> list[str]:
        """Every value that cannot work, as a sentence that names it, what it is and what is allowed."""
        found = []
        if not self.model:
            found.append("--model is missing; give sd15, sd21, sdxl or the folder of a pipeline")
        if (self.device_memory is None) == (self.memory_budget is None):
            found.append("give --device-memory 24GiB, or --memory_budget 20GiB, and not both")
        if self.dtype not in DTYPES:
            found.append(f"--dtype {self.dtype} is unknown; {nearest(self.dtype, DTYPES)}")
        if self.optimizer not in OPTIMIZERS:
            found.append(f"--optimizer {self.optimizer} is unknown; {nearest(self.optimizer, OPTIMIZERS)}")
        for name in ("batch", "steps", "rank", "resolution"):
            value = getattr(self, name)
            if value is not None and value < 1:
                found.append(f"--{name} {value} must be at least 1")
        if self.backprop_steps is not None and not 0 <= self.backprop_steps <= self.steps:
            found.append(f"--backprop_steps {self.backprop_steps} must lie in [0, {self.steps}], the number of --steps")
        if not math.isfinite(self.guidance_scale):
            found.append(f"--guidance_scale {self.guidance_scale} must be a finite number; 1.0 is no guidance")
        return found


def add_options(parser: ArgumentParser) -> None:
    """Adds one flag for each field of PlanOptions."""
    types = typing.get_type_hints(PlanOptions)
    for field in dataclasses.fields(PlanOptions):
        settings: dict[str, typing.Any] = {"type": types[field.name]}
        if types[field.name] == list[str]:
            settings = {"type": str, "nargs": "+"}
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        flags = ["--device-memory", "--device_memory"] if field.name == "device_memory" else [f"--{field.name}"]
        help_ = field.metadata["help"].replace("%", "%%")
        parser.add_argument(*flags, dest=field.name, default=default, help=help_, **settings)
