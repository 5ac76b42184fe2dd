"""Advantages: rewards made comparable, over the batch or per prompt (Black et al., DDPO, arXiv 2305.13301)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rftcore.algorithms.arguments import check_per_image


def standardised(r: Tensor, eps: float = 1e-8) -> Tensor:
    """A = (r - mean r) / (std r + eps) over the batch; std divides by B (the population's), so B = 1 gives 0.

    Computed in fp64. Shapes: r (B,), result (B,) in r's dtype, without gradient. Units: standard deviations.
    Raises: ValueError for another shape or a reward that is not finite.
    Source: ddpo-pytorch and TRL without their tracker, both through numpy's std.
    """
    _check_finite(r)
    mean, std = _mean_and_std(r)
    return ((r.detach().double() - mean) / (std + eps)).to(r)


class PromptStatistics:
    """Advantages from each prompt's own latest rewards.

    The batch is remembered first, so a reward takes part in its own mean and std. A prompt with fewer than `min_count`
    rewards remembered is standardised over the whole batch. std divides by the count (the population's) and has 1e-6
    added. Sums are in fp64. With several processes, give each the rewards of all.
    Source: ddpo-pytorch's stat_tracking.py; 32 and 16 are the defaults of jannerm/ddpo (128 and 32 with LLaVA's reward).

    Args:
        buffer_size: how many rewards of a prompt are remembered, the oldest dropped.
        min_count: in [1, buffer_size].
    Raises: ValueError for sizes out of range.
    """

    def __init__(self, buffer_size: int = 32, min_count: int = 16) -> None:
        if not 1 <= min_count <= buffer_size:
            raise ValueError(
                f"min_count={min_count} must lie in [1, buffer_size={buffer_size}]: a prompt never has more rewards "
                "remembered than buffer_size; raise buffer_size or lower min_count"
            )
        self.buffer_size, self.min_count = buffer_size, min_count
        self._rewards: dict[str, deque[float]] = {}

    def advantages(self, prompts: Sequence[str], r: Tensor) -> Tensor:
        """Remembers the batch, then A_i = (r_i - mean) / (std + 1e-6).

        Shapes: r (B,), one prompt each; result (B,) in r's dtype, without gradient. Units: standard deviations.
        Raises: ValueError where prompts and rewards differ in number or a reward is not finite; nothing is remembered.
        """
        _check_finite(r, prompts)
        for prompt, reward in zip(prompts, r.tolist(), strict=True):
            self._rewards.setdefault(prompt, deque(maxlen=self.buffer_size)).append(reward)
        batch = _mean_and_std(r)
        own = {
            prompt: _mean_and_std(torch.tensor(self._rewards[prompt], dtype=torch.float64))
            for prompt in set(prompts)
            if len(self._rewards[prompt]) >= self.min_count
        }
        pairs = zip(*(own.get(p, batch) for p in prompts), strict=True)
        mean, std = (torch.tensor(column, dtype=torch.float64) for column in pairs)
        return ((r.detach().double().cpu() - mean) / (std + 1e-6)).to(r)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for JSON or `torch.load(weights_only=True)`."""
        rewards = {prompt: list(values) for prompt, values in self._rewards.items()}
        return {"buffer_size": self.buffer_size, "min_count": self.min_count, "rewards": rewards}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts a state back, bit for bit. Raises: ValueError for one of other sizes."""
        sizes = {"buffer_size": self.buffer_size, "min_count": self.min_count}
        stored = {name: state[name] for name in sizes}
        if stored != sizes:
            raise ValueError(f"the state was made with {stored}, not {sizes}; use the sizes it was made with")
        self._rewards = {prompt: deque(values, self.buffer_size) for prompt, values in state["rewards"].items()}


def _mean_and_std(r: Tensor) -> tuple[float, float]:
    values = r.detach().double()
    return values.mean().item(), values.std(correction=0).item()


def _check_finite(r: Tensor, prompts: Sequence[str] | None = None) -> None:
    check_per_image(r, prompts)
    wrong = [i for i, finite in enumerate(r.isfinite().tolist()) if not finite]
    if wrong:
        named = ", ".join(f"{r[i].item()} at {i}" + (f" ({prompts[i]!r})" if prompts else "") for i in wrong[:8])
        raise ValueError(f"{len(wrong)} of {len(r)} rewards are not finite: {named}; drop these samples or stop")
