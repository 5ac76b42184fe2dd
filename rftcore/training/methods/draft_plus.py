"""DRaFT+: DRaFT-K that is held near the model it began as."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rftcore.algorithms.draft_plus import divergence
from rftcore.sampling import GradientPath
from rftcore.training.algorithm_configs import DraftPlusTrainConfig
from rftcore.training.engine import Engine, Samples
from rftcore.training.methods.method import Tally
from rftcore.training.methods.reward_gradient import Draft


class DraftPlus(Draft):
    """The divergence is taken at the states of the differentiated steps, as constants, one step at a time."""

    title = "DRaFT+"
    train: DraftPlusTrainConfig

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        k = self.train.backprop_steps
        self.penalised = range(self.steps - (self.steps if k is None else k), self.steps)
        self.terms_per_part = 1 + len(self.penalised)

    def terms(self, epoch: int, samples: Samples, path: GradientPath, tally: Tally) -> Iterator[Tensor]:
        engine = self.engine
        trajectory = engine.sample(self.sampler, samples, path)
        tally.unet_evaluations += len(samples.prompts) * self.sampler.evaluations
        scores = engine.score(trajectory.latents, samples.prompts)
        tally.drew(scores)
        yield self.loss_of_kept(scores, tally)
        given, weight = engine.inputs.batch(samples.prompts), self.train.kl_coeff / len(self.penalised)
        for step in self.penalised:
            x_t, t = trajectory.states[step], trajectory.timesteps[step]
            with engine.clock.measure("sample"):
                with torch.no_grad():
                    base = self.predict(x_t, t, **given, adapter=False)
                d = divergence(self.predict(x_t, t, **given), base)
            tally.unet_evaluations += 2 * len(x_t) * self.engine.branches
            tally.note("train/divergence", d)
            yield weight * d.mean()
