"""Trains the autoencoder of the digits pipeline."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm.auto import tqdm

from rftcore.digits import augment
from rftcore.digits.architecture import build_vae
from rftcore.digits.data import Digits

_BATCH = 32
_LEARNING_RATE = 2e-3
# Per latent element, against the squared error per pixel channel: smooth latents are easier to denoise.
_KL_WEIGHT = 1e-3


def fit_vae(digits: Digits, steps: int) -> AutoencoderKL:
    """Train on mildly warped digits and set ``scaling_factor`` so that latents have unit variance."""
    vae = build_vae().train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=_LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    for _ in tqdm(range(steps), desc="autoencoder", mininterval=5):
        images = digits.images[torch.randint(len(digits), (_BATCH,))]
        pixels = 2 * augment.warp(images, degrees=6, shift=0.03, scale=0.06) - 1
        posterior = vae.encode(pixels).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample()).sample, pixels)
        divergence = posterior.kl().mean() / posterior.mean[0].numel()  # nats per element
        optimizer.zero_grad()
        (error + _KL_WEIGHT * divergence).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    vae = vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=1 / encode(vae, digits.images).std().item())
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Give the posterior's mean, unscaled: (N, 3, 32, 32) in [0, 1] to (N, 4, 8, 8)."""
    return torch.cat([vae.encode(2 * batch - 1).latent_dist.mean for batch in images.split(256)])


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Give the peak signal-to-noise ratio, in dB, of images (N, 3, 32, 32) in [0, 1] after the autoencoder."""
    restored = torch.cat([vae.decode(batch).sample for batch in encode(vae, images).split(256)])
    return -10 * F.mse_loss((restored / 2 + 0.5).clamp(0, 1), images).log10().item()
