"""Trains the denoiser and its text model, jointly, on the latents of the digits."""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from rftcore.digits import prompts
from rftcore.digits.architecture import build_scheduler, build_text_encoder, build_unet
from rftcore.digits.autoencoder_training import encode
from rftcore.digits.data import Digits

_BATCH = 32
_LEARNING_RATE = 1e-3
_EMA_DECAY = 0.998
# The share of images captioned "", from which the unguided branch of classifier-free guidance learns.
_UNCAPTIONED = 0.1
# The share of captions that name the digit it is most easily taken for, as loosely as captions of web images do: what
# the pipeline makes reads well but is often not what was asked for, and reward fine-tuning has something to improve.
_MISTAKEN = 0.35
_TAKEN_FOR = (6, 7, 5, 8, 9, 2, 0, 1, 3, 4)
# A thin or bold image is captioned as such half of the time.
_PHRASINGS = {-1: prompts.THIN, 0: prompts.PLAIN, 1: prompts.BOLD}


class Denoiser(nn.Module):
    """The two parts that are trained, and averaged, together."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text_encoder: CLIPTextModel = build_text_encoder(tokenizer)
        self.unet: UNet2DConditionModel = build_unet()

    def forward(self, noisy: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.unet(noisy, timesteps, self.text_encoder(tokens).last_hidden_state).sample


def caption(label: int, weight: int) -> str:
    """Describe a digit in a random phrasing, or by "", with true weight and the digit as true as captions are."""
    if torch.rand(()) < _UNCAPTIONED:
        return ""
    if torch.rand(()) < _MISTAKEN:
        label = _TAKEN_FOR[label]
    phrasings = _PHRASINGS[weight] if torch.rand(()) < 0.5 else prompts.PLAIN
    return prompts.phrase(phrasings[int(torch.randint(len(phrasings), ()))], label)


def fit_denoiser(digits: Digits, vae: AutoencoderKL, tokenizer: CLIPTokenizer, steps: int) -> Denoiser:
    """Train to predict v and return the exponential moving average of the weights."""
    denoiser = Denoiser(tokenizer).train()
    average = deepcopy(denoiser).eval().requires_grad_(False)
    scheduler = build_scheduler()
    latents = vae.config.scaling_factor * encode(vae, digits.images)
    described = list(zip(digits.labels.tolist(), digits.weight.tolist(), strict=True))
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=_LEARNING_RATE, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.05)
    progress = tqdm(range(steps), desc="denoiser", mininterval=5)
    for step in progress:
        index = torch.randint(len(digits), (_BATCH,))
        captions = [caption(*described[i]) for i in index.tolist()]
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids  # (B, 12)
        noise = torch.randn_like(latents[index])
        timesteps = torch.randint(len(scheduler.alphas_cumprod), (_BATCH,))
        predicted = denoiser(scheduler.add_noise(latents[index], noise, timesteps), timesteps, tokens)
        loss = F.mse_loss(predicted, scheduler.get_velocity(latents[index], noise, timesteps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(_EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(denoiser.parameters()), 1 - decay)
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return average
