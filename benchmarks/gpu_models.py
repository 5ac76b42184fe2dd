"""The SD1.5 UNet's evaluation and its step, and the VAE's decoding, accelerated and stock, with random weights."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig

import rftcore
from benchmarks import clock
from benchmarks.memory import PeakBytes
from benchmarks.shapes import ATTENTION, AUTOENCODER, UNETS

# FLOPs of one sample-evaluation of SD1.5 at 512 px, forward and backward to inputs and LoRA, and of the VAE's decoding.
_UNET_FLOPS, _VAE_FLOPS = (804e9, 992e9), (2515e9, 2566e9)

_TINY_UNET = {
    "sample_size": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "block_out_channels": (32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
_TINY_AUTOENCODER = {**AUTOENCODER, "block_out_channels": (32,) * 4, "layers_per_block": 1}


def measure(
    device: torch.device, repeats: int, compiled: bool, small: bool, deadline: float, flops_per_s: float
) -> list[dict[str, Any]]:
    """A row for each way of running a model and each kind of work; what fails has its error in place of a time."""
    rows = []
    for model, cases in (("SD1.5 UNet", _unets(device, compiled, small)), ("VAE decoder", _decoders(device, small))):
        for case, works in cases:
            for work, (flops, call) in works.items():
                row: dict[str, Any] = {"model": model, "case": case, "work": work}
                if time.monotonic() > deadline:
                    rows.append({**row, "error": "no time left"})
                    continue
                try:
                    rows.append({**row, **_timed(call, device, repeats, flops / flops_per_s)})
                except Exception as error:  # noqa: BLE001  what a case cannot do is a result
                    rows.append({**row, "error": repr(error)[:300]})
    return rows


def _timed(call: Callable[[], object], device: torch.device, repeats: int, floor: float) -> dict[str, Any]:
    eager = clock.time_of([call], device, repeats, capture=False).seconds
    captured, is_captured = clock.time_of([call], device, repeats)
    with PeakBytes() as counted:
        call()
    return {
        "captured_ms": 1e3 * captured if is_captured else "not captured", "eager_ms": 1e3 * eager,
        "of_floor": floor / captured, "peak_mib": counted.peak / 2**20,
    }  # fmt: skip


def _unets(device, compiled, small) -> Iterator[tuple[str, dict[str, tuple[float, Callable]]]]:
    """Cases by name, each with its works: what they must compute, and a call."""
    batch = 2 if small else 8
    stock = _build(functools.partial(UNet2DConditionModel, **(_TINY_UNET if small else UNETS["sd15"])), device)
    adapter = LoraConfig(r=4, lora_alpha=4, target_modules=list(ATTENTION), init_lora_weights=False)
    stock.add_adapter(adapter)
    for parameter in stock.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    size, width = stock.config.sample_size, stock.config.cross_attention_dim
    latents = torch.randn(batch, 4, size, size, device=device, dtype=torch.bfloat16)
    latents = latents.to(memory_format=torch.channels_last)
    text = torch.randn(batch, 77, width, device=device, dtype=torch.bfloat16)
    grad = torch.randn_like(latents)
    moment = torch.tensor(500, device=device)

    def evaluate(unet):
        with torch.no_grad():
            return unet(latents, moment, text).sample

    def step(unet):
        x = latents.detach().requires_grad_()
        trained = [p for p in unet.parameters() if p.requires_grad]
        return torch.autograd.grad(unet(x, moment, text).sample, [x, *trained], grad)

    def works(unet):
        forward, backward = (batch * flops for flops in _UNET_FLOPS)
        return {
            f"evaluation, {batch} samples": (forward, functools.partial(evaluate, unet)),
            f"forward and backward, {batch} samples": (forward + backward, functools.partial(step, unet)),
        }

    yield "stock", works(stock)
    for level in ("none", "qkv"):
        yield f"rftcore, {level}", works(rftcore.accelerate(copy.deepcopy(stock), recompute=level))
    if compiled:
        yield "torch.compile", works(torch.compile(stock))


def _decoders(device, small) -> Iterator[tuple[str, dict[str, tuple[float, Callable]]]]:
    batch, size = (1, 4) if small else (4, 64)
    stock = _build(functools.partial(AutoencoderKL, **(_TINY_AUTOENCODER if small else AUTOENCODER)), device)
    latents = torch.randn(batch, 4, size, size, device=device, dtype=torch.bfloat16)
    grad = torch.randn(batch, 3, 8 * size, 8 * size, device=device, dtype=torch.bfloat16)

    def decode(vae):
        x = latents.detach().requires_grad_()
        return torch.autograd.grad(vae.decode(x).sample, x, grad)

    name = f"decoding and backward, {batch} images"
    yield "stock", {name: (batch * sum(_VAE_FLOPS), functools.partial(decode, stock))}
    ours = rftcore.accelerate(copy.deepcopy(stock))
    yield "rftcore, none", {name: (batch * sum(_VAE_FLOPS), functools.partial(decode, ours))}


def _build(kind: Callable[[], torch.nn.Module], device: torch.device) -> torch.nn.Module:
    """Frozen, bf16, channels_last."""
    with torch.device(device):
        model = kind()
    return model.to(torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_(False).eval()
