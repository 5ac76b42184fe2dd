"""How each algorithm turns a step's samples into gradients: sampler, reward and loss, composed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rftcore.algorithms.draft import draft
from rftcore.rewards import Reward, check_differentiable
from rftcore.sampling import CheckpointedSampler
from rftcore.training.engine import Engine


@dataclass(frozen=True)
class StepRecord:
    """What one process did in one optimizer step, before the optimizer's own part.

    Shapes: losses (parts,), rewards (b,), saturated (b,), of this process's b samples, detached.
    """

    losses: Tensor
    rewards: Tensor
    saturated: Tensor
    unet_evaluations: int


class Method(Protocol):
    """An algorithm, as the trainer sees it. Registered in METHODS under its config's `algorithm`."""

    sampler: CheckpointedSampler

    def __init__(self, engine: Engine) -> None: ...

    @staticmethod
    def check_reward(reward: Reward) -> None:
        """Raises RewardSpecError for a reward that the algorithm cannot use; asked before the model is loaded."""

    def accumulate_gradients(self, step: int) -> StepRecord:
        """Leaves the whole batch's gradient of step `step` (from 1) in the trainable parameters."""


class Draft:
    """DRaFT and DRaFT-K: ascend the reward through the last K sampling steps."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.sampler = engine.sampler(backprop_steps=engine.config.train.backprop_steps)

    @staticmethod
    def check_reward(reward: Reward) -> None:
        check_differentiable(reward, "DRaFT")

    def accumulate_gradients(self, step: int) -> StepRecord:
        losses, rewards, saturated = [], [], []
        for part in self.engine.parts(step):
            with self.engine.synchronised(part):
                trajectory = self.engine.sample(self.sampler, part.prompts, part.generators)
                r, share = self.engine.score(trajectory.latents, part.prompts)
                loss = draft(r)
                self.engine.backward(loss)
            losses.append(loss.detach())
            rewards.append(r.detach())
            saturated.append(share)
        return StepRecord(
            losses=torch.stack(losses),
            rewards=torch.cat(rewards),
            saturated=torch.cat(saturated),
            unet_evaluations=self._unet_evaluations(sum(map(len, rewards))),
        )

    def _unet_evaluations(self, samples: int) -> int:
        branches = 2 if self.sampler.guided else 1
        return samples * branches * (self.engine.config.sampling.num_inference_steps + self.sampler.plan.replays)


METHODS: dict[str, type[Method]] = {"draft": Draft}
