"""The launches of attention over the text, on the shapes of SD1.5, SD2 and SDXL, to be compiled ahead of time."""

from __future__ import annotations

import torch

from rftcore.kernels import attention, cross_attention

# Heads, tokens of the image, head dimension and tokens of the text.
SHAPES = [(8, 4096, 40, 77), (8, 1024, 80, 77), (8, 256, 160, 77), (10, 4096, 64, 77), (20, 1024, 64, 77)]


def launches(capability: int) -> dict:
    found = {}
    for shape in [*SHAPES, (8, 1000, 40, 77), (8, 64, 160, 77)]:
        found |= _passes(shape, torch.bfloat16, "newest", capability)
    found |= _passes(SHAPES[0], torch.float16, "newest", capability)
    found |= _passes(SHAPES[0], torch.float32, None, capability)
    return found


def _passes(shape, dtype, meant, capability) -> dict:
    heads, tokens, head_dim, keys = shape
    scale, case = head_dim**-0.5, f"{dtype}, {shape}"
    q = torch.empty(4, tokens, heads, head_dim, dtype=dtype, device="meta")
    k = torch.empty(4, keys, heads, head_dim, dtype=dtype, device="meta")
    lse = torch.empty(4, heads, tokens, device="meta")
    found = {f"forward, {case}": (cross_attention.forward(q, k, k, q, lse, scale, capability=capability), meant)}
    if head_dim > cross_attention.MAX_BACKWARD_HEAD_DIM:
        names = "delta", "dq", "dkdv"
        backward = attention.backward(q, q, k, k, q, lse, lse, q, k, k, scale, capability=capability)
    else:
        names = "backward", "sum"
        partials = torch.empty(cross_attention.partials_shape(q, k, capability=capability), device="meta")
        backward = cross_attention.backward(q, q, k, k, lse, q, k, k, partials, scale, capability=capability)
    for name, launch in zip(names, backward, strict=True):
        found[f"{name}, {case}"] = launch, None if name in ("delta", "sum") else meant
    return found
