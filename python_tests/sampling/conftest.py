"""Tiny UNets of every shape the sampler serves, with LoRA adapters that do something."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel, UNet2DModel
from peft import LoraConfig, inject_adapter_in_model


def _text_unet(**options):
    defaults = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**defaults, **options})


_UNETS = {
    "sd1": _text_unet,
    "sd2": lambda **o: _text_unet(use_linear_projection=True, attention_head_dim=(2, 4), **o),
    "sdxl": lambda **o: _text_unet(
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=4 * 6 + 10,
        transformer_layers_per_block=(1, 2),
        **o,
    ),
    "unconditional": lambda **o: UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
        **o,
    ),
}


def add_lora(unet):
    unet.requires_grad_(False)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    inject_adapter_in_model(config, unet)  # what unet.add_adapter does; UNet2DModel has no such method
    # B = 0 would hide every error in A's gradient.
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return unet


@pytest.fixture
def make_unet():
    def make(kind="sd1", dtype=torch.float64, lora=True, **options):
        unet = _UNETS[kind](**options).to(dtype).eval()
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
