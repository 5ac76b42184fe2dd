"""One DRaFT step on the digits pipeline: ours against diffusers' scheduler with a checkpoint around every step.

python -m benchmarks.draft_step [--batch 8] [--steps 20] [--repeats 5] [--threads 1]

`rftcore` has the memory there is, and once the bytes that those checkpoints take. Its sampler is made before the first
step, as in a training loop.
"""

from __future__ import annotations

import argparse
import copy
import functools

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint

import rftcore
from benchmarks.harness import Case, compare, report
from rftcore.counting import PeakBytes

GUIDANCE = 2.0


class Problem:
    """The digits pipeline with a LoRA that does something, prompts and noise."""

    def __init__(self, batch: int, steps: int) -> None:
        torch.manual_seed(0)
        self.steps = steps
        pipe = StableDiffusionPipeline.from_pretrained(rftcore.digits.path())
        pipe.set_progress_bar_config(disable=True)
        self.unet, self.vae, self.scheduler = pipe.unet, pipe.vae, pipe.scheduler
        for module in (self.unet, self.vae):
            module.requires_grad_(False)
        self.unet.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        for name, parameter in self.unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        self.prompts = (rftcore.digits.train_prompts() * batch)[:batch]
        with torch.no_grad():
            self.positive, self.negative = pipe.encode_prompt(self.prompts, "cpu", 1, True)
        self.noise = torch.randn(batch, 4, *[self.unet.config.sample_size] * 2)

    def in_fp64(self) -> Problem:
        """The same problem with every number widened."""
        wide = copy.deepcopy(self)
        wide.unet, wide.vae = wide.unet.double(), wide.vae.double()
        wide.positive, wide.negative, wide.noise = wide.positive.double(), wide.negative.double(), wide.noise.double()
        return wide

    def finish(self, loss: torch.Tensor) -> list[torch.Tensor]:
        loss.backward()
        trained = [p for p in self.unet.parameters() if p.requires_grad]
        grads = [p.grad for p in trained]
        self.unet.zero_grad()
        return grads

    def sampler(self, backprop_steps: int, budget: int | None = None) -> rftcore.CheckpointedSampler:
        return rftcore.CheckpointedSampler(
            self.unet, self.scheduler, num_inference_steps=self.steps, guidance_scale=GUIDANCE,
            backprop_steps=backprop_steps, memory_budget=budget,
        )  # fmt: skip

    def ours(self, sampler: rftcore.CheckpointedSampler) -> list[torch.Tensor]:
        trajectory = sampler(self.positive, self.negative, latents=self.noise)
        rewards = rftcore.score(
            self.vae, trajectory.latents, rftcore.digits.reward, self.prompts, images_per_call=len(self.prompts)
        )
        return self.finish(-rewards.mean())

    def stock(self, backprop_steps: int) -> list[torch.Tensor]:
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(self.steps)
        prompts = torch.cat([self.negative, self.positive])

        def step(x, t):
            negative, positive = self.unet(torch.cat([x, x]), t, prompts, return_dict=False)[0].chunk(2)
            eps = negative + GUIDANCE * (positive - negative)
            return scheduler.step(eps, t, x, return_dict=False)[0]

        x = self.noise
        for index, t in enumerate(scheduler.timesteps):
            if index < self.steps - backprop_steps:
                with torch.no_grad():
                    x = step(x, t)
            else:
                x = checkpoint(step, x, t, use_reentrant=False)
        images = self.vae.decode(x / self.vae.config.scaling_factor, return_dict=False)[0]
        rewards = rftcore.digits.reward((images / 2 + 0.5).clamp(0, 1), self.prompts)
        return self.finish(-rewards.mean())


def relative_error(grads: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    off = sum((g.double() - t).pow(2).sum() for g, t in zip(grads, truth, strict=True))
    return (off / sum(t.pow(2).sum() for t in truth)).sqrt().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    problem = Problem(arguments.batch, arguments.steps)
    exact = problem.in_fp64()
    rows = []
    for k in (1, 5, arguments.steps):
        truth = exact.stock(k)
        with PeakBytes() as live:
            problem.stock(k)
        ways = {
            "stock, a checkpoint a step": functools.partial(problem.stock, k),
            "rftcore": functools.partial(problem.ours, problem.sampler(k)),
            "rftcore, in the same bytes": functools.partial(problem.ours, problem.sampler(k, live.peak)),
        }
        cases = [
            Case(name, run, {"backprop_steps": k, "gradient_error": relative_error(run(), truth)})
            for name, run in ways.items()
        ]
        rows += compare(cases, repeats=arguments.repeats)
    report("draft_step", rows, vars(arguments))


if __name__ == "__main__":
    main()
