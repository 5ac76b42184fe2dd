"""What `rftcore plan` can be told. Imports no torch, so that `--help` is instant."""

from __future__ import annotations

import argparse
import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser

from rftcore.commands.plan_recipe import options_of
from rftcore.errors import UsageError, nearest
from rftcore.training.config import option

# Bytes of an optimizer's state for each trained parameter, whose master is fp32.
OPTIMIZERS = {"adamw": 8, "adamw8bit": 2, "sgd": 0}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
ATTENTION = "attention"


@dataclass
class PlanOptions:
    """Will it fit, and how slow will it be: a chain's memory plan, predicted without weights and without a GPU."""

    recipe: str | None = option(
        None,
        "a recipe's name or file, of DRaFT or DDPO, which says all but --device-memory; flags after it override it",
    )
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
    reserve: str | None = option(
        None,
        "of memory_budget, what is left to decoding; none: nothing, or with a recipe without a budget the run's own",
    )
    reward_memory: str = option(
        "0", "what the reward takes beside the decoder, weights and activations; or rewards' names, joined by +"
    )
    images_per_call: int = option(1, "images decoded and scored at once")
    context_memory: str = option("0", "what of the device no tensor gets: the CUDA context, rounding; a recipe: 0.7GiB")
    evaluated_at_once: int = option(0, "images sampled at once in an evaluation; 0: none is made")
    trained_at_once: int = option(
        0, "for policy gradients, with backprop_steps 0: images of which a step is scored again, with a gradient"
    )
    samples: int = option(0, "for policy gradients: of an epoch, all of whose states are kept")

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
        if self.device_memory is None and (self.memory_budget is None or self.recipe):
            found.append("give --device-memory 24GiB, or --memory_budget 20GiB, what the chain alone may take")
        if self.dtype not in DTYPES:
            found.append(f"--dtype {self.dtype} is unknown; {nearest(self.dtype, DTYPES)}")
        if self.optimizer not in OPTIMIZERS:
            found.append(f"--optimizer {self.optimizer} is unknown; {nearest(self.optimizer, OPTIMIZERS)}")
        least = dict.fromkeys(("batch", "steps", "rank", "resolution", "images_per_call"), 1)
        least |= dict.fromkeys(("evaluated_at_once", "trained_at_once", "samples"), 0)
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                found.append(f"--{name} {value} must be at least {bound}")
        if (self.trained_at_once or self.samples) and self.backprop_steps != 0:
            found.append("--trained_at_once and --samples are of policy gradients; give --backprop_steps 0 with them")
        if self.backprop_steps is not None and not 0 <= self.backprop_steps <= self.steps:
            found.append(f"--backprop_steps {self.backprop_steps} must lie in [0, {self.steps}], the number of --steps")
        if not math.isfinite(self.guidance_scale):
            found.append(f"--guidance_scale {self.guidance_scale} must be a finite number; 1.0 is no guidance")
        return found


class _Recipe(argparse.Action):
    """Sets what the recipe says, over what was said before."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for name, value in {**options_of(values), self.dest: values}.items():
            setattr(namespace, name, value)


def add_options(parser: ArgumentParser) -> None:
    """Adds one flag for each field of PlanOptions."""
    types = typing.get_type_hints(PlanOptions)
    for field in dataclasses.fields(PlanOptions):
        settings: dict[str, typing.Any] = {"type": types[field.name]}
        if types[field.name] == list[str]:
            settings = {"type": str, "nargs": "+"}
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name == "recipe":
            settings = {"action": _Recipe}
        flags = ["--device-memory", "--device_memory"] if field.name == "device_memory" else [f"--{field.name}"]
        help_ = field.metadata["help"].replace("%", "%%")
        parser.add_argument(*flags, dest=field.name, default=default, help=help_, **settings)
