"""The launches of layer_norm on SD1.5's and SDXL's shapes, to be compiled ahead of time."""

from __future__ import annotations

import torch

from rftcore.kernels import layer_norm


def launches(capability: int) -> dict:
    found = {}
    shapes = [(32768, 320), (8192, 640), (4096, 1280)]
    cases = [(torch.bfloat16, *shape) for shape in shapes] + [(torch.float32, *shapes[0]), (torch.float32, *shapes[2])]
    for dtype, rows, width in cases:
        x = torch.empty(rows, width, dtype=dtype, device="meta")
        statistics = [torch.empty(rows, device="meta") for _ in range(2)]
        weight = torch.empty(width, dtype=dtype, device="meta")
        case = f"{dtype}, {rows} x {width}"
        found[f"statistics, {case}"] = layer_norm.statistics(x, *statistics, 1e-5), None
        found[f"backward, {case}"] = layer_norm.backward(x, x, *statistics, weight, x), None
        found[f"backward and add, {case}"] = layer_norm.backward(x, x, *statistics, weight, x, addend=x), None
    return found
