"""DRaFT in a script as diffusers' examples are: accelerate, PEFT, a progress bar, and the LoRA in diffusers' layout.

accelerate launch examples/diffusers_script.py    # the digits that ship with rftcore, on a CPU
accelerate launch examples/diffusers_script.py \
    --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts simple_animals \
    --reward aesthetic --num_inference_steps 50 --guidance_scale 7.5 --train_batch_size 1 \
    --gradient_accumulation_steps 4 --learning_rate 4e-4 --mixed_precision bf16 --output_dir runs/draft
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tqdm.auto import tqdm

import rftcore


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="DRaFT with accelerate and PEFT.", allow_abbrev=False)
    parser.add_argument("--pretrained_model_name_or_path", default=rftcore.digits.path())
    parser.add_argument("--prompts", default="rftcore.digits.train_prompts", help="as rftcore.prompts.load takes them")
    parser.add_argument("--reward", default="digits", help="as rftcore.rewards.load takes it")
    parser.add_argument("--output_dir", default="runs/diffusers_script")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--max_train_steps", type=int, default=10)
    parser.add_argument("--train_batch_size", type=int, default=4, help="on each process")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2)
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--lr_scheduler", default="constant")
    parser.add_argument("--max_grad_norm", type=float, default=1.0)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--num_inference_steps", type=int, default=10)
    parser.add_argument("--guidance_scale", type=float, default=2.0)
    parser.add_argument("--backprop_steps", type=int, help="K of DRaFT-K; default: the whole chain")
    return parser.parse_args(arguments)


def main(args: argparse.Namespace) -> list[float]:
    """Trains, saves, and returns the mean reward of each optimizer step, over all processes."""
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.gradient_accumulation_steps
    )
    set_seed(args.seed)
    pipe = StableDiffusionPipeline.from_pretrained(args.pretrained_model_name_or_path)
    pipe.to(accelerator.device, torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32)
    unet, vae = pipe.unet, pipe.vae
    for module in (unet, vae, pipe.text_encoder):
        module.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(
            r=args.rank,
            lora_alpha=args.rank,
            init_lora_weights="gaussian",
            target_modules=["to_k", "to_q", "to_v", "to_out.0"],
        )
    )
    cast_training_params(unet)
    rftcore.accelerate(unet)
    reward = rftcore.rewards.load(args.reward).to(accelerator.device)
    prompts = rftcore.prompts.load(args.prompts)

    lora_parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(lora_parameters, lr=args.learning_rate)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=0,
        num_training_steps=args.max_train_steps * accelerator.num_processes,
    )
    unet, optimizer, lr_scheduler = accelerator.prepare(unet, optimizer, lr_scheduler)
    sampler = rftcore.CheckpointedSampler(
        unet,
        DDIMScheduler.from_config(pipe.scheduler.config),
        num_inference_steps=args.num_inference_steps,
        guidance_scale=args.guidance_scale,
        backprop_steps=args.backprop_steps,
    )

    set_seed(args.seed, device_specific=True)  # every process its own prompts and noise
    progress_bar = tqdm(range(args.max_train_steps), disable=not accelerator.is_local_main_process)
    means, parts = [], []
    while len(means) < args.max_train_steps:
        batch = [prompts[i] for i in torch.randint(len(prompts), (args.train_batch_size,))]
        with accelerator.accumulate(unet):
            with torch.no_grad():
                embeds = pipe.encode_prompt(batch, accelerator.device, 1, do_classifier_free_guidance=True)
            trajectory = sampler(*embeds)
            rewards = rftcore.score(vae, trajectory.latents, reward, batch)
            accelerator.backward(-rewards.mean())
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(lora_parameters, args.max_grad_norm)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        parts.append(accelerator.gather(rewards.detach()).mean().item())
        if accelerator.sync_gradients:
            means.append(sum(parts) / len(parts))
            parts.clear()
            progress_bar.update()
            progress_bar.set_postfix(reward=means[-1])
    progress_bar.close()

    if accelerator.is_main_process:
        lora = convert_state_dict_to_diffusers(get_peft_model_state_dict(accelerator.unwrap_model(unet)))
        StableDiffusionPipeline.save_lora_weights(args.output_dir, unet_lora_layers=lora)
    accelerator.end_training()
    return means


if __name__ == "__main__":
    main(options())
