"""Processes end together: one's failure is told to the others, and none waits for what will not come."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import cast

from accelerate import Accelerator
from torch import distributed

from rftcore.errors import Interrupted, RunError, UsageError

_KEY = "rftcore/failure"
# DDP lets go of its group without giving up the interpreter's lock. As the group's last owner it would join gloo's
# threads, and one that still holds a tensor of Python's waits for the lock: that process would never end.
_LEFT: list[distributed.ProcessGroup] = []


def check_joined(accelerator: Accelerator) -> None:
    """Raises UsageError where a launcher started several processes and each takes itself for the only one."""
    launched = os.environ.get("WORLD_SIZE", "1")
    if accelerator.num_processes == 1 and launched != "1":
        raise UsageError(
            f"the launcher started {launched} processes (WORLD_SIZE={launched}), and accelerate joined none of them: "
            "each would write the same run. Without a GPU set ACCELERATE_USE_CPU=true, or start one process"
        )


def end(accelerator: Accelerator) -> None:
    """Closes the trackers and leaves the group of processes."""
    if distributed.is_initialized():
        _LEFT.append(cast(distributed.ProcessGroup, distributed.group.WORLD))
    accelerator.end_training()


@contextmanager
def failing_together(accelerator: Accelerator) -> Iterator[None]:
    """A block of work in common. Where it fails on one process, it fails on all: none is left in a collective.

    A process that ends breaks its connections, and gloo's collectives of the others fail; NCCL's wait until the
    launcher, which sees the end of a process, ends the others (torchrun and accelerate launch: at once by SIGTERM, after
    30 seconds by SIGKILL).

    Raises: RunError, with the first failing process's reason, where another's failure ended this one.
    """
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        if accelerator.num_processes == 1:
            raise
        if _is_of_others(error):
            raise RunError(f"{_told()}; this is process {accelerator.process_index}") from error
        _tell(f"process {accelerator.process_index} failed: {_line(error)}")
        raise


def _tell(message: str) -> None:
    # The failure itself is raised in any case; the first to fail is the cause of what others see.
    with suppress(RuntimeError):
        store = distributed.distributed_c10d._get_default_store()
        store.compare_set(_KEY, "", message)


def _told() -> str:
    with suppress(RuntimeError):
        store = distributed.distributed_c10d._get_default_store()
        if store.check([_KEY]):
            return store.get(_KEY).decode(errors="replace")
    return "another process ended, or cannot be reached; what it wrote last says why, unless it was killed"


def _is_of_others(error: Exception) -> bool:
    """Whether communication failed, not this process's own work."""
    if isinstance(error, distributed.DistError):
        return True
    # gloo's failures have no class of their own.
    return isinstance(error, RuntimeError) and "gloo" in str(error).lower()


def _line(error: Exception) -> str:
    return " ".join((str(error) or type(error).__name__).split())
