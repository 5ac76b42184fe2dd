"""What the shipped rewards take beside the decoder, counted by the shapes of the checkpoints that they load."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from rftcore.counting import PeakBytes
from rftcore.rewards.towers import checkpoint_layers

_SIDE = 224
# openai/clip-vit-large-patch14, and laion/CLIP-ViT-H-14-laion2B-s32B-b79K, which PickScore and HPSv2 are tuned from.
LARGE = {
    "projection_dim": 768,
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
}
HUGE = {
    "projection_dim": 1024,
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
}
# Of each reward, its CLIP, and whether it has the text's half, too.
REWARDS = {
    "aesthetic": (LARGE, False),
    "clip_score": (LARGE, True),
    "pickscore": (HUGE, True),
    "hpsv2": (HUGE, True),
    "hpsv2_1": (HUGE, True),
}


def reward_bytes(name: str, pixels: int, images: int = 1, *, gradient: bool = True) -> int:
    """Bytes of one of REWARDS in fp32: its weights, and of so many images at once the most that it makes.

    Args:
        pixels: an image's side before the reward scales it down.
        gradient: whether the images' gradient is asked for, with the tower's layers computed again in the backward.
    """
    shapes, text = REWARDS[name]
    with FakeTensorMode():
        model = CLIPModel(CLIPConfig(**shapes)).eval().requires_grad_(False)
        checkpoint_layers(model.vision_model.encoder.layers)
        held = model.parameters() if text else (*model.vision_model.parameters(), *model.visual_projection.parameters())
        weights = sum(parameter.nbytes for parameter in held)
        pictures = torch.empty(images, 3, pixels, pixels, requires_grad=gradient)
        with PeakBytes() as live, torch.set_grad_enabled(gradient):
            features = _features(model, pictures)
            if gradient:
                torch.autograd.grad(features, pictures, torch.empty_like(features))
    return weights + live.peak


def _features(model: CLIPModel, images: Tensor) -> Tensor:
    scaled = F.interpolate(images, (_SIDE, _SIDE), mode="bicubic", antialias=True).clamp(0, 1)
    return model.visual_projection(model.vision_model(pixel_values=scaled).pooler_output)
