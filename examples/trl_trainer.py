"""TRL 0.23.1's AlignProp and DDPO trainers with their sampling, and DDPO's re-scoring, by `CheckpointedSampler`.

pip install -c constraints.txt pandas && pip install --no-deps trl==0.23.1    # the last TRL with these two trainers
python examples/trl_trainer.py --trainer alignprop    # or ddpo: the digits that ship with rftcore, on a CPU
python examples/trl_trainer.py --trainer alignprop --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --prompts simple_animals --reward aesthetic --mixed_precision bf16 --num_steps 50 --batch_size 4 \
    --learning_rate 1e-3
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import accelerate
import torch
from torch import Tensor

import rftcore
from rftcore import CheckpointedSampler, GradientPath, Trajectory

try:
    from trl import AlignPropConfig, AlignPropTrainer, DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
    from trl.models.modeling_sd_base import DDPOPipelineOutput
except (ImportError, RuntimeError) as error:  # RuntimeError is TRL's for a module of its own that does not import
    raise ImportError(
        f"TRL 0.23.1 is needed, the last with these trainers (see the top of this file): {error}"
    ) from error


class SamplerPipeline(DefaultDDPOStableDiffusionPipeline):
    """What AlignPropTrainer and DDPOTrainer are given in place of `DefaultDDPOStableDiffusionPipeline`.

    Noise comes from where TRL takes it, so that the same seed gives the same trajectory: `generator` draws the first
    latents, the default generator the steps' noise. Prompts come as embeddings, as both trainers give them.

    Args:
        sampler_options: more options for `CheckpointedSampler`.
    """

    def __init__(self, *args, sampler_options: dict[str, Any] | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.sampler_options = sampler_options or {}
        self._samplers: dict[tuple, CheckpointedSampler] = {}

    def __call__(self, **arguments) -> DDPOPipelineOutput:
        with torch.no_grad():
            return self._sample(**arguments)

    def rgb_with_grad(
        self,
        *,
        num_inference_steps: int = 50,
        truncated_backprop: bool = True,
        truncated_backprop_rand: bool = True,
        truncated_backprop_timestep: int = 49,
        truncated_rand_backprop_minmax: tuple[int, int] = (0, 50),
        **arguments,
    ) -> DDPOPipelineOutput:
        def truncated_before() -> int:
            if not truncated_backprop:
                return 0
            if truncated_backprop_rand:
                return random.randint(*truncated_rand_backprop_minmax)
            return truncated_backprop_timestep

        # TRL draws anew at every step, and detaches the UNet's output alone.
        modes = ["detach_eps" if step < truncated_before() else "full" for step in range(num_inference_steps)]
        return self._sample(num_inference_steps=num_inference_steps, gradient_path=GradientPath(modes), **arguments)

    def _sample(
        self,
        *,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        gradient_path: GradientPath | None = None,
        output_type: str = "pt",
    ) -> DDPOPipelineOutput:
        pipe = self.sd_pipeline
        pipe.scheduler.set_timesteps(num_inference_steps)  # DDPOTrainer reads its timesteps
        if latents is None and generator is not None:
            size = pipe.unet.config.sample_size * pipe.vae_scale_factor
            shape = (len(prompt_embeds), pipe.unet.config.in_channels, size, size)
            latents = pipe.prepare_latents(*shape, prompt_embeds.dtype, prompt_embeds.device, generator)
        self.sampler = self._sampler(num_inference_steps, guidance_scale, eta)
        trajectory = self.sampler(prompt_embeds, negative_prompt_embeds, latents=latents, gradient_path=gradient_path)
        images = trajectory.latents if output_type == "latent" else rftcore.decode(self.vae, trajectory.latents)
        self.trajectory = trajectory.detach()
        return DDPOPipelineOutput(images, list(trajectory.states), list(trajectory.log_probs.unbind(1)))

    def _sampler(self, *key) -> CheckpointedSampler:
        if key not in self._samplers:
            num_inference_steps, guidance_scale, eta = key
            self._samplers[key] = CheckpointedSampler(
                self.unet,
                self.scheduler,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                eta=eta,
                final_step="clamp",  # TRL's last step ends on alphas_cumprod[0], with noise
                **self.sampler_options,
            )
        return self._samplers[key]


class SamplerDDPOTrainer(DDPOTrainer):
    """DDPOTrainer (with `train_cfg`, its default) that re-scores by `CheckpointedSampler.log_prob`.

    TRL shuffles and cuts copies of all states and next states; here these are two tables of indices, the sample's row
    and the step.
    """

    def _generate_samples(self, iterations: int, batch_size: int) -> tuple[list, list]:
        samples, pairs, trajectories = [], [], []
        for _ in range(iterations):
            more_samples, more_pairs = super()._generate_samples(1, batch_size)
            samples += more_samples
            pairs += more_pairs
            trajectories.append(self.sd_pipeline.trajectory)
        self.trajectory = Trajectory.cat(trajectories)
        for number, sample in enumerate(samples):
            (count, steps), device = sample["timesteps"].shape, sample["timesteps"].device
            rows = torch.arange(number * count, (number + 1) * count, device=device)
            sample["latents"] = rows[:, None].expand(count, steps)
            sample["next_latents"] = torch.arange(steps, device=device).expand(count, steps)
        return samples, pairs

    def calculate_loss(
        self, rows: Tensor, timesteps: Tensor, steps: Tensor, log_probs: Tensor, advantages: Tensor, embeds: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        with self.autocast():
            log_prob = self.sd_pipeline.sampler.log_prob(self.trajectory[rows], steps[:, None])[0][:, 0]
        limit, clip_range = self.config.train_adv_clip_max, self.config.train_clip_range
        ratio = torch.exp(log_prob - log_probs)
        loss = self.loss(advantages.clamp(-limit, limit), clip_range, ratio)
        approx_kl = 0.5 * torch.mean((log_prob - log_probs) ** 2)
        return loss, approx_kl, torch.mean((torch.abs(ratio - 1.0) > clip_range).float())


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="TRL's trainers with rftcore's sampler.", allow_abbrev=False)
    parser.add_argument("--trainer", choices=["alignprop", "ddpo"], default="alignprop")
    parser.add_argument("--model", default=rftcore.digits.path(), help="a Stable Diffusion: hub name or folder")
    parser.add_argument("--prompts", default="rftcore.digits.train_prompts", help="as rftcore.prompts.load takes them")
    parser.add_argument("--reward", default="digits", help="as rftcore.rewards.load takes it")
    parser.add_argument("--output_dir", default="runs/trl_trainer", help="of TRL's checkpoints, one an epoch")
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--num_steps", type=int, default=10)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> list[float]:
    """The mean reward of each batch."""
    device = accelerate.PartialState().device  # TRL's logger wants it made first
    reward, prompts = rftcore.rewards.load(arguments.reward).to(device), rftcore.prompts.load(arguments.prompts)
    means: list[float] = []

    def scored(images: Tensor, prompts: tuple[str], metadata: tuple[Any]) -> tuple[Tensor, dict]:
        rewards = reward(images, list(prompts))
        means.append(rewards.mean().item())
        print(f"batch {len(means)}: reward {means[-1]:.4g}")
        return rewards, {}

    def drawn() -> tuple[str, dict]:
        return random.choice(prompts), {}

    settings = {
        "mixed_precision": arguments.mixed_precision,
        "num_epochs": arguments.epochs,
        "project_kwargs": {"project_dir": arguments.output_dir, "automatic_checkpoint_naming": True},
        "sample_num_steps": arguments.num_steps,
        "sample_guidance_scale": arguments.guidance_scale,
        "train_batch_size": arguments.batch_size,
        "train_learning_rate": arguments.learning_rate,
    }
    pipeline = SamplerPipeline(arguments.model)
    if arguments.trainer == "alignprop":
        config = AlignPropConfig(
            **settings,
            train_gradient_accumulation_steps=1,
            truncated_rand_backprop_minmax=(0, arguments.num_steps),
        )
        trainer = AlignPropTrainer(config, scored, drawn, pipeline)
    else:
        config = DDPOConfig(**settings, sample_batch_size=arguments.batch_size, sample_num_batches_per_epoch=1)
        trainer = SamplerDDPOTrainer(config, scored, drawn, pipeline)
    rftcore.accelerate(pipeline.unet)
    trainer.train()
    return means


if __name__ == "__main__":
    main(options())
