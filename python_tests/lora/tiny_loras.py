"""Tiny pipelines of Stable Diffusion's shapes, and LoRAs for them, with a rank and an alpha for each layer."""

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from models import text_unet
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from rftcore.lora.layers import Layer, Lora

RANKS, ALPHAS = (2, 3, 4), (1.0, 2.5, 4.0)


def text_config():
    return CLIPTextConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=12,
        projection_dim=10,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=1,
    )


def pipeline(kind):
    """SD1.x with 2 blocks, or SDXL with the 3 blocks and 2 layers each that kohya's names are of."""
    torch.manual_seed(0)
    parts = {"vae": None, "tokenizer": None, "scheduler": DDIMScheduler(), "text_encoder": CLIPTextModel(text_config())}
    if kind == "sd1":
        unet = text_unet(layers_per_block=2)
        return StableDiffusionPipeline(
            **parts, unet=unet, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    unet = text_unet(
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=4 * 6 + 10,
        transformer_layers_per_block=(1, 1, 2),
    )
    encoder = CLIPTextModelWithProjection(text_config())
    return StableDiffusionXLPipeline(
        **parts, unet=unet, tokenizer_2=None, text_encoder_2=encoder, add_watermarker=False
    )


def adaptable(pipe, components):
    """Every layer that a LoRA can be on: its name in a file -> the shape of its weight."""
    shapes = {}
    for component in components:
        for name, module in getattr(pipe, component).named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                bare = component != "unet" and name.startswith("encoder.")
                shapes[f"{component}.{'text_model.' if bare else ''}{name}"] = tuple(module.weight.shape)
    return shapes


def make(shapes, seed=0, dtype=torch.float32, every=1):
    """A LoRA on each `every`-th of the layers."""
    source = torch.Generator().manual_seed(seed)
    layers = {}
    for number, (name, (outputs, inputs, *kernel)) in enumerate(shapes.items()):
        if number % every == 0:
            rank, alpha = RANKS[(number + seed) % 3], ALPHAS[(number // 3 + seed) % 3]
            down = torch.randn(rank, inputs, *kernel, generator=source).to(dtype)
            up = torch.randn(outputs, rank, *(1 for _ in kernel), generator=source).to(dtype) * 0.1
            layers[name] = Layer(down, up, alpha)
    return Lora(layers)


def changes(lora):
    """Each layer's change in fp64, formed as a whole."""
    return {
        name: (layer.alpha / layer.rank) * (layer.up.double().flatten(1) @ layer.down.double().flatten(1))
        for name, layer in lora.layers.items()
    }


def loaded_changes(pipe, scales=None):
    """The same of what is loaded in a pipeline, by the file's names: the sum over its active adapters."""
    found = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        model = getattr(pipe, component, None)
        for name, module in model.named_modules() if model is not None else ():
            if isinstance(module, LoraLayer):
                bare = component != "unet" and name.startswith("encoder.")
                found[f"{component}.{'text_model.' if bare else ''}{name}"] = sum(
                    module.scaling[adapter]
                    * (
                        module.lora_B[adapter].weight.double().flatten(1)
                        @ module.lora_A[adapter].weight.double().flatten(1)
                    )
                    for adapter in module.active_adapters
                    if adapter in module.scaling
                )
    return found


def assert_same_changes(found, expected, rtol=1e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.linalg.norm(found[name] - value) <= rtol * torch.linalg.norm(value), name


def assert_same_layers(found, expected):
    """Bit for bit."""
    assert found.layers.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        other = found.layers[name]
        assert other.alpha == layer.alpha, name
        assert other.down.dtype == layer.down.dtype
        assert torch.equal(other.down, layer.down) and torch.equal(other.up, layer.up), name
