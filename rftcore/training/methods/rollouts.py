"""An epoch's samples, drawn without a gradient and scored, for the algorithms that train on them afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rftcore.errors import RunError
from rftcore.sampling import CheckpointedSampler, Trajectory
from rftcore.sampling.adapters import adapters_off
from rftcore.training.engine import Engine, Scores
from rftcore.training.methods.method import Tally


@dataclass(frozen=True)
class Rollout:
    """One process's samples of an epoch.

    Attributes:
        indices: their numbers in the epoch.
        scores: (n,) each.
    """

    indices: list[int]
    prompts: list[str]
    trajectory: Trajectory
    scores: Scores


@torch.no_grad()
def draw(
    engine: Engine,
    sampler: CheckpointedSampler,
    epoch: int,
    indices: Sequence[int],
    at_once: int,
    tally: Tally,
    *,
    merged: bool = False,
    pretrained: bool = False,
) -> Rollout:
    """Draws and scores these samples of an epoch, `at_once` at a time.

    Args:
        merged: with the adapter merged into copies of the weights.
        pretrained: with the adapter off.
    """
    trajectories, scores, prompts = [], [], []
    for start in range(0, len(indices), at_once):
        samples = engine.samples(epoch, indices[start : start + at_once])
        with adapters_off(engine.model) if pretrained else contextlib.nullcontext():
            trajectory = engine.sample(sampler, samples, merged=merged)
        scored = engine.score(trajectory.latents, samples.prompts)
        tally.drew(scored)
        tally.unet_evaluations += len(samples.prompts) * engine.branches * len(trajectory.timesteps)
        trajectories.append(trajectory)
        scores.append(scored)
        prompts += samples.prompts
    return Rollout([*indices], prompts, Trajectory.cat(trajectories), Scores.cat(scores))


def everyones_rewards(engine: Engine, rollout: Rollout, epoch: int) -> tuple[list[str], Tensor]:
    """All processes' prompts and rewards (N,) of an epoch in the samples' order, on the CPU in fp64."""
    gathered = engine.gathered(
        {"index": torch.tensor(rollout.indices), "reward": rollout.scores.rewards.to(torch.float64)}
    )
    rewards = torch.empty(len(gathered["index"]), dtype=torch.float64)
    rewards[gathered["index"]] = gathered["reward"]
    return [engine.plan.prompt(epoch, index) for index in range(len(rewards))], rewards


def trained_steps(trajectory: Trajectory, noisiest_fraction: float) -> Tensor:
    """(S,) the steps with a probability among this share of the chain's, from the noisiest on."""
    count = max(1, round(noisiest_fraction * len(trajectory.timesteps)))
    return trajectory.stochastic[:count].nonzero().flatten().cpu()


def check_same_model(log_ratio: float, clip_range: float) -> None:
    """Raises RunError where old and new log-probabilities differ by too much for one and the same model."""
    if not log_ratio <= clip_range / 10:
        raise RunError(
            f"before the first update of an epoch log-probabilities differ from those of sampling by {log_ratio:.2g}, "
            f"more than a tenth of train.clip_range={clip_range}: ratios would measure rounding. Set train.rescore=true "
            "(old log-probabilities are made again by the training's own path), or mixed_precision=no"
        )
