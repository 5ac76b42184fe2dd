"""What an algorithm composes: the model, the prompts, the reward and the batches, on this process's device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from rftcore.rewards import Reward
from rftcore.sampling import CheckpointedSampler, Plan, Trajectory, score
from rftcore.training.accounting import Stopwatch
from rftcore.training.batches import Part, SamplePlan
from rftcore.training.config import RunConfig
from rftcore.training.errors import UsageError
from rftcore.training.pipeline import PromptEmbeddings


@dataclass
class Engine:
    """The parts of a run, and the few compositions of them that every algorithm needs.

    unet is as accelerate prepared it (DDP-wrapped on several processes); `model` is the UNet inside. memory_plan is that
    of the run that is resumed.
    """

    accelerator: Accelerator
    unet: Any
    vae: AutoencoderKL
    scheduler: Any
    embeddings: PromptEmbeddings
    plan: SamplePlan
    sample_size: int | tuple[int, int]
    reward: Reward
    config: RunConfig
    clock: Stopwatch
    memory_plan: Plan | None = None

    @property
    def model(self) -> UNet2DConditionModel:
        return self.accelerator.unwrap_model(self.unet)

    def sampler(self, **gradient: Any) -> CheckpointedSampler:
        """A sampler with the run's settings; `gradient` is backprop_steps or gradient_path.

        Raises: UsageError for settings that the model's scheduler cannot serve.
        """
        settings, memory = self.config.sampling, self.config.memory
        try:
            return CheckpointedSampler(
                self.unet,
                self.scheduler,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                eta=settings.eta,
                memory_budget=None if self.memory_plan is not None else memory.budget,
                reserve=memory.reserve,
                plan=self.memory_plan,
                capture=memory.capture,
                **gradient,
            )
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from error

    def parts(self, step: int) -> list[Part]:
        """This process's share of a step's samples."""
        return self.plan.parts(
            step,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.config.train.gradient_accumulation_steps,
        )

    def sample(self, sampler: CheckpointedSampler, prompts: list[str], generators: list) -> Trajectory:
        """A trajectory of one sample for each prompt, each with noise of its own, in the caller's grad mode."""
        positive, negative = self.embeddings.batch(prompts)
        with self.clock.measure("sample"):
            return sampler(positive, negative, sample_size=self.sample_size, generator=generators)

    def score(self, latents: Tensor, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Rewards (b,), differentiable in grad mode, and the saturated share (b,) of the images."""
        with self.clock.measure("reward"):
            rewards, stats = score(
                self.vae,
                latents,
                self.reward,
                prompts,
                images_per_call=self.config.reward.images_per_call,
                return_stats=True,
            )
        return rewards, stats["saturated"]

    @contextmanager
    def synchronised(self, part: Part) -> Iterator[None]:
        """Gradients are averaged over processes in the last accumulation part only."""
        with nullcontext() if part.is_last else self.accelerator.no_sync(self.unet):
            yield

    def backward(self, loss: Tensor) -> None:
        """Backpropagates one part's loss, a mean over its samples, as its share of the whole batch's mean."""
        with self.clock.measure("train"):
            self.accelerator.backward(loss / self.config.train.gradient_accumulation_steps)
