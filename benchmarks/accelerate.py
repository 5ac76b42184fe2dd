"""A UNet's training step, forward and backward, stock and accelerated: seconds, bytes kept, and what FLOPs would allow.

The 37 M SD-shaped UNet: channels (128, 256, 256), 768 text features, 64 x 64 latents, LoRA r=4 on the attention, fp32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

import rftcore
from benchmarks import harness
from benchmarks.counts import Counts
from benchmarks.memory import saved_bytes
from benchmarks.shapes import ATTENTION
from rftcore.bench.models import UNET_37M

SHAPE = UNET_37M
STOCK, CHECKPOINTING, AUTO = "stock", "gradient checkpointing", "accelerate, auto"


def make_unet() -> UNet2DConditionModel:
    unet = UNet2DConditionModel(**SHAPE).requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=list(ATTENTION)))
    return unet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    unet = make_unet()
    latents = torch.randn(options.batch, 4, 64, 64, requires_grad=True)
    text, timesteps = torch.randn(options.batch, 77, 768), torch.randint(0, 1000, (options.batch,))

    def forward() -> torch.Tensor:
        return unet(latents, timesteps, text).sample

    def stock():
        rftcore.restore(unet).disable_gradient_checkpointing()

    def checkpointing():
        rftcore.restore(unet).enable_gradient_checkpointing()

    def level(name: str, **budget) -> Callable[[], None]:
        return lambda: (stock(), rftcore.accelerate(unet, name, **budget))

    set_ups = {STOCK: stock, CHECKPOINTING: checkpointing}
    set_ups |= {f"accelerate, {name}": level(name) for name in ("none", "ff", "qkv", "block")}
    columns = {name: _counts(unet, set_up, forward) for name, set_up in set_ups.items()}
    # As many bytes as checkpointing keeps, spent where they save most.
    set_ups[AUTO] = level("auto", memory_budget=int(columns[CHECKPOINTING]["saved_mib"] * 2**20))
    columns[AUTO] = _counts(unet, set_ups[AUTO], forward)

    def step(set_up: Callable[[], None]) -> Callable[[], None]:
        def run():
            set_up()
            unet.zero_grad()
            forward().square().mean().backward()

        return run

    cases = [harness.Case(name, step(set_up), columns[name]) for name, set_up in set_ups.items()]
    rows = harness.compare(cases, repeats=options.repeats)
    by_name = {row["case"]: row for row in rows}
    for row in rows:
        for reference, name in ((STOCK, "stock"), (CHECKPOINTING, "checkpointing")):
            # How much faster by FLOPs alone, and how much by the clock.
            row[f"flop_bound_{name}"] = by_name[reference]["gflop"] / row["gflop"]
            row[f"speedup_{name}"] = by_name[reference]["median_s"] / row["median_s"]
    harness.report("accelerate", rows, {"unet": "37 M", "dtype": "fp32", **vars(options)})


def _counts(unet, set_up, forward) -> dict[str, float]:
    """MiB that a forward keeps, and GFLOPs and calls of a step."""
    set_up()
    unet.zero_grad()
    with saved_bytes(unet.parameters()) as saved, Counts() as counts:
        output = forward()
    with counts:
        output.square().mean().backward()
    return {"saved_mib": saved["bytes"] / 2**20, "gflop": counts.flops / 1e9, "calls": counts.calls}


if __name__ == "__main__":
    main()
