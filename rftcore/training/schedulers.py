"""Schedulers by the names that configs and flags give them. Imports no torch before one is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Name -> diffusers' class, and what it is told besides the model's own scheduler config.
WITH_GRADIENT: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
}
SAMPLING_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
SCHEDULERS = WITH_GRADIENT | SAMPLING_ONLY


def make(name: str, config: Mapping[str, Any]) -> Any:
    """The scheduler of a name with a model's own noise schedule, prediction type and clipping."""
    import diffusers

    kind, told = SCHEDULERS[name]
    return getattr(diffusers, kind).from_config(config, **told)
