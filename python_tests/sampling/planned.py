"""What the tests of plans plan for."""

import torch
from diffusers import DDIMScheduler
from models import UNETS, add_lora
from shared_simulations import simulation

import rftcore
from rftcore.sampling.denoiser import Denoiser
from rftcore.sampling.planner import Planner

MODES = ("none", "full", "full", "full")


def unet_of(kind="sd1", accelerated=True):
    unet = add_lora(UNETS[kind]().eval())
    return rftcore.accelerate(unet) if accelerated else unet


def conditioning_of(kind, rows):
    if kind == "unconditional":
        return {}
    made = {"prompt_embeds": torch.randn(rows, 5, 12)}
    return made | {"text_embeds": torch.randn(rows, 10), "time_ids": torch.rand(rows, 6)} if kind == "sdxl" else made


def planner_of(unet, kind="sd1", batch=2, modes=MODES):
    twin = simulation(Denoiser(unet), conditioning_of(kind, 1), 8, 8, guided=kind != "unconditional")
    return Planner(twin, batch, modes)


def arguments_of(kind, batch):
    """What the sampler is called with."""
    positive, negative = conditioning_of(kind, batch), conditioning_of(kind, batch)
    if kind == "unconditional":
        return {}
    made = {"prompt_embeds": positive.pop("prompt_embeds"), "negative_prompt_embeds": negative.pop("prompt_embeds")}
    return made | {"added_cond_kwargs": positive, "negative_added_cond_kwargs": negative} if positive else made


def sampler_of(unet, kind, **options):
    scheduler, guidance = DDIMScheduler(num_train_timesteps=100), 1.0 if kind == "unconditional" else 3.0
    return rftcore.CheckpointedSampler(
        unet, scheduler, num_inference_steps=4, guidance_scale=guidance, backprop_steps=3, **options
    )
