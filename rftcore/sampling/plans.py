"""The plan of a sampler's next chain: the one that was given, or one made for each shape of chain."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from rftcore.blocks.budget import bytes_of
from rftcore.blocks.served import served
from rftcore.sampling.ambient import Ambient
from rftcore.sampling.denoiser import Denoiser
from rftcore.sampling.free_memory import free_memory
from rftcore.sampling.plan import Plan, make_plan


class Plans:
    """The plans of one sampler.

    Args:
        memory_budget, reserve, given: as `CheckpointedSampler` takes them, `given` is its `plan`.

    Attributes:
        last: the plan of the last chain, None before the first.

    Raises:
        ValueError: for a budget that is none, or one beside a plan.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        memory_budget: int | str | None,
        reserve: int | str,
        given: Plan | None,
        *,
        guided: bool,
    ) -> None:
        if given is not None and memory_budget is not None:
            raise ValueError(f"memory_budget={memory_budget!r} beside a plan, which has its own; give one of the two.")
        self.last: Plan | None = None
        self._denoiser, self._given, self._guided = denoiser, given, guided
        self._budget = None if memory_budget is None else bytes_of(memory_budget)
        self._reserve = bytes_of(reserve)
        self._made: dict[Hashable, Plan] = {}

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
            self._check(len(latents), modes)
            return self._given
        key = self._key(latents, conditioning, parameters, modes)
        if key not in self._made:
            batch, _, height, width = latents.shape
            budget = self._budget
            if budget is None:
                budget = free_memory(latents.device) - captured_bytes
            # Not for the eyes of a mode that counts or changes what the chain does.
            with _disable_current_modes():
                self._made[key] = make_plan(
                    self._denoiser,
                    conditioning,
                    batch=batch,
                    height=height,
                    width=width,
                    guided=self._guided,
                    modes=modes,
                    budget=budget,
                    reserve=self._reserve if self._budget is None else 0,
                )
        self.last = self._made[key]
        return self.last

    def _key(self, latents, conditioning, parameters, modes) -> Hashable:
        tensors = (latents, *conditioning.values(), *parameters.values())
        # What accelerate was told; it puts new forwards in place.
        levels = tuple(
            (ours.place.serving.recompute, id(ours.place.serving))
            for ours in map(served, self._denoiser.model.children())
            if ours is not None
        )
        shapes = tuple((t.shape, t.dtype, t.requires_grad) for t in tensors)
        return tuple(modes), shapes, tuple(parameters), levels, Ambient.capture(latents.device)

    def _check(self, batch: int, modes: Sequence[str]) -> None:
        plan = self._given
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
