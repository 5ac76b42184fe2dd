"""The launches of lora_linear on SD1.5's and SDXL's shapes, to be compiled ahead of time."""

from __future__ import annotations

import functools

import torch

from rftcore.kernels import lora_linear as forward
from rftcore.kernels import lora_linear_backward as backward

BF16, FP32 = torch.bfloat16, torch.float32


def empty(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(capability: int) -> dict:
    of_layer = functools.partial(_of_layer, capability)
    found = {}
    # Self-attention's q, k and v behind a norm, and what follows it, of SD1.5 and of SDXL.
    found |= of_layer("qkv 320, rank 4", 8 * 4096, 320, (320, 320, 320), 4, BF16, norm=True)
    found |= of_layer("qkv 640, rank 16, fp32 adapters", 4 * 4096, 640, (640, 640, 640), 16, FP32, norm=True)
    found |= of_layer("qkv 1280, rank 64", 4 * 1024, 1280, (1280, 1280, 1280), 64, BF16, norm=True)
    found |= of_layer("out 320, rank 4", 8 * 4096, 320, (320,), 4, BF16, bias=True, residual=True)
    found |= of_layer("text kv, rank 8, fp32 adapters", 8 * 77, 2048, (640, 640), 8, FP32)
    found |= of_layer("ff 10240, rank 8", 4 * 1024, 1280, (10240,), 8, BF16, norm=True, bias=True)
    found |= of_layer("qkv 320 in fp32, rank 4", 2 * 4096, 320, (320, 320, 320), 4, FP32, base=FP32, norm=True)
    strip = forward.StripConfig(128, 64)
    found |= of_layer("ff 2560, strip", 8 * 4096, 320, (2560,), 8, BF16, norm=True, bias=True, config=strip)
    # The other variants of the forward.
    for name, config in VARIANTS.items():
        found |= of_layer(f"qkv 320, {name}", 8 * 4096, 320, (320,) * 3, 4, BF16, norm=True, config=config)
    return found


VARIANTS = {
    "fused": forward.ProjectConfig(128, 128, 64, fused=True, span=True),
    "not fused": forward.ProjectConfig(128, 128, 64, span=True),
    "apart": forward.ProjectConfig(128, 64, 64),
    "strip": forward.StripConfig(128, 64),
}


def _of_layer(
    capability,
    name,
    rows,
    inner,
    widths,
    rank,
    dtype,
    *,
    base=BF16,
    norm=False,
    bias=False,
    residual=False,
    config=None,
) -> dict:
    """Every launch of a layer's forward and backward, or, with a config, the one that it is for."""
    newest = "newest" if base == BF16 else "any"
    x, grad_n = (empty(rows, inner, dtype=base) for _ in range(2))
    projections = [
        (
            empty(width, inner, dtype=base),
            empty(width, dtype=base) if bias else None,
            ((empty(rank, inner, dtype=dtype), empty(width, rank, dtype=dtype), 0.5),),
        )
        for width in widths
    ]
    outputs = [empty(rows, width, dtype=base) for width in widths]
    norm = (empty(inner, dtype=base), empty(inner, dtype=base), 1e-5) if norm else None
    statistics = (empty(rows, dtype=FP32), empty(rows, dtype=FP32)) if norm else (None, None)
    h = empty(*forward.low_rank_shape(rows, projections), dtype=dtype)
    residual = outputs[0] if residual else None
    project = forward.project(
        x, projections, outputs, norm, *statistics, h, residual, config=config, capability=capability
    )
    found = {f"project, {name}": (project, newest)}
    if config is not None:
        return found
    grads = [(a, b) for *_, own in projections for a, b, _ in own]
    partials = empty(*backward.partials_shape(x, projections, grads), dtype=FP32)
    parts, added = backward.adapter_gradients(x, outputs, projections, norm, *statistics, h, h, grads, partials)
    return found | {
        f"shrink, {name}": (forward.shrink(x, projections, norm, *statistics, h), "any"),
        f"low_rank_gradient, {name}": (backward.low_rank_gradient(outputs, projections, h), "any"),
        f"input_gradient, {name}": (backward.input_gradient(outputs, projections, h, grad_n), newest),
        f"adapter_gradients, {name}": (parts, "any"),
        f"sum of adapter_gradients, {name}": (added, None),
    }
