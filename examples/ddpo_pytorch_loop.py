"""DDPO in a loop of ddpo-pytorch's shape: sample, standardise rewards per prompt, then inner epochs of clipped updates.

accelerate launch examples/ddpo_pytorch_loop.py    # the digits that ship with rftcore, on a CPU
accelerate launch examples/ddpo_pytorch_loop.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --prompts simple_animals --reward file_size_compressibility --num_steps 50 --guidance_scale 5.0 --epochs 100 \
    --sample_batch_size 8 --num_batches_per_epoch 4 --train_batch_size 4 --learning_rate 3e-4
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig

import rftcore
from rftcore.algorithms.advantages import PromptStatistics
from rftcore.algorithms.ddpo import importance_sampling


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="DDPO in a loop of ddpo-pytorch's shape.", allow_abbrev=False)
    parser.add_argument("--model", default=rftcore.digits.path(), help="a Stable Diffusion: hub name or folder")
    parser.add_argument("--prompts", default="rftcore.digits.train_prompts", help="as rftcore.prompts.load takes them")
    parser.add_argument("--reward", default="digits", help="as rftcore.rewards.load takes it; needs no gradient")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--sample_batch_size", type=int, default=8, help="on each process")
    parser.add_argument("--num_batches_per_epoch", type=int, default=2)
    parser.add_argument("--train_batch_size", type=int, default=8, help="on each process; an update each")
    parser.add_argument("--num_inner_epochs", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--num_steps", type=int, default=10)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--clip_range", type=float, default=1e-4)
    parser.add_argument("--adv_clip_max", type=float, default=5.0)
    return parser.parse_args(arguments)


def main(arguments: argparse.Namespace) -> list[float]:
    """The mean reward of each epoch, over all processes."""
    accelerator = Accelerator()
    set_seed(0)
    pipe = StableDiffusionPipeline.from_pretrained(arguments.model).to(accelerator.device)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
    cast_training_params(pipe.unet)
    rftcore.accelerate(pipe.unet)
    trained = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=1e-4)
    unet, optimizer = accelerator.prepare(pipe.unet, optimizer)
    sampler = rftcore.CheckpointedSampler(
        unet,
        DDIMScheduler.from_config(pipe.scheduler.config),
        num_inference_steps=arguments.num_steps,
        guidance_scale=arguments.guidance_scale,
        eta=1.0,
        final_step="clamp",  # ends as ddpo-pytorch does
    )
    reward = rftcore.rewards.load(arguments.reward).to(accelerator.device)
    prompts = rftcore.prompts.load(arguments.prompts)
    statistics = PromptStatistics()

    set_seed(0, device_specific=True)  # every process its own prompts and noise
    means = []
    for epoch in range(arguments.epochs):
        batches, trajectories, rewards = [], [], []
        for _ in range(arguments.num_batches_per_epoch):
            batch = [prompts[i] for i in torch.randint(len(prompts), (arguments.sample_batch_size,))]
            with torch.no_grad():
                embeds = pipe.encode_prompt(batch, accelerator.device, 1, do_classifier_free_guidance=True)
                trajectory = sampler(*embeds)
                rewards.append(rftcore.score(pipe.vae, trajectory.latents, reward, batch))
            batches += batch
            trajectories.append(trajectory)
        trajectory, rewards = rftcore.Trajectory.cat(trajectories), torch.cat(rewards)

        everyones = accelerator.gather(rewards)
        advantages = statistics.advantages(gather_object(batches), everyones)
        advantages = advantages.view(accelerator.num_processes, -1)[accelerator.process_index]
        advantages = advantages.clamp(-arguments.adv_clip_max, arguments.adv_clip_max)
        means.append(everyones.mean().item())
        accelerator.print(f"epoch {epoch + 1}: reward {means[-1]:.4g}")

        samples, steps = trajectory.log_probs.shape
        for _ in range(arguments.num_inner_epochs):
            orders = torch.stack([torch.randperm(steps) for _ in range(samples)])  # (B, T), each sample's own
            for rows in torch.randperm(samples).split(arguments.train_batch_size):
                part = trajectory[rows]
                for numbers in orders[rows].unbind(1):
                    log_prob = sampler.log_prob(part, numbers[:, None])[0][:, 0]
                    old_log_prob = trajectory.log_probs[rows, numbers]
                    loss = importance_sampling(log_prob, old_log_prob, advantages[rows], arguments.clip_range)
                    accelerator.backward(loss / steps)
                accelerator.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
    accelerator.end_training()
    return means


if __name__ == "__main__":
    main(options())
