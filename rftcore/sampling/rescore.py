"""Log-probabilities of steps that were taken before, under the UNet as it is now."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rftcore.blocks import once
from rftcore.ops.sampler_step import sampler_step
from rftcore.sampling.adapters import adapters_off
from rftcore.sampling.ambient import Ambient, RandomState
from rftcore.sampling.constants import has_constants, make_constants
from rftcore.sampling.denoiser import Denoiser
from rftcore.sampling.module_state import ModuleState
from rftcore.sampling.replay import GradientSum, check_reached, gradients, replay_parameters


@dataclasses.dataclass(frozen=True)
class Transition:
    """One step of each sample of a batch, as one evaluation of the UNet re-scores it; all on its device.

    Attributes:
        x, next_x: (B, C, h, w) the states before and after.
        steps: (B,) the steps' places in the chain.
        t: (B,) timesteps.
        coefficients: (B, 9).
        input_scales: (B,) what x is multiplied by before the model sees it, None for nothing.
    """

    x: Tensor
    next_x: Tensor
    steps: Tensor
    t: Tensor
    coefficients: Tensor
    input_scales: Tensor | None = None

    @property
    def model_input(self) -> Tensor:
        """x as the model sees it."""
        return self.x if self.input_scales is None else self.x * self.input_scales.reshape(-1, 1, 1, 1)


@dataclasses.dataclass
class Rescore:
    """Re-scores S transitions, as a `replay.Program` whose leaves are the joined conditioning and the parameters.

    It gives the log-probabilities (B, S) and, with a reference, the divergences (B, S).

    Args:
        timesteps: (T,) of the chain that took the steps: what it made once of them is made again of all, so that the
            log-probabilities are its own, bit for bit.
        reference: None, or "exact" | "uniform": the divergence from the UNet with its adapters off.
    """

    denoiser: Denoiser
    transitions: Sequence[Transition]
    timesteps: Tensor
    guided: bool
    names: Sequence[str]
    parameters: Mapping[str, nn.Parameter]
    reference: str | None

    def direct(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The same in plain autograd: for one transition, which then needs no second forward."""
        scores = [self._score(transition, leaves, {})[0] for transition in self.transitions]
        if not any(log_prob.requires_grad for log_prob, *_ in scores):
            check_reached([], self.parameters)
        return tuple(torch.stack(column, dim=1) for column in zip(*scores, strict=True))

    def forward(self, leaves: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[()], tuple[Tensor, ...]]:
        self._ambient = Ambient.capture(self.transitions[0].x.device)
        self._module_state = ModuleState.capture(self.denoiser.module)
        self._random, scores, references = [], [], []
        for transition in self.transitions:
            self._random.append(RandomState.capture(transition.x.device))
            score, reference_output = self._score(transition, leaves, {})
            scores.append(score)
            references.append(reference_output)
        # As in Chain.forward: casts cached without a graph would cut later gradients.
        torch.clear_autocast_cache()
        saved = tuple(output for output in references if output is not None)
        return tuple(torch.stack(column, dim=1) for column in zip(*scores, strict=True)), (), saved

    def backward(
        self, leaves: Sequence[Tensor], saved: Sequence[Tensor], grads: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        conditioning = leaves[: len(self.names)]
        parameters, swapped = replay_parameters(self.parameters)
        total = GradientSum([*conditioning, *parameters])
        with self._module_state.restored():
            for step, transition in enumerate(self.transitions):
                replicas = [c.detach().requires_grad_(n) for c, n in zip(conditioning, needed, strict=False)]
                with torch.enable_grad(), self._ambient.restored(), self._random[step].restored():
                    score, _ = self._score(transition, replicas, swapped, saved[step] if saved else None)
                columns = [None if grad is None else grad[:, step] for grad in grads]
                total.add(gradients(score, columns, [*replicas, *parameters]))
        result = total.result()
        check_reached(result[len(self.names) :], self.parameters)
        return result

    def _score(
        self,
        transition: Transition,
        leaves: Sequence[Tensor],
        swapped: Mapping[str, Tensor],
        reference_output: Tensor | None = None,
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """((log_prob (B,), and divergence (B,) with a reference), the reference's model output)."""
        conditioning = dict(zip(self.names, leaves, strict=False))

        def evaluate() -> Tensor:
            with self._constants_given(transition, conditioning, swapped):
                return self.denoiser(
                    transition.model_input, transition.t, conditioning, guided=self.guided, parameters=swapped
                )

        # The adapted model comes first: a replay starts from its random state, and has the reference already.
        model_output = evaluate()
        if self.reference is not None and reference_output is None:
            with torch.no_grad(), adapters_off(self.denoiser.module):
                reference_output = evaluate()
            # Under autocast the reference has cached casts without a graph.
            torch.clear_autocast_cache()
        step = sampler_step(
            transition.x,
            model_output,
            transition.coefficients,
            next_sample=transition.next_x,
            reference_output=reference_output,
            divergence=self.reference,
        )
        scores = (step.log_prob,) if step.divergence is None else (step.log_prob, step.divergence)
        return scores, reference_output

    def _constants_given(
        self, transition: Transition, conditioning: Mapping[str, Tensor], swapped: Mapping[str, Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        if not has_constants(self.denoiser):
            return contextlib.nullcontext()
        made = make_constants(self.denoiser, self.timesteps, conditioning, swapped)
        steps = torch.cat([transition.steps] * 2) if self.guided else transition.steps  # (N,)
        rows = torch.arange(len(steps), device=steps.device)
        time = {name: values[steps, rows if values.shape[1] > 1 else 0] for name, values in made.time.items()}
        return once.given(self.denoiser.model, {**made.text, **time})
