"""What the published models keep for a backward, stock and at each level: counted by shape, one image, bf16.

SD1.5 at 512 px and SDXL at 1024 px with LoRA r=4 on the attention, and the autoencoder's decoder at 512 px; the inputs
require grad. Fake tensors: no weights, no memory, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

import rftcore
from benchmarks import harness, shapes
from benchmarks.counts import Counts
from benchmarks.memory import saved_bytes

_LEVELS = ("none", "ff", "qkv", "block")
_BUDGETS = {"SD1.5": (270, 165, 96, 60), "SDXL": (2000, 1000, 500), "decoder": (700,)}


def _models() -> Iterator[tuple[str, torch.nn.Module, object, Callable[[], torch.Tensor]]]:
    """Name, model, mode, and one forward."""
    for label, name, lora in (
        ("SD1.5", "sd15", torch.bfloat16),
        ("SD1.5, fp32 LoRA", "sd15", torch.float32),
        ("SDXL", "sdxl", torch.bfloat16),
    ):
        model, mode = shapes.unet(name, lora)
        args, kwargs = shapes.unet_inputs(name, mode)
        yield label, model, mode, lambda model=model, args=args, kwargs=kwargs: model(*args, **kwargs).sample
    model, mode = shapes.autoencoder()
    with mode:
        latents = torch.randn(1, 4, 64, 64, dtype=torch.bfloat16, requires_grad=True)
    yield "decoder", model, mode, lambda: model.decode(latents).sample


def _row(label: str, level: str, model, mode, run) -> dict:
    model.zero_grad()
    with mode, saved_bytes(model.parameters()) as saved:
        with Counts() as forward:
            output = run()
        with Counts() as backward:
            output.sum().backward()
    return {
        "model": label,
        "recompute": level,
        "saved_mib": saved["bytes"] / 2**20,
        "forward_gflop": forward.flops / 1e9,
        "backward_gflop": backward.flops / 1e9,
        "calls": forward.calls + backward.calls,
    }


def main() -> None:
    rows = []
    for label, model, mode, run in _models():
        settings = [("stock", None), *((level, {"recompute": level}) for level in _LEVELS)]
        settings += [
            (f"auto, {mib} MiB", {"recompute": "auto", "memory_budget": mib * 2**20}) for mib in _BUDGETS.get(label, ())
        ]
        for name, options in settings:
            if options:
                rftcore.accelerate(model, **options)
            rows.append(_row(label, name, model, mode, run))
            # By how many of a forward's FLOPs the step is longer than without making anything again.
            own = [row for row in rows if row["model"] == label]
            row = own[-1]
            row["extra_percent"] = 100 * (row["backward_gflop"] - own[0]["backward_gflop"]) / row["forward_gflop"]
    harness.report("levels", rows, {"dtype": "bf16", "batch": 1, "rank": 4})


if __name__ == "__main__":
    main()
