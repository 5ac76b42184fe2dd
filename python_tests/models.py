"""Tiny UNets of every shape that is served, with LoRA adapters that do something."""

import json

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from peft import LoraConfig, inject_adapter_in_model


def text_unet(**options):
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


UNETS = {
    "sd1": text_unet,
    "sd2": lambda **o: text_unet(use_linear_projection=True, attention_head_dim=(2, 4), **o),
    "sdxl": lambda **o: text_unet(
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


def save_configs(folder):
    """Writes what `rftcore plan` reads of a tiny pipeline: configs, and no weights."""
    text_unet().save_config(folder / "unet")
    AutoencoderKL(
        block_out_channels=(16, 32),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_config(folder / "vae")
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder/config.json").write_text(json.dumps({"max_position_embeddings": 5}))
    return folder


def add_lora(unet):
    unet.requires_grad_(False)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    inject_adapter_in_model(config, unet)  # what unet.add_adapter does; UNet2DModel has no such method
    # B = 0 would hide every error in A's gradient.
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return unet


def randomise_norms(model):
    """Weights that are not 1 and biases that are not 0."""
    for layer in model.modules():
        if isinstance(layer, torch.nn.GroupNorm | torch.nn.LayerNorm):
            torch.nn.init.normal_(layer.weight, 1.0, 0.3)
            torch.nn.init.normal_(layer.bias, 0.0, 0.3)
    return model
