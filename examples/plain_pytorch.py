"""DRaFT in plain PyTorch: a pipeline, a LoRA, a reward, an optimizer, and one sampler between them.

python examples/plain_pytorch.py    # the digits that ship with rftcore, on a CPU
python examples/plain_pytorch.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts simple_animals \
    --reward aesthetic --num_inference_steps 50 --guidance_scale 7.5 --batch_size 4 --learning_rate 4e-4
"""

import argparse

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig

import rftcore


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="DRaFT in plain PyTorch.", allow_abbrev=False)
    parser.add_argument("--model", default=rftcore.digits.path(), help="a Stable Diffusion: hub name or folder")
    parser.add_argument("--prompts", default="rftcore.digits.train_prompts", help="as rftcore.prompts.load takes them")
    parser.add_argument("--reward", default="digits", help="as rftcore.rewards.load takes it")
    parser.add_argument("--steps", type=int, default=10, help="of the optimizer")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--backprop_steps", type=int, help="K of DRaFT-K; default: the whole chain")
    return parser.parse_args(arguments)


def train(arguments: argparse.Namespace) -> list[float]:
    """The mean reward of each step."""
    torch.manual_seed(0)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    pipe = StableDiffusionPipeline.from_pretrained(arguments.model).to(device, dtype)
    reward, prompts = rftcore.rewards.load(arguments.reward).to(device), rftcore.prompts.load(arguments.prompts)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    cast_training_params(pipe.unet)
    rftcore.accelerate(pipe.unet)
    sampler = rftcore.CheckpointedSampler(
        pipe.unet,
        DDIMScheduler.from_config(pipe.scheduler.config),
        num_inference_steps=arguments.num_inference_steps,
        guidance_scale=arguments.guidance_scale,
        backprop_steps=arguments.backprop_steps,
    )
    trained = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate)
    seen = []
    for step in range(arguments.steps):
        batch = [prompts[i] for i in torch.randint(len(prompts), (arguments.batch_size,))]
        with torch.no_grad():
            embeds = pipe.encode_prompt(batch, device, 1, do_classifier_free_guidance=True)
        trajectory = sampler(*embeds)
        rewards = rftcore.score(pipe.vae, trajectory.latents, reward, batch)
        (-rewards.mean()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(rewards.mean().item())
        print(f"step {step + 1}: reward {seen[-1]:.4g}")
    print(sampler.plan)
    return seen


if __name__ == "__main__":
    train(options())
