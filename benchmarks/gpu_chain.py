"""Whole chains on a GPU, captured, as they are, and stock: seconds, reserved bytes, waits, and what they must reach.

    python -m benchmarks.gpu_chain [--plans FILE] [--seconds 240]
    python -m benchmarks.gpu_chain --plans FILE --only-plans     # what needs no GPU, beforehand
    python -m benchmarks.gpu_chain --tiny                        # all of it with tiny models, on any machine

Random weights in bf16, LoRA r=4 on the attention in fp32, guidance, 50 DDIM steps; the reward is an image's brightness,
the optimizer AdamW. Training steps are timed one case after the other: alone on the device, each has its own peak of
`torch.cuda.max_memory_reserved()`. A captured chain has run three times before it is timed, as it is, captured and
launched, and its gradients are compared with those of the same plan without graphs. Floors are a case's FLOPs at the
rate of a bf16 product in the same run.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import gc
import os
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rftcore
from benchmarks import clock, gpu, harness
from benchmarks.draft_step import relative_error
from benchmarks.gpu_chain_models import (
    Chain,
    Ours,
    Stock,
    Training,
    add_lora,
    make_inputs,
    make_unet,
    make_vae,
    our_rewards,
    stock_rewards,
    trained,
)
from benchmarks.gpu_chain_plans import FULL, TINY, Asked, Planned, Setting, Work, asked, plans
from rftcore.blocks.budget import bytes_of
from rftcore.sampling import Plan

CAPTURED, PLAIN, NO_LORA = "rftcore", "rftcore, capture=False", "rftcore, no LoRA"
STOCK, CHECKPOINTED = "stock", "stock, a checkpoint a step"
EXACTNESS = "error of gradients against fp64, small UNet"
# As it is, captured, launched.
_LIVES = 3
# Of the device's memory; the rest is for gaps in what is reserved, and for the graphs themselves.
_USABLE = 0.95

Row = dict[str, Any]


class Bench:
    """Measures on one device.

    Args:
        repeats: of captured cases; the others are timed at most twice.
        deadline: of `time.monotonic()`; no case is begun after it.
    """

    def __init__(self, setting: Setting, device: torch.device, repeats: int, deadline: float) -> None:
        self._setting, self._device, self._repeats, self._deadline = setting, device, repeats, deadline
        self._on_gpu = device.type == "cuda"
        self._name: str | None = None
        self._models: tuple[nn.Module, nn.Module] | None = None
        self._initial: list[Tensor] = []
        self._stock_done: set[tuple[str, int, int]] = set()

    def exactness(self) -> Iterator[Row]:
        """LoRA gradients of a chain of a small UNet, two steps replayed and two stored, against stock diffusers in fp64."""
        work, steps, batch = EXACTNESS, 4, 2
        unet = add_lora(make_unet(self._setting.exact, self._device))
        inputs = make_inputs(unet, batch)
        weights = torch.randn_like(inputs.noise)

        def gradients(chain: Chain, unet: nn.Module) -> list[Tensor]:
            latents = chain.latents()
            return list(torch.autograd.grad(latents, trained(unet), weights.to(latents)))

        wide = copy.deepcopy(unet).double()
        exact = gradients(Stock(wide, inputs.double(), steps, steps), wide)
        stock_error = relative_error(gradients(Stock(unet, inputs, steps, steps), unet), exact)
        yield {"work": work, "case": STOCK, "figure": stock_error}
        rftcore.accelerate(unet)
        replayed = Plan.replayed(["full"] * steps, batch)
        plan = dataclasses.replace(replayed, stored=(None, None, 0, 1), levels=("none", "block"), replay_batch=1)
        plain: list[Tensor] = []

        def measure(case: str) -> Row:
            chain = Ours(unet, inputs, steps, steps, plan=plan, capture=case == CAPTURED)
            for _ in range(_LIVES if case == CAPTURED else 1):
                found = gradients(chain, unet)
            row = self._judged(work, case, relative_error(found, exact), 2 * stock_error + 1e-6)
            return row | _beside_plain(found, plain, case) | {"uncaptured": chain.sampler.uncaptured}

        for case in (PLAIN, CAPTURED):
            yield self._attempt({"work": work, "case": case}, lambda case=case: measure(case))

    @torch.no_grad()
    def sampling(self, flops_per_image: float, flops_per_s: float) -> Iterator[Row]:
        """Chains without a gradient, in turns; then what their times say of a step.

        Args:
            flops_per_image: of a step of one image, both branches of guidance.
        """
        bare = make_unet(self._setting.sampled, self._device)
        adapted = add_lora(copy.deepcopy(bare))
        stock = copy.deepcopy(adapted)
        rftcore.accelerate(bare)
        rftcore.accelerate(adapted)
        for batch in self._setting.batches:
            work = f"sampling, {self._setting.sampled}, {batch} image{'s' * (batch > 1)}"
            flops = flops_per_image * batch * self._setting.steps
            found = self._attempt(
                {}, lambda args=(batch, flops): self._sampled(*args, bare, adapted, stock, flops_per_s)
            )
            if "error" in found:
                yield {"work": work, **found}
                continue
            yield from ({"work": work, **row} for row in found.values())
            times, setting = {name: row["seconds"] for name, row in found.items()}, self._setting
            lora = 100 * (times[CAPTURED] / times[NO_LORA] - 1)
            faster, asked_faster = times[STOCK] / times[CAPTURED], setting.times_stock if batch == 1 else None
            yield self._judged(work, "a step with LoRA, % longer", lora, setting.lora_percent)
            yield self._judged(work, "Python of a step, ms", found[CAPTURED]["host_ms_a_step"], setting.host_ms)
            yield self._judged(work, "times as fast as stock", faster, asked_faster, least=True)

    def _sampled(self, batch: int, flops: float, bare, adapted, stock, flops_per_s: float) -> dict[str, Row]:
        """A row for each way of sampling, by its name."""
        inputs, steps = make_inputs(adapted, batch), self._setting.steps
        chains: dict[str, Ours | Stock] = {
            CAPTURED: Ours(adapted, inputs, steps, 0, capture=True),
            NO_LORA: Ours(bare, inputs, steps, 0, capture=True),
            PLAIN: Ours(adapted, inputs, steps, 0, capture=False),
            STOCK: Stock(stock, inputs, steps, 0),
        }
        for name in (NO_LORA, CAPTURED):
            for _ in range(_LIVES):
                captured = chains[name].latents()
        off = relative_error([captured], [chains[PLAIN].latents()])
        cases = [harness.Case(name, chain.latents) for name, chain in chains.items()]
        rows = {}
        for row in harness.compare(cases, repeats=self._repeats, counted=False):
            name = row["case"]
            chain = chains[name]
            found = {"case": name, **_timed(row["median_s"], flops, flops_per_s)}
            if isinstance(chain, Ours):
                found["host_ms_a_step"] = 1e3 * self._host_seconds(chain.latents) / steps
                found["uncaptured"] = chain.sampler.uncaptured
            found["syncs"] = self._syncs(chain.latents, must_not=name == CAPTURED)
            rows[name] = found
        rows[CAPTURED]["latents_off"] = off
        return rows

    def training(self, work: Work, planned: Mapping[Asked, Planned], flops_per_s: float) -> Iterator[Row]:
        """A training step under the plan for a whole device of that memory; beside it, once a chain, stock's."""
        memory = self.memory(work)
        row = {"work": f"{work.name}, {memory}"}
        if memory != work.memory[0]:
            row["work"] += f" ({work.memory[0]} are not there)"
        plan, level, flops = planned[asked(work, self._setting.steps, memory)]
        plain: list[Tensor] = []

        def ours(case: str) -> Row:
            unet, vae = self._model(work.model)
            rftcore.accelerate(unet)
            rftcore.accelerate(vae, recompute=level)
            inputs = make_inputs(unet, work.batch)
            chain = Ours(unet, inputs, self._setting.steps, work.backprop_steps, plan=plan, capture=case == CAPTURED)
            training = Training(chain, unet, our_rewards(vae))
            found, gradients = self._trained(training, case == CAPTURED, flops, flops_per_s)
            found |= _beside_plain(gradients, plain, case) | {"uncaptured": chain.sampler.uncaptured}
            if case == CAPTURED:
                found["host_s"] = self._host_seconds(training.chain_alone)
                found["syncs"] = self._syncs(training.chain_alone, must_not=True)
                found |= self._reached(found, work, memory) | {"plan": str(plan)}
            return found

        def stock(checkpointed: bool) -> Row:
            unet, vae = (rftcore.restore(model) for model in self._model(work.model))
            inputs = make_inputs(unet, work.batch)
            chain = Stock(unet, inputs, self._setting.steps, work.backprop_steps, checkpointed=checkpointed)
            # What runs twice: a checkpointed step's forward.
            again = plan.forward_flops * work.backprop_steps if checkpointed else 0
            least = flops - plan.flops + plan.plain_flops + again
            return self._trained(Training(chain, unet, stock_rewards(vae)), False, least, flops_per_s)[0]

        for case in (PLAIN, CAPTURED):
            yield self._attempt({**row, "case": case}, lambda case=case: ours(case))
        chain = (work.model, work.batch, work.backprop_steps)
        if chain in self._stock_done:
            return
        self._stock_done.add(chain)
        for case in (STOCK, CHECKPOINTED):
            if case == STOCK or work.backprop_steps > 1:
                started = {"work": work.name, "case": case}
                yield self._attempt(started, lambda case=case: stock(checkpointed=case == CHECKPOINTED))

    def memory(self, work: Work) -> str:
        """The first of the work's memories that the device has; the last, if none."""
        if not self._on_gpu:
            return work.memory[-1]
        usable = _USABLE * torch.cuda.get_device_properties(self._device).total_memory
        return next((memory for memory in work.memory if bytes_of(memory) <= usable), work.memory[-1])

    def _trained(
        self, training: Training, captured: bool, flops: float, flops_per_s: float
    ) -> tuple[Row, list[Tensor]]:
        """Times and bytes of a training step, and its gradients before the first one."""
        for _ in range(_LIVES if captured else 1):
            gradients = training.gradients()
        taken = [self._seconds(training.step) for _ in range(self._repeats if captured else min(2, self._repeats))]
        row = _timed(statistics.median(taken), flops, flops_per_s)
        if self._on_gpu:
            free, total = torch.cuda.mem_get_info(self._device)
            row["reserved_gib"] = torch.cuda.max_memory_reserved(self._device) / 2**30
            # With the CUDA context and the graphs, which no allocator counts.
            row["device_gib"] = (total - free) / 2**30
        return row, gradients

    def _model(self, name: str) -> tuple[nn.Module, nn.Module]:
        """UNet and decoder, the only ones that are held, with the LoRA that they had at first."""
        if name != self._name:
            self._name = self._models = None
            self._free()
            self._models = add_lora(make_unet(name, self._device)), make_vae(name, self._device)
            self._initial = [p.detach().clone() for p in trained(self._models[0])]
            self._name = name
            self._free()
        with torch.no_grad():
            for parameter, value in zip(trained(self._models[0]), self._initial, strict=True):
                parameter.copy_(value)
        return self._models

    def _attempt(self, row: Row, measure: Callable[[], Row]) -> Row:
        """The row with what was measured, or with why it could not be: running out of memory is a result."""
        if time.monotonic() > self._deadline:
            return {**row, "error": "no time left"}
        self._free()
        try:
            return {**row, **measure()}
        except torch.OutOfMemoryError as error:
            return {**row, "error": f"OOM: {error}"[:300]}
        except Exception as error:  # noqa: BLE001  what a case cannot do is a result, too
            return {**row, "error": repr(error)[:300]}

    def _judged(self, work: str, case: str, figure: float, limit: float | None, least: bool = False) -> Row:
        row: Row = {"work": work, "case": case, "figure": figure}
        if limit is not None:
            met = figure >= limit if least else figure <= limit
            row |= {"required": f"{'>=' if least else '<='} {limit:.3g}", "met": met}
        return row

    def _reached(self, row: Row, work: Work, memory: str) -> Row:
        """Whether time and memory are what they must be; the time only in the memory that it is asked for."""
        if not self._on_gpu:
            return {}
        limits = [(row["reserved_gib"], bytes_of(memory) / 2**30, "GiB")]
        if work.seconds is not None and memory == work.memory[0]:
            limits.append((row["seconds"], work.seconds, "s"))
        required = ", ".join(f"<= {limit:g} {unit}" for _, limit, unit in limits)
        return {"required": required, "met": all(value <= limit for value, limit, _ in limits)}

    def _seconds(self, run: Callable[[], object]) -> float:
        gc.collect()
        self._wait()
        start = time.perf_counter()
        run()
        self._wait()
        return time.perf_counter() - start

    def _host_seconds(self, run: Callable[[], object]) -> float:
        """Until everything is queued: what Python takes, where nothing in it waits."""
        taken = []
        for _ in range(self._repeats):
            gc.collect()
            self._wait()
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
            self._wait()
        return statistics.median(taken)

    def _syncs(self, run: Callable[[], object], must_not: bool) -> int | str:
        """How often `run` waits for the GPU; `must_not`: once more, where a wait is an error."""
        if not self._on_gpu:
            return ""
        count = syncs(run)
        if must_not and count == 0:
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
            except RuntimeError as error:
                return f"{error}"[:200]
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return count

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self._device)

    def _free(self) -> None:
        """Gives back what earlier cases held, and counts peaks anew."""
        gc.collect()
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)


