"""A whole chain and its backward, stock and by the sampler: seconds, bytes, and what the FLOPs of each would allow.

The 37 M SD-shaped UNet of `benchmarks.accelerate`, batch 1, guidance, 10 DDIM steps, fp32. Bytes and FLOPs are counted
on tensors without data, by the same code; the clock is stopped on real ones, all cases in turns.

python -m benchmarks.chain [--steps 10] [--repeats 3] [--threads 2]
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
from collections.abc import Callable

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

import rftcore
from benchmarks import harness
from benchmarks.accelerate import SHAPE, make_unet
from benchmarks.counts import Counts
from benchmarks.memory import PeakBytes
from rftcore import published
from rftcore.sampling import Plan

GUIDANCE = 7.5
SCHEDULER = DDIMScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
    steps_offset=1,
)  # fmt: skip
STEPS_AND_BLOCKS, STEPS, KEPT = (
    "stock, checkpoints around steps and in blocks",
    "stock, checkpoints around steps",
    "stock",
)
AS_MUCH, LEAST, ALL = "rftcore, in the bytes of checkpoints around steps", "rftcore, the least bytes", "rftcore"
SAMPLING, OURS, MERGED = "stock, sampling", "rftcore, sampling", "rftcore, sampling, merged LoRA"
# Each of our cases, and the stock ones that it is measured against.
AGAINST = {
    ALL: (STEPS_AND_BLOCKS, STEPS, KEPT),
    AS_MUCH: (STEPS_AND_BLOCKS, STEPS),
    LEAST: (STEPS_AND_BLOCKS,),
    OURS: (SAMPLING,),
    MERGED: (SAMPLING,),
}


class Problem:
    """A UNet twice, as it is and accelerated, text and noise; on tensors without data, too."""

    def __init__(self, stock: nn.Module, ours: nn.Module, steps: int) -> None:
        self.stock, self.ours, self.steps = stock, rftcore.accelerate(ours), steps
        self.positive, self.negative = (torch.randn(1, 77, SHAPE["cross_attention_dim"]) for _ in range(2))
        self.noise = torch.randn(1, 4, SHAPE["sample_size"], SHAPE["sample_size"])
        self._samplers: dict[object, rftcore.CheckpointedSampler] = {}
        # Numbers, whatever the tensors are.
        with _disable_current_modes():
            self._rows = _ddim(steps)

    def stock_chain(self, around_steps: bool, in_blocks: bool) -> None:
        """The chain and its backward as other people's code has it."""
        # diffusers checkpoints its blocks in training mode only; there is no dropout.
        self.stock.train(in_blocks)
        (self.stock.enable_gradient_checkpointing if in_blocks else self.stock.disable_gradient_checkpointing)()
        self.stock.zero_grad()
        self._stock_end(around_steps).square().mean().backward()

    def stock_sampling(self) -> None:
        with torch.no_grad():
            self._stock_end(False)

    def _stock_end(self, around_steps: bool) -> Tensor:
        x, prompts = self.noise, torch.cat([self.negative, self.positive])

        def step(x: Tensor, t: int, a_t: float, a_p: float) -> Tensor:
            negative, positive = self.stock(torch.cat([x, x]), t, prompts).sample.chunk(2)
            eps = negative + GUIDANCE * (positive - negative)
            x0 = (x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
            return math.sqrt(a_p) * x0 + math.sqrt(1 - a_p) * eps

        for row in self._rows:
            x = checkpoint(step, x, *row, use_reentrant=False) if around_steps else step(x, *row)
        return x

    def our_chain(self, memory: int | str | Plan) -> None:
        latents = self.sampler(memory)(self.positive, self.negative, latents=self.noise).latents
        self.ours.zero_grad()
        latents.square().mean().backward()

    def our_sampling(self, merged: bool) -> None:
        with torch.no_grad():
            self.sampler(None)(self.positive, self.negative, latents=self.noise, merged=merged)

    def sampler(self, memory: int | str | Plan | None) -> rftcore.CheckpointedSampler:
        key = id(memory) if isinstance(memory, Plan) else memory
        if key not in self._samplers:
            kept = {"plan" if isinstance(memory, Plan) else "memory_budget": memory}
            # Its table is made of numbers.
            with _disable_current_modes():
                self._samplers[key] = rftcore.CheckpointedSampler(
                    self.ours, SCHEDULER, num_inference_steps=self.steps, guidance_scale=GUIDANCE, **kept
                )
        return self._samplers[key]


def _ddim(steps: int) -> list[tuple[int, float, float]]:
    """(t, a_t, a_p) of each step."""
    scheduler = copy.deepcopy(SCHEDULER)
    scheduler.set_timesteps(steps)
    alphas, stride = scheduler.alphas_cumprod.tolist(), 1000 // steps
    final = float(scheduler.final_alpha_cumprod)
    return [(t, alphas[t], alphas[t - stride] if t >= stride else final) for t in scheduler.timesteps.tolist()]


def cases(memories: dict[str, int | str | Plan]) -> dict[str, Callable[[Problem], None]]:
    """What is run, by name; `memories` of our chains."""
    runs = {
        STEPS_AND_BLOCKS: lambda p: p.stock_chain(True, True),
        STEPS: lambda p: p.stock_chain(True, False),
        KEPT: lambda p: p.stock_chain(False, False),
        SAMPLING: lambda p: p.stock_sampling(),
        OURS: lambda p: p.our_sampling(False),
        MERGED: lambda p: p.our_sampling(True),
    }
    return runs | {name: lambda p, memory=memory: p.our_chain(memory) for name, memory in memories.items()}


class Counted:
    """Bytes and FLOPs of the cases, on tensors without data."""

    def __init__(self, steps: int) -> None:
        stock, self._mode = published.unet(SHAPE, torch.float32, dtype=torch.float32)
        # The samplers' tables have data.
        self._mode.allow_non_fake_inputs = True
        with self._mode:
            self._problem = Problem(stock, copy.deepcopy(stock), steps)

    def __call__(self, run: Callable[[Problem], None]) -> dict[str, float]:
        """Peak MiB beyond the weights, and GFLOPs."""
        with self._mode, PeakBytes() as live, Counts() as counts:
            run(self._problem)
        return {"peak_mib": live.peak / 2**20, "gflop": counts.flops / 1e9}

    def plan(self, memory: int | str | Plan) -> Plan:
        """Of our chain that was counted with this memory."""
        return self._problem.sampler(memory).plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    counted = Counted(options.steps)
    as_much = int(counted(cases({})[STEPS])["peak_mib"] * 2**20)
    least = dataclasses.replace(Plan.replayed(["full"] * options.steps, 1), replay_level="block")
    memories = {ALL: "64GiB", AS_MUCH: as_much, LEAST: least}
    columns = {name: counted(run) for name, run in cases(memories).items()}
    # The clock is not to run while they are planned.
    memories = {name: counted.plan(memory) for name, memory in memories.items()}
    for name, plan in memories.items():
        columns[name]["extra_percent"] = plan.extra_percent

    unet = make_unet()
    problem = Problem(unet, copy.deepcopy(unet), options.steps)
    timed = [harness.Case(name, lambda run=run: run(problem), columns[name]) for name, run in cases(memories).items()]
    rows = harness.compare(timed, repeats=options.repeats, warmup=0, counted=False)
    by_name = {row["case"]: row for row in rows}
    for name, others in AGAINST.items():
        for column, other in zip(("1", "2", "3"), others, strict=False):
            row, reference = by_name[name], by_name[other]
            bound = reference["gflop"] / row["gflop"]
            speedup = reference["median_s"] / row["median_s"]
            row |= {f"against_{column}": other, f"speedup_{column}": speedup, f"flop_bound_{column}": bound}
            row[f"of_bound_{column}"] = speedup / bound
    harness.report("chain", rows, {"unet": "37 M", "dtype": "fp32", "batch": 1, **vars(options)})


if __name__ == "__main__":
    main()
