"""A loop in the shape of ddpo-pytorch, and the same with its sampling and re-scoring by `CheckpointedSampler`."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from peft import LoraConfig
from torch import Tensor

from benchmarks.programs import PROMPTS, Program, redness
from rftcore import CheckpointedSampler

STEPS, GUIDANCE, ETA = 4, 5.0, 1.0
CLIP, ADVANTAGE_CLIP = 1e-4, 5.0
BATCH = 2  # samples an update


def ddim_step_with_log_prob(
    scheduler: DDIMScheduler, eps: Tensor, t: Tensor, x_t: Tensor, next_x: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A DDIM step, drawn or given as `next_x`, and its log-probability (B,), nats per element.

    Args:
        t: () or, for steps of each sample's own, (B,). The step ends at 0 where it would end below.

    Source: Song et al. 2021 (DDIM), eq. 12 and 16; ddpo-pytorch's clamp.
    """

    def column(values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (x_t.ndim - 1)).to(x_t.device)

    previous = (t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps).clamp(min=0)
    a_t, a_p = (column(scheduler.alphas_cumprod[times.cpu()]) for times in (t, previous))
    x0 = (x_t - (1 - a_t).sqrt() * eps) / a_t.sqrt()
    sigma = ETA * ((1 - a_p) / (1 - a_t)).sqrt() * (1 - a_t / a_p).sqrt()
    mean = a_p.sqrt() * x0 + (1 - a_p - sigma**2).sqrt() * eps
    if next_x is None:
        next_x = mean + sigma * randn_tensor(x_t.shape, device=x_t.device, dtype=x_t.dtype)
    log_prob = -((next_x.detach() - mean) ** 2) / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)
    return next_x, log_prob.flatten(1).mean(1)


class Loop(Program):
    """One epoch a step: a sample for each prompt, its reward, and an update for every `BATCH` samples."""

    name = "ddpo-pytorch's loop"

    def load(self, folder: Path) -> None:
        self.pipe = StableDiffusionPipeline.from_pretrained(folder).to(self.device)

    def set_up(self) -> None:
        set_seed(0)
        pipe = self.pipe
        for module in (pipe.unet, pipe.vae, pipe.text_encoder):
            module.requires_grad_(False)
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
        self.trained = [p for p in pipe.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=3e-4, weight_decay=1e-4)
        pipe.scheduler.set_timesteps(STEPS, device=self.device)

    def to(self, dtype: torch.dtype) -> None:
        super().to(dtype)
        ids = self.pipe.tokenizer(["", *PROMPTS], return_tensors="pt", padding="max_length", truncation=True).input_ids
        embeddings = self.pipe.text_encoder(ids.to(self.device))[0]
        self.positive, self.negative = embeddings[1:], embeddings[:1].expand_as(embeddings[1:])

    def train(self) -> None:
        with torch.no_grad():
            latents, old_log_probs = self.sample()
            images = self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor).sample
            rewards = redness((images / 2 + 0.5).clamp(0, 1))
        advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-8)).clamp(-ADVANTAGE_CLIP, ADVANTAGE_CLIP)
        orders = torch.stack([torch.randperm(STEPS) for _ in PROMPTS])  # (B, T)
        for rows in torch.randperm(len(PROMPTS)).split(BATCH):
            for steps in orders[rows].unbind(1):
                ratio = (self.log_prob(rows, steps) - old_log_probs[rows, steps]).exp()
                losses = -advantages[rows] * torch.stack([ratio, ratio.clamp(1 - CLIP, 1 + CLIP)])
                loss = losses.max(0).values.mean()
                self.record(loss)
                (loss / STEPS).backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def sample(self) -> tuple[Tensor, Tensor]:
        """The last latents (B, C, h, w) and all log-probabilities (B, T)."""
        size, channels = self.pipe.unet.config.sample_size, self.pipe.unet.config.in_channels
        x = randn_tensor((len(PROMPTS), channels, size, size), device=self.device, dtype=self.positive.dtype)
        states, log_probs = [x], []
        for t in self.pipe.scheduler.timesteps:
            x, log_prob = ddim_step_with_log_prob(self.pipe.scheduler, self._eps(x, t, slice(None)), t, x)
            states.append(x)
            log_probs.append(log_prob)
        self.states, self.log_probs = torch.stack(states), torch.stack(log_probs, 1)
        return x, self.log_probs

    def log_prob(self, rows: Tensor, steps: Tensor) -> Tensor:
        """(B,) of a step of each row, under the UNet as it is now."""
        x, next_x, t = self.states[steps, rows], self.states[steps + 1, rows], self.pipe.scheduler.timesteps[steps]
        return ddim_step_with_log_prob(self.pipe.scheduler, self._eps(x, t, rows), t, x, next_x)[1]

    def _eps(self, x: Tensor, t: Tensor, rows: Tensor | slice) -> Tensor:
        embeddings = torch.cat([self.negative[rows], self.positive[rows]])
        output = self.pipe.unet(torch.cat([x, x]), torch.cat([t, t]) if t.ndim else t, embeddings).sample
        negative, positive = output.chunk(2)
        return negative + GUIDANCE * (positive - negative)


class SamplerLoop(Loop):
    """The same, without a scheduler step of its own."""

    def to(self, dtype: torch.dtype) -> None:
        super().to(dtype)
        self.sampler = CheckpointedSampler(
            self.pipe.unet,
            self.pipe.scheduler,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            eta=ETA,
            final_step="clamp",
        )

    def sample(self) -> tuple[Tensor, Tensor]:
        self.trajectory = self.sampler(self.positive, self.negative)
        self.states, self.log_probs = self.trajectory.states, self.trajectory.log_probs
        return self.trajectory.latents, self.log_probs

    def log_prob(self, rows: Tensor, steps: Tensor) -> Tensor:
        return self.sampler.log_prob(self.trajectory[rows], steps[:, None])[0][:, 0]
