"""What an algorithm composes: the model, the prompts, the reward and the batches, on this process's device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn

from rftcore.errors import UsageError
from rftcore.rewards import Reward
from rftcore.sampling import CheckpointedSampler, GradientPath, Trajectory, score
from rftcore.sampling.denoiser import Denoiser
from rftcore.training.accounting import Stopwatch
from rftcore.training.batches import SamplePlan, Share
from rftcore.training.config import RunConfig
from rftcore.training.memory_plan import Memory
from rftcore.training.prompt_inputs import PromptInputs


@dataclass(frozen=True)
class Samples:
    """Samples to be drawn at once: their numbers in the epoch, b prompts and b noise generators."""

    indices: Sequence[int]
    prompts: list[str]
    generators: list[torch.Generator]


@dataclass(frozen=True)
class Scores:
    """Rewards (b,) in reward points, NaN where a sample is dropped, and the images' saturated share (b,).

    Attributes:
        parts: of a weighted sum, each reward's own values (b,), by name.
    """

    rewards: Tensor
    saturated: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def kept(self) -> Tensor:
        """(b,) whether a sample counts."""
        return self.rewards.detach().isfinite()

    def recorded(self) -> Scores:
        """The same without their graph, on the CPU."""
        parts = {name: values.detach().cpu() for name, values in self.parts.items()}
        return Scores(self.rewards.detach().cpu(), self.saturated.detach().cpu(), parts)

    @classmethod
    def cat(cls, scores: Sequence[Scores]) -> Scores:
        """Those of several batches as one."""
        return cls(
            torch.cat([one.rewards for one in scores]),
            torch.cat([one.saturated for one in scores]),
            {name: torch.cat([one.parts[name] for one in scores]) for name in scores[0].parts},
        )


@dataclass
class Engine:
    """The parts of a run, and the few compositions of them that every algorithm needs.

    unet is as accelerate prepared it (DDP-wrapped on several processes); `model` is the UNet inside. vae is None for a
    model of pixels. memory is what chains are planned with.
    """

    accelerator: Accelerator
    unet: Any
    vae: AutoencoderKL | None
    scheduler: Any
    inputs: PromptInputs
    plan: SamplePlan
    sample_size: int | tuple[int, int]
    reward: Reward
    config: RunConfig
    clock: Stopwatch
    memory: Memory

    @property
    def model(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.unet)

    @property
    def branches(self) -> int:
        """UNet evaluations of a sample at one time: those of guidance."""
        return 2 if Denoiser(self.unet).guided(self.config.sampling.guidance_scale) else 1

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def share(self, rows: int, accumulation: int = 1) -> Share:
        """This process's share of as many rows."""
        return Share(rows, self.accelerator.process_index, self.accelerator.num_processes, accumulation)

    @property
    def batch_share(self) -> Share:
        """This process's share of an optimizer step's batch."""
        return self.share(self.config.train.batch_size, self.config.train.gradient_accumulation_steps)

    def sampler(self, **gradient: Any) -> CheckpointedSampler:
        """A sampler with the run's settings; `gradient` is backprop_steps or gradient_path.

        Raises: UsageError for settings that the model's scheduler cannot serve.
        """
        settings = self.config.sampling
        try:
            return CheckpointedSampler(
                self.unet,
                self.scheduler,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                eta=settings.eta,
                memory_budget=self.memory.budget,
                reserve=self.memory.reserve,
                capture=self.config.memory.capture,
                **gradient,
            )
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from error

    def samples(self, epoch: int, indices: Sequence[int]) -> Samples:
        """Samples of an epoch by their numbers."""
        return Samples(
            indices,
            [self.plan.prompt(epoch, index) for index in indices],
            [self.plan.noise(epoch, index) for index in indices],
        )

    def sample(
        self, sampler: CheckpointedSampler, samples: Samples, path: GradientPath | None = None, *, merged: bool = False
    ) -> Trajectory:
        """A trajectory of the samples, each with noise of its own, in the caller's grad mode."""
        with self.clock.measure("sample"):
            return sampler(
                **self.inputs.batch(samples.prompts),
                batch_size=len(samples.prompts),
                sample_size=self.sample_size,
                generator=samples.generators,
                gradient_path=path,
                merged=merged,
            )

    def score(self, latents: Tensor, prompts: list[str]) -> Scores:
        """Rewards, differentiable in grad mode."""
        with self.clock.measure("reward"):
            rewards, stats = score(
                self.vae,
                latents,
                self.reward,
                prompts,
                images_per_call=self.config.reward.images_per_call,
                on_nan=self.config.reward.on_nan,
                return_stats=True,
            )
        return Scores(rewards, stats["saturated"], stats["parts"])

    @contextmanager
    def synchronised(self, last: bool) -> Iterator[None]:
        """Gradients are averaged over processes in the last backward of an optimizer step only."""
        with nullcontext() if last else self.accelerator.no_sync(self.unet):
            yield

    def backward(self, loss: Tensor) -> None:
        """Backpropagates a loss that is this process's share of a mean over an optimizer step's batch."""
        with self.clock.measure("train"):
            self.accelerator.backward(loss)

    def any(self, flag: bool) -> bool:
        """Whether it is so on any process."""
        return bool(self.accelerator.gather(torch.tensor([flag], device=self.device)).any())

    def gathered(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every process's rows (n, ...) on the CPU, process by process; each must hold as many."""
        return {name: self.accelerator.gather(column.to(self.device)).cpu() for name, column in rows.items()}
