"""Exact bytes and FLOPs of each method, and the plans that ours has in bytes: nothing is timed here."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import rftcore
from rftcore.bench.methods import LEAST, Method
from rftcore.bench.models import Problem, make
from rftcore.bench.sides import Settled, Side, make_side
from rftcore.blocks import accelerate
from rftcore.blocks.budget import bytes_of
from rftcore.commands.bench_options import DTYPES, BenchOptions
from rftcore.counting import FLOPs, PeakBytes
from rftcore.sampling.conditioning import Conditioning
from rftcore.sampling.denoiser import Denoiser
from rftcore.sampling.gradient_path import GradientPath
from rftcore.sampling.plan import Plan
from rftcore.sampling.planner import Planner
from rftcore.sampling.simulation import Simulation

# Models whose runs are shorter than counting them on tensors without data.
SMALL = ("digits", "tiny")
_ALL = 2**50
_LEVELS = ("none", "block")


class Impossible(Exception):
    """Why a method has no row of numbers, in words."""


def problem_for(method: Method, options: BenchOptions, device: str = "cpu", truth: bool = False) -> Problem:
    """The models as a method holds them; `truth`: in fp64."""
    dtype = getattr(torch, DTYPES[options.dtype])
    base = torch.float32 if method.autocast else dtype
    lora = torch.float32 if method.fp32_lora else base
    if truth:
        base = lora = torch.float64
    return make(
        options.model, dtype=dtype, base=base, lora=lora, rank=options.rank, batch=options.images,
        resolution=options.resolution, guidance_scale=options.guidance_scale, device=device,
    )  # fmt: skip


class Counter:
    """Counts on tensors without data, or on a small model's real ones, on a CPU."""

    def __init__(self, options: BenchOptions) -> None:
        self._options = options
        self._mode = None if options.model in SMALL else FakeTensorMode(allow_non_fake_inputs=True)
        self._planner: Planner | None = None
        self._scoring: dict[str, tuple[int, int]] = {}

    def count(self, method: Method, settled: Settled | None = None) -> dict[str, Any]:
        """Peak MiB and those where the loss is formed, beyond weights, TFLOPs, and the plan in words."""
        with self._without_data():
            side = self._side(method, settled)
        held = 0

        def at_loss() -> None:
            nonlocal held
            held = max(held, live.live)

        side.at_loss = at_loss
        with self._without_data(), PeakBytes() as live, FLOPs() as flops:
            side.run(self._options.work)
        row = {"peak_mib": live.peak / 2**20, "tflop": flops.total / 1e12}
        if self._options.work != "sampling":
            row["saved_mib"] = held / 2**20
        if settled and settled.plan is not None:
            row["plan"] = str(settled.plan)
        return row

    def settle(self, method: Method, counted: Mapping[str, Mapping[str, Any]]) -> Settled:
        """What ours keeps under its budget.

        Args:
            counted: rows of other methods, by name, whose bytes may be the budget.

        Raises: Impossible where that cannot be held.
        """
        chained = self._options.work == "draft"
        if method.budget is None or method.budget in ("all", LEAST):
            budget = None
        elif method.budget in counted:
            if "peak_mib" not in counted[method.budget]:
                raise Impossible(f"the bytes of {method.budget} were not counted")
            budget = int(counted[method.budget]["peak_mib" if chained else "saved_mib"] * 2**20)
        else:
            budget = bytes_of(method.budget)
        try:
            return self._chain(method, budget) if chained else self._step(method, budget)
        except ValueError as error:
            raise Impossible(str(error)) from error

    def _step(self, method: Method, budget: int | None) -> Settled:
        """Of a forward of the UNet, which keeps what is held where a loss is formed."""
        if budget is None:
            return Settled(unet="block" if method.budget == LEAST else "none")
        return Settled(unet="auto", unet_bytes=budget, budget=budget)

    def _chain(self, method: Method, budget: int | None) -> Settled:
        planner = self._chains(method)
        found: dict[str, Plan] = {}
        refusals: list[ValueError] = []
        for level in ("block",) if method.budget == LEAST else _LEVELS:
            reserve = self._scored(method, level)[0]
            given = budget or (max(planner.least(reserve).values()) if method.budget == LEAST else _ALL)
            try:
                found[level] = planner.plan(given, reserve)
            except ValueError as error:
                refusals.append(error)
        if not found:
            raise refusals[-1]
        level = min(found, key=lambda level: found[level].flops + self._scored(method, level)[1])
        plan = found[level] if budget else dataclasses.replace(found[level], budget=None)
        return Settled(plan=plan, unet="none", decoder=level, budget=budget)

    def _chains(self, method: Method) -> Planner:
        if self._planner is None:
            with self._without_data():
                problem = problem_for(method, self._options)
                accelerate(problem.unet)
            denoiser, guidance = Denoiser(problem.unet), self._options.guidance_scale
            row = Conditioning({name: tensor[:1] for name, tensor in problem.positive.items()})
            told = denoiser.told(row, guidance).positive
            guided = denoiser.guided(guidance)
            size = problem.noise.shape[-1]
            simulation = Simulation(denoiser, told, size, size, guided=guided)
            path = GradientPath.last(self._options.differentiated, self._options.steps)
            self._planner = Planner(simulation, self._options.images, path.effective_modes)
        return self._planner

    def _scored(self, method: Method, level: str) -> tuple[int, int]:
        """Bytes and FLOPs of decoding and rewarding the batch, image by image, with their gradients."""
        if level not in self._scoring:
            with self._without_data():
                problem = problem_for(method, self._options)
                rftcore.accelerate(problem.vae, level)
                latents = problem.noise.clone().requires_grad_()
            with self._without_data(), PeakBytes() as live, FLOPs() as flops:
                rftcore.score(problem.vae, latents, problem.reward, problem.prompts)
            self._scoring[level] = live.peak, flops.total
        return self._scoring[level]

    def _side(self, method: Method, settled: Settled | None) -> Side:
        problem = problem_for(method, self._options)
        return make_side(method, problem, self._options.steps, self._options.differentiated, settled)

    @contextlib.contextmanager
    def _without_data(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if self._mode is not None:
                stack.enter_context(self._mode)
                stack.enter_context(_Answers())
            yield


class _Answers(TorchDispatchMode):
    """Says 1 where somebody asks what a tensor without data holds: that everything is finite."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        return function(*args, **(kwargs or {}))