def _timed(seconds: float, flops: float, flops_per_s: float) -> Row:
    """A time beside the least that so many FLOPs take."""
    floor = flops / flops_per_s
    return {"seconds": seconds, "tflop": flops / 1e12, "floor_s": floor, "of_floor": floor / seconds}


def _beside_plain(found: list[Tensor], plain: list[Tensor], case: str) -> Row:
    """How far the gradients are from the uncaptured chain's, 0: bit for bit its; `plain` is filled by that case."""
    if case == PLAIN:
        plain.extend(found)
    return {"gradients_off": relative_error(found, plain)} if plain else {}


def syncs(run: Callable[[], object]) -> int:
    """How many calls in `run` make the host wait for the GPU, as PyTorch warns of them."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def rows(bench: Bench, setting: Setting, planned: Mapping[Asked, Planned], flops_per_s: float) -> Iterator[Row]:
    """Everything, what is asked for first; SDXL, the largest, last."""
    yield from bench.exactness()
    first = setting.works[0]
    plan = planned[asked(first, setting.steps, bench.memory(first))].plan
    yield from bench.sampling(plan.forward_flops / first.batch, flops_per_s)
    for work in setting.works:
        yield from bench.training(work, planned, flops_per_s)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models: to see that it runs, not how fast")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=240, help="no new case is begun after so long")
    parser.add_argument("--plans", type=Path, help="a file of plans: read where there is one, and what it lacks added")
    parser.add_argument("--only-plans", action="store_true", help="makes the plans for every device, and ends")
    options = parser.parse_args(arguments)
    if options.only_plans and options.plans is None:
        parser.error("--only-plans makes a file: name it by --plans FILE")
    if not (options.tiny or options.only_plans) and torch.device(options.device).type != "cuda":
        parser.error(f"--device {options.device}: full models are for a GPU; --tiny runs anywhere")
    setting, device = TINY if options.tiny else FULL, torch.device(options.device)
    torch.manual_seed(0)
    bench = Bench(setting, device, options.repeats, time.monotonic() + options.seconds)
    wanted = [
        asked(work, setting.steps, memory)
        for work in setting.works
        for memory in (work.memory if options.only_plans else [bench.memory(work)])
    ]
    planned = plans(wanted, options.plans, 1 if options.tiny else os.cpu_count() or 1)
    if not options.only_plans:
        measure(bench, setting, planned, device, options)


def measure(
    bench: Bench, setting: Setting, planned: Mapping[Asked, Planned], device: torch.device, options: argparse.Namespace
) -> None:
    """Runs everything and writes what there is, however it ends. Raises: SystemExit where gradients are wrong."""
    with clock.side_stream(device):
        ceiling = gpu.ceilings(device, 30, small=options.tiny)
    print(f"copy {ceiling['bytes_per_s'] / 1e9:.0f} GB/s, bf16 product {ceiling['flops_per_s'] / 1e12:.1f} TFLOP/s")
    settings = {**{name: str(value) for name, value in vars(options).items()}, **ceiling, "dtype": "bf16", "rank": 4}
    settings["allocator"] = os.environ.get("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", ""))
    seen: list[Row] = []
    try:
        for row in rows(bench, setting, planned, ceiling["flops_per_s"]):
            seen.append(row)
            print({name: value for name, value in row.items() if name != "plan"}, flush=True)
    finally:
        harness.report("gpu_chain_tiny" if options.tiny else "gpu_chain", seen, settings)
    exact = [row for row in seen if row["work"] == EXACTNESS and row["case"] != STOCK]
    wrong = [row["case"] for row in exact if not row.get("met")]
    if wrong:
        sys.exit(f"the rest is worth nothing: {EXACTNESS}, of {' and '.join(wrong)}")


if __name__ == "__main__":
    # What ends a run that took too long: the rows that there are get written.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
