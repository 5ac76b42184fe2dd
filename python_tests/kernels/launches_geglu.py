"""The launches of geglu on SD1.5's and SDXL's shapes, to be compiled ahead of time."""

from __future__ import annotations

import torch

from rftcore.kernels import geglu


def launches(capability: int) -> dict:
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        for rows, columns in ((32768, 1280), (8192, 2560)):
            u = torch.empty(rows, 2 * columns, dtype=dtype, device="meta")
            y = torch.empty(rows, columns, dtype=dtype, device="meta")
            case = f"{dtype}, {rows} x {columns}"
            found[f"forward, {case}"] = geglu.forward(u, y), None
            found[f"backward, {case}"] = geglu.backward(y, u, torch.empty_like(u)), None
    return found
