"""The launches of attention on the shapes of SD1.5, SD2 and SDXL, to be compiled ahead of time."""

from __future__ import annotations

import torch

from rftcore.kernels import attention

# Heads, tokens and head dimension.
SHAPES = [(8, 4096, 40), (8, 1024, 80), (8, 256, 160), (8, 64, 160), (10, 4096, 64), (20, 1024, 64), (5, 9216, 64)]


def launches(capability: int) -> dict:
    found = {}
    for shape in SHAPES:
        found |= _passes(shape, torch.bfloat16, "newest", capability)
    found |= _passes(SHAPES[0], torch.float16, "newest", capability)
    # A tail of queries and of keys.
    found |= _passes((8, 1000, 40), torch.bfloat16, "newest", capability)
    if capability >= 90:
        # On sm_80 dk and dv of 160 columns spill 152 bytes where the queries are no multiple of 16.
        found |= _passes((8, 300, 160), torch.bfloat16, "newest", capability)
    found |= _passes(SHAPES[0], torch.float32, None, capability)
    found |= _passes(SHAPES[2], torch.float32, None, capability)
    return found


def _passes(shape, dtype, meant, capability) -> dict:
    heads, tokens, head_dim = shape
    q = torch.empty(4, tokens, heads, head_dim, dtype=dtype, device="meta")
    lse = torch.empty(4, heads, tokens, device="meta")
    scale = head_dim**-0.5
    backward = attention.backward(q, q, q, q, q, lse, lse, q, q, q, scale, capability=capability)
    case = f"{dtype}, {shape}"
    return {
        f"forward, {case}": (attention.forward(q, q, q, q, lse, scale, capability=capability), meant),
        **{
            f"{name}, {case}": (launch, None if name == "delta" else meant)
            for name, launch in zip(("delta", "dq", "dkdv"), backward, strict=True)
        },
    }
