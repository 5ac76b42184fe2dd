"""The memory that a run's chains may take, settled once: a resumed run makes the same plans, and so the same bits.

Algorithms that draw a gradient path for each step have as many plans. All of them follow from two numbers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from rftcore import documents
from rftcore.blocks.budget import bytes_of
from rftcore.errors import UsageError
from rftcore.sampling import Plan
from rftcore.sampling.free_memory import free_memory
from rftcore.training.config import RunConfig
from rftcore.training.run_directory import RunDirectory

NAME = "plan.json"
_RESERVE = 2 * 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes: what a chain, decoding and the reward may take beyond the model, and what of it is left to the latter two."""

    budget: int
    reserve: int


def settled(config: RunConfig, device: torch.device, to_come: int) -> Memory:
    """What the config says or, where it leaves it open, what is free now; every process has to ask.

    Args:
        to_come: bytes that will be allocated for good: the optimizer's moments.

    Raises: UsageError for a size that is none.
    """
    try:
        given = None if config.memory.budget is None else bytes_of(config.memory.budget)
        reserve = None if config.memory.reserve is None else bytes_of(config.memory.reserve)
    except ValueError as error:
        raise UsageError(
            f"memory.budget={config.memory.budget}, memory.reserve={config.memory.reserve}: {error}"
        ) from error
    if given is not None:
        return Memory(given, reserve or 0)
    free = max(0, free_memory(device) - to_come)
    return Memory(free, min(_RESERVE, free // 2) if reserve is None else reserve)


def content(memory: Memory, plan: Plan, config: RunConfig) -> dict[str, Any]:
    """What is written: the memory, the settings that it was settled for, and the first step's plan, to be looked at."""
    return {"settings": _settings(config), "memory": asdict(memory), "plan": plan.to_dict()}


def load(directory: RunDirectory, config: RunConfig) -> Memory | None:
    """That of the run that is resumed; None where there is none, or it was settled for other settings.

    Raises: UsageError for a file that is damaged.
    """
    path = directory.path / NAME
    if not path.exists():
        return None
    try:
        stored = documents.from_json(path.read_text(encoding="utf-8"))
        memory = Memory(int(stored["memory"]["budget"]), int(stored["memory"]["reserve"]))
        if memory.budget < 0 or memory.reserve < 0:
            raise ValueError(f"{memory} is less than nothing")
        return memory if stored["settings"] == _settings(config) else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UsageError(f"{path} is damaged ({error!r}); remove it, and the run is planned anew") from error


def _settings(config: RunConfig) -> dict[str, Any]:
    return {"budget": config.memory.budget, "reserve": config.memory.reserve}
