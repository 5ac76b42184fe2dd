"""How much memory a device has left for a chain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

# Left alone: the allocator's fragmentation, and what libraries take behind PyTorch's back (workspaces of cuBLAS and
# cuDNN, kernels that are loaded at their first call).
MARGIN_SHARE = 0.05
MARGIN_BYTES = 256 * 2**20


def free_memory(device: torch.device, of_all_ranks: bool = True) -> int:
    """Bytes that may be allocated on `device` now, less a margin of 5% and 256 MiB; of all ranks the least.

    CUDA: what the driver has free and what PyTorch has reserved and does not use. Elsewhere: the machine's available
    memory, or less where a control group limits it.

    Args:
        of_all_ranks: False asks this process alone. Otherwise all have to ask together, or they wait for ever.
    """
    free = _of_cuda(device) if device.type == "cuda" else _of_host()
    free = max(0, int(free * (1 - MARGIN_SHARE)) - MARGIN_BYTES)
    if of_all_ranks and torch.distributed.is_available() and torch.distributed.is_initialized():
        # One process with another plan than the others' would make them wait.
        least = torch.tensor(free, dtype=torch.int64, device=device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        free = int(least)
    return free


def _of_cuda(device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _of_host() -> int:
    return min([psutil.virtual_memory().available, *_left_of_control_groups(Path("/"))])


def _left_of_control_groups(root: Path) -> Iterator[int]:
    """Bytes below the limit of each control group that this process is in, of either version."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if not controllers:
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            base, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container the path may be the host's, and the container's own group is the root.
        group = Path(path.lstrip("/"))
        for parent in (group, *group.parents):
            left = _left(base / parent, *names)
            if left is not None:
                yield left


def _left(group: Path, limit: str, usage: str) -> int | None:
    """None without a limit."""
    try:
        text = (group / limit).read_text().strip()
        used = int((group / usage).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    # The file cache counts as used and is given back when memory is short.
    return None if text == "max" else int(text) - used + int(statistics.get("inactive_file", 0))
