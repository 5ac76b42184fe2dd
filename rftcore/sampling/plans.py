"""The plan of a sampler's next chain: the one that was given, or one made for each shape of chain and its path."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import _disable_current_modes

from rftcore.blocks.budget import bytes_of, text_of
from rftcore.blocks.served import served
from rftcore.sampling.ambient import Ambient
from rftcore.sampling.denoiser import Denoiser
from rftcore.sampling.free_memory import free_memory
from rftcore.sampling.plan import Plan
from rftcore.sampling.planner import make_plan
from rftcore.sampling.recent import Recent
from rftcore.sampling.simulation import Simulation, Unpredictable

_RESERVE = 2 * 2**30
# Of how many gradient paths, which may be drawn at random, and of how many shapes of chains something is kept.
_PATHS, _SHAPES = 64, 4
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Plans:
    """The plans of one sampler.

    Args:
        memory_budget, reserve, given: as `CheckpointedSampler` takes them, `given` is its `plan`.

    Attributes:
        last: the plan of the last chain, None before the first.

    Raises:
        TypeError: for a plan that is none.
        ValueError: for a budget or a reserve that is none, or a budget beside a plan.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        memory_budget: int | str | None,
        reserve: int | str | None,
        given: Plan | None,
        *,
        guided: bool,
    ) -> None:
        if given is not None and memory_budget is not None:
            raise ValueError(f"memory_budget={memory_budget!r} beside a plan, which has its own; give one of the two.")
        if given is not None and not isinstance(given, Plan):
            raise TypeError(f"plan must be an rftcore.sampling.Plan, got {type(given).__name__}; see Plan.from_dict.")
        self.last: Plan | None = None
        self._denoiser, self._given, self._guided = denoiser, given, guided
        self._budget = None if memory_budget is None else bytes_of(memory_budget)
        self._reserve = None if reserve is None else _reserve_of(reserve)
        self._made: Recent[Plan] = Recent(_PATHS)
        # What a step takes does not depend on where the others' gradients flow.
        self._simulations: Recent[Simulation | Unpredictable] = Recent(_SHAPES)
        self._least_of_ranks: int | None = None

    def choose(
        self,
        latents: Tensor,
        conditioning: Mapping[str, Tensor],
        parameters: Mapping[str, nn.Parameter],
        modes: Sequence[str],
        captured_bytes: int,
    ) -> Plan:
        """The plan of a chain that starts from these latents (B, C, h, w).

        Args:
            captured_bytes: what graphs hold of the device's free memory.

        Raises:
            ValueError: for a given plan of another chain, or a budget that is too small.
        """
        if self._given is not None:
            self.last = self._given
            _check(self._given, len(latents), modes)
            return self._given
        shapes = self._key(latents, conditioning, parameters)
        self.last = self._made.get(
            (tuple(modes), shapes), lambda: self._make(latents, conditioning, modes, captured_bytes, shapes)
        )
        return self.last

    def _make(
        self,
        latents: Tensor,
        conditioning: Mapping[str, Tensor],
        modes: Sequence[str],
        captured_bytes: int,
        shapes: Hashable,
    ) -> Plan:
        batch, _, height, width = latents.shape

        def simulate() -> Simulation:
            make = lambda: Simulation(self._denoiser, conditioning, height, width, guided=self._guided)  # noqa: E731
            found = self._simulations.get(shapes, make)
            if isinstance(found, Unpredictable):
                raise found
            return found

        budget, reserve = self._budget, self._reserve or 0
        if budget is None:
            budget = max(0, self._free(latents.device) - captured_bytes)
            reserve = min(_RESERVE, budget // 2) if self._reserve is None else self._reserve
        try:
            # Not for the eyes of a mode, or of hooks, that count or change what the chain does.
            with _disable_current_modes(), saved_tensors_hooks(torch.Tensor.detach, torch.Tensor.detach):
                plan = make_plan(
                    self._denoiser,
                    conditioning,
                    batch=batch,
                    height=height,
                    width=width,
                    guided=self._guided,
                    modes=modes,
                    budget=budget,
                    reserve=reserve,
                    simulate=simulate,
                )
        except ValueError as error:
            if self._budget is not None:
                raise
            raise ValueError(
                f"memory_budget=None plans with what is free on {latents.device}, {text_of(budget)}, of which "
                f"{text_of(reserve)} are reserved for decoding and the reward. Free more, make reserve smaller, or "
                f"give memory_budget: {error}"
            ) from error
        if plan.reasons:
            self._simulations[shapes] = Unpredictable(*plan.reasons)
        return plan

    def _free(self, device: torch.device) -> int:
        """Bytes that are free, no more than the ranks' least at their first chain."""
        # All ranks of a DDP-wrapped UNet have a first chain; a later one of a new shape may be one rank's alone, and
        # no rank can wait for the others there.
        if self._least_of_ranks is None and self._denoiser.ddp is not None:
            self._least_of_ranks = free_memory(device)
            return self._least_of_ranks
        free = free_memory(device, of_all_ranks=False)
        return free if self._least_of_ranks is None else min(free, self._least_of_ranks)

    def __getstate__(self) -> dict[str, Any]:
        # A copy, of a sampler that is copied or pickled, plans anew: keys name objects of this process.
        return {**self.__dict__, "_made": self._made.emptied(), "_simulations": self._simulations.emptied()}

    def _key(self, latents: Tensor, conditioning: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Hashable:
        tensors = (latents, *conditioning.values(), *parameters.values())
        shapes = tuple((t.shape, t.dtype, t.device, t.requires_grad) for t in tensors)
        looks = hash(tuple(_looks(self._denoiser.module)))
        return shapes, tuple(parameters), looks, Ambient.capture(latents.device)


def _check(plan: Plan, batch: int, modes: Sequence[str]) -> None:
    unneeded = [
        step
        for step, (stored, mode) in enumerate(zip(plan.stored, modes, strict=False))
        if stored is not None and mode in ("none", "detach_eps")
    ]
    if plan.batch != batch or len(plan.stored) != len(modes) or unneeded:
        raise ValueError(
            f"plan is for {plan.batch} images and {len(plan.stored)} steps, and this chain has {batch} images and "
            f"{len(modes)} steps, of which {sum(m not in ('none', 'detach_eps') for m in modes)} are "
            "differentiated; give the plan of a chain like it, or memory_budget."
        )


def _looks(module: nn.Module) -> Iterator[Hashable]:
    """What of a module decides how many bytes its evaluations take."""
    for child in module.modules():
        attributes = child.__dict__
        yield type(child), child.training, attributes.get("gradient_checkpointing"), type(attributes.get("processor"))
        yield any(attributes[hooks] for hooks in _HOOKS), "forward" in attributes
        # What accelerate was told; it puts new forwards in place.
        if (ours := served(child)) is not None:
            yield ours.place.serving.recompute, id(ours.place.serving)
        if isinstance(child, BaseTunerLayer):
            yield child.disable_adapters, tuple(child.active_adapters), tuple(child.merged_adapters)
        for parameter in child._parameters.values():
            if parameter is not None:
                yield parameter.shape, parameter.dtype


def _reserve_of(reserve: int | str) -> int:
    try:
        return 0 if reserve == 0 else bytes_of(reserve)
    except ValueError:
        raise ValueError(f'reserve={reserve!r}; it must be a number of bytes, or a text such as "2GiB".') from None
