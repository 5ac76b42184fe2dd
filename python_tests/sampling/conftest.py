"""Fixtures of the tests of the sampler."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from models import UNETS, add_lora


@pytest.fixture
def make_unet():
    def make(kind="sd1", dtype=torch.float64, lora=True, **options):
        unet = UNETS[kind](**options).to(dtype).eval()
        return add_lora(unet) if lora else unet

    return make


@pytest.fixture
def make_scheduler():
    def make(kind="ddim", fp64=True, **options):
        defaults = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
        if kind == "ddim":
            defaults |= {"set_alpha_to_one": False, "steps_offset": 1}
        scheduler = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}[kind](**{**defaults, **options})
        if fp64:
            scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
            if kind == "ddim":
                scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
            else:
                scheduler.one = scheduler.one.double()
        return scheduler

    return make


@pytest.fixture
def conditioning():
    """kind, batch size -> the sampler's keyword arguments for it, without and with the negative branch."""

    def make(kind, batch=2, dtype=torch.float64, guided=True):
        if kind == "unconditional":
            return {}
        made = {"prompt_embeds": torch.randn(batch, 5, 12, dtype=dtype)}
        if guided:
            made["negative_prompt_embeds"] = torch.randn(batch, 5, 12, dtype=dtype)
        if kind == "sdxl":
            ids = torch.randint(0, 9, (batch, 6)).to(dtype)
            made["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, 10, dtype=dtype), "time_ids": ids}
            if guided:
                made["negative_added_cond_kwargs"] = {"text_embeds": torch.randn(batch, 10, dtype=dtype)}
        return made

    return make
