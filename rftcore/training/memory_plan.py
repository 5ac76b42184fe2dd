"""The chain's memory plan beside a run: a resumed run keeps and makes again what it did before, bit for bit."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rftcore.sampling import Plan
from rftcore.training.config import RunConfig
from rftcore.training.errors import UsageError
from rftcore.training.run_directory import RunDirectory

NAME = "plan.json"


def content(plan: Plan, config: RunConfig) -> dict[str, Any]:
    """What is written: the plan, and the settings that it was made for."""
    return {"memory": asdict(config.memory), "plan": plan.to_dict()}


def load(directory: RunDirectory, config: RunConfig, batch: int) -> Plan | None:
    """The plan of the run that is resumed; None where there is none, or it was made for other settings.

    Args:
        batch: images that a process samples at once.

    Raises: UsageError for a file that is damaged.
    """
    path = directory.path / NAME
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        plan, settings = Plan.from_dict(stored["plan"]), stored["memory"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({error}); remove it, and the run is planned anew") from error
    same_chain = plan.batch == batch and len(plan.stored) == config.sampling.num_inference_steps
    return plan if same_chain and settings == asdict(config.memory) else None
