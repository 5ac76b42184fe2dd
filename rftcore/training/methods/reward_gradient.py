"""The reward's own gradient through the chain: one family, told apart by where the gradient is stopped."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from rftcore.algorithms import paths
from rftcore.algorithms.alignprop import alignprop
from rftcore.algorithms.draft import draft
from rftcore.algorithms.drtune import drtune
from rftcore.algorithms.refl import refl
from rftcore.rewards import Reward, check_differentiable
from rftcore.sampling import GradientPath
from rftcore.training.algorithm_configs import (
    AlignpropTrainConfig,
    DraftTrainConfig,
    DrtuneTrainConfig,
    ReflTrainConfig,
    RewardGradientTrainConfig,
)
from rftcore.training.batches import generator
from rftcore.training.engine import Engine, Samples, Scores
from rftcore.training.methods.method import Tally, Update


class RewardGradient:
    """One optimizer step an epoch: sample along a gradient path, score, backpropagate.

    A subclass says where the gradient flows and what is minimised, and may add terms to it.

    Attributes:
        terms_per_part: how many losses `terms` yields.
    """

    title = "The reward's gradient"
    terms_per_part = 1
    train: RewardGradientTrainConfig

    def __init__(self, engine: Engine) -> None:
        self.engine, self.train = engine, cast(Any, engine.config.train)
        self.steps = engine.config.sampling.num_inference_steps
        self.sampler = engine.sampler(backprop_steps=None)
        self.predict = functools.partial(self.sampler.predict, guidance_gradient=self.train.guidance_gradient)

    @classmethod
    def check_reward(cls, reward: Reward) -> None:
        check_differentiable(reward, cls.title)

    def path(self, source: torch.Generator) -> GradientPath:
        """Where the gradient flows in one optimizer step; what is random of it is drawn from `source`."""
        raise NotImplementedError

    def loss(self, r: Tensor) -> Tensor:
        """Of rewards (b,), to be minimised."""
        raise NotImplementedError

    def epoch(self, epoch: int) -> Iterator[Update]:
        tally, path = Tally(), self._drawn_path(epoch)
        parts = self.engine.batch_share.parts()
        for number, places in enumerate(parts):
            terms = self.terms(epoch, self.engine.samples(epoch, places), path, tally)
            for term in range(1, self.terms_per_part + 1):
                # DDP notes in the forward whether its gradients will be averaged.
                with self.engine.synchronised(number == len(parts) - 1 and term == self.terms_per_part):
                    self.engine.backward(next(terms) / len(parts))
        if self.engine.config.reward.on_nan == "drop" and not self.engine.any(tally.any_kept):
            tally.skipped = "every sample was dropped"
        yield tally.update()

    def terms(self, epoch: int, samples: Samples, path: GradientPath, tally: Tally) -> Iterator[Tensor]:
        """The losses of one accumulation part; each is backpropagated before the next is asked for."""
        trajectory = self.engine.sample(self.sampler, samples, path)
        tally.unet_evaluations += len(samples.prompts) * self.sampler.evaluations
        scores = self.engine.score(trajectory.latents, samples.prompts)
        tally.drew(scores)
        yield self.loss_of_kept(scores, tally)

    def loss_of_kept(self, scores: Scores, tally: Tally) -> Tensor:
        """The loss of the samples that were not dropped, as their share of the part's mean."""
        r, kept = scores.rewards, scores.rewards[scores.kept]
        # Where all were dropped the gradient is zero, and not absent: other processes wait to average theirs.
        loss = self.loss(kept) * (len(kept) / len(r)) if len(kept) else (r.nan_to_num() * 0).sum()
        tally.note("train/loss", loss)
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _drawn_path(self, epoch: int) -> GradientPath:
        source = generator(self.engine.config.seed, "gradient path", epoch)
        path = self.path(source)
        while not path.reaches_model:
            path = self.path(source)
        return dataclasses.replace(path, guidance=self.train.guidance_gradient)


class Draft(RewardGradient):
    """DRaFT and DRaFT-K: ascend the reward through the last K sampling steps, or all."""

    title = "DRaFT"
    train: DraftTrainConfig

    def path(self, source: torch.Generator) -> GradientPath:
        k = self.train.backprop_steps
        return paths.draft(self.steps) if k is None else paths.draft_k(self.steps, k)

    def loss(self, r: Tensor) -> Tensor:
        return draft(r)


class Alignprop(RewardGradient):
    """AlignProp: the gradient through a part of the chain that is drawn anew for each step."""

    title = "AlignProp"
    train: AlignpropTrainConfig

    def path(self, source: torch.Generator) -> GradientPath:
        train = self.train
        if train.truncation == "released":
            return paths.alignprop_released(self.steps, train.truncation_low, train.truncation_high, source)
        if train.truncation == "paper":
            return paths.alignprop_paper(self.steps, source)
        if train.truncation == "gaussian":
            return paths.alignprop_gaussian(self.steps, train.truncation_mean, train.truncation_std, source)
        return paths.draft(self.steps)

    def loss(self, r: Tensor) -> Tensor:
        return alignprop(r, self.train.reward_target, self.train.loss_scale)


class Refl(RewardGradient):
    """ReFL: the gradient of the x0 predicted at one late step."""

    title = "ReFL"
    train: ReflTrainConfig

    def path(self, source: torch.Generator) -> GradientPath:
        return paths.refl(self.steps, self.train.first_step, self.train.last_step, source)

    def loss(self, r: Tensor) -> Tensor:
        return refl(r, self.train.margin, self.train.loss_scale)


class Drtune(RewardGradient):
    """DRTune: the gradient at a few steps, the UNet's input detached."""

    title = "DRTune"
    train: DrtuneTrainConfig

    def path(self, source: torch.Generator) -> GradientPath:
        return paths.drtune(self.steps, self.train.train_steps, self.train.stops_from(self.steps), source)

    def loss(self, r: Tensor) -> Tensor:
        return drtune(r)
