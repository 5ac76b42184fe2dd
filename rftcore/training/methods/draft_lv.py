"""DRaFT-LV: DRaFT-1 and, for less variance, the same of the sample noised again."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rftcore.algorithms import paths
from rftcore.algorithms.draft import draft
from rftcore.algorithms.draft_lv import denoise, renoise
from rftcore.sampling import GradientPath
from rftcore.training.algorithm_configs import DraftLvTrainConfig
from rftcore.training.batches import generator
from rftcore.training.engine import Engine, Samples
from rftcore.training.methods.method import Tally
from rftcore.training.methods.reward_gradient import RewardGradient


class DraftLv(RewardGradient):
    """The gradient of the sample's reward through its last step, and of n samples made of it by another noise."""

    title = "DRaFT-LV"
    train: DraftLvTrainConfig

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.terms_per_part = 1 + self.train.noise_draws

    def path(self, source: torch.Generator) -> GradientPath:
        return paths.draft_k(self.steps, 1)

    def loss(self, r: Tensor) -> Tensor:
        return draft(r)

    def terms(self, epoch: int, samples: Samples, path: GradientPath, tally: Tally) -> Iterator[Tensor]:
        engine, config = self.engine, self.engine.scheduler.config
        trajectory = engine.sample(self.sampler, samples, path)
        tally.unet_evaluations += len(samples.prompts) * self.sampler.evaluations
        scores = engine.score(trajectory.latents, samples.prompts)
        tally.drew(scores)
        yield self.loss_of_kept(scores, tally)
        x_0, t_1 = trajectory.latents.detach(), int(trajectory.timesteps[-1])
        alpha_bar_1 = float(engine.scheduler.alphas_cumprod[t_1])
        for draw in range(self.train.noise_draws):
            sources = [generator(engine.config.seed, "noise again", epoch, index, draw) for index in samples.indices]
            noise = torch.stack([torch.randn(x_0.shape[1:], generator=source, dtype=x_0.dtype) for source in sources])
            x_1 = renoise(x_0, noise.to(x_0.device), alpha_bar_1)
            with engine.clock.measure("sample"):
                output = self.predict(x_1, t_1, **engine.inputs.batch(samples.prompts))
            tally.unet_evaluations += len(x_1) * self.engine.branches
            scores = engine.score(denoise(x_1, output, alpha_bar_1, config.prediction_type), samples.prompts)
            tally.reward_queries += len(x_1)
            yield self.loss_of_kept(scores, tally)
