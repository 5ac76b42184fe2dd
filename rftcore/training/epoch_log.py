"""What happened in an epoch, over its updates and all processes."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator

from rftcore.training.engine import Scores
from rftcore.training.methods.method import Update


@dataclass(frozen=True)
class Figures:
    """Of an epoch, over all processes.

    metrics is by name: means over updates and processes, and the largest of what is reported so. Rewards are those of
    the samples that were not dropped.
    """

    reward_mean: float
    reward_std: float
    saturated: float
    samples: int
    reward_queries: int
    unet_evaluations: int
    metrics: dict[str, float]


@dataclass
class EpochLog:
    """Collects one process's updates of an epoch."""

    epoch: int
    _updates: list[Update] = field(default_factory=list)
    _norms: list[tuple[float, float]] = field(default_factory=list)

    def add(self, update: Update, grad_norm: float, learning_rate: float) -> None:
        self._updates.append(update)
        self._norms.append((grad_norm, learning_rate))

    def nothing_learnt(self) -> str | None:
        """Why the optimizer took no step at all, if it took none."""
        reasons = [update.skipped for update in self._updates]
        return reasons[-1] if all(reasons) else None

    def over_processes(self, accelerator: Accelerator) -> Figures:
        """The figures, the same on every process."""
        means, largest = defaultdict(list), defaultdict(list)
        for update in self._updates:
            for name, value in update.means.items():
                means[name].append(value)
            for name, value in update.largest.items():
                largest[name].append(value)
        device = accelerator.device
        drawn = Scores.cat([scores for update in self._updates for scores in update.scores])
        columns = [drawn.rewards, drawn.saturated, *drawn.parts.values()]
        scores = torch.stack([column.double() for column in columns], dim=1)
        scores = accelerator.gather(scores.to(device)).cpu()  # (B, 2 and the parts)
        own = [statistics.fmean(values) for values in means.values()] + [max(values) for values in largest.values()]
        own += [sum(update.reward_queries for update in self._updates)]
        own += [sum(update.unet_evaluations for update in self._updates)]
        gathered = accelerator.gather(torch.tensor([own], dtype=torch.float64, device=device)).cpu()
        metrics = dict(zip(means, gathered[:, : len(means)].mean(0).tolist(), strict=True))
        metrics |= dict(zip(largest, gathered[:, len(means) : -2].max(0).values.tolist(), strict=True))
        kept = scores[scores[:, 0].isfinite()]
        rewards = kept[:, 0].tolist()
        dropped = len(scores) - len(rewards)
        metrics |= {f"reward/{name}/mean": float(kept[:, 2 + n].mean()) for n, name in enumerate(drawn.parts)}
        skipped = sum(update.skipped is not None for update in self._updates)
        # Infinite where fp16 overflowed, and the scaler left the step out.
        steps = [
            norm
            for (norm, _), update in zip(self._norms, self._updates, strict=True)
            if update.skipped is None and math.isfinite(norm)
        ]
        metrics |= {
            "train/grad_norm": statistics.fmean(steps) if steps else 0.0,
            "train/lr": self._norms[-1][1],
            "train/skipped_updates": skipped,
            "train/dropped_samples": dropped,
        }
        return Figures(
            reward_mean=statistics.fmean(rewards) if rewards else math.nan,
            reward_std=statistics.stdev(rewards) if len(rewards) > 1 else 0.0,
            saturated=float(scores[:, 1].mean()),
            samples=len(scores),
            reward_queries=int(gathered[:, -2].sum()),
            unet_evaluations=int(gathered[:, -1].sum()),
            metrics=metrics,
        )
