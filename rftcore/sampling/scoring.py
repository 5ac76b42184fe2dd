"""Log-probabilities of what a sampler sampled, for any model of its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rftcore.sampling import replay
from rftcore.sampling.denoiser import Denoiser
from rftcore.sampling.device_table import DeviceTables
from rftcore.sampling.records import sent
from rftcore.sampling.rescore import Rescore, Transition
from rftcore.sampling.trajectory import Trajectory
from rftcore.sampling.transitions import Transitions

REFERENCES = (None, "exact", "uniform")


class Scoring:
    """Checks that steps can be scored, and scores them: `CheckpointedSampler.log_prob` and what is like it.

    Args:
        tables: of the sampler's chain.
        guided: whether both branches of guidance are run.
        settings: the sampler's; what is scored must have been sampled with the same.
    """

    def __init__(self, denoiser: Denoiser, tables: DeviceTables, guided: bool, settings: dict[str, Any]) -> None:
        self._denoiser = denoiser
        self._tables = tables
        self._guided = guided
        self._settings = settings

    def trajectory(
        self, trajectory: Trajectory, steps: Sequence[int] | Tensor, reference: str | None
    ) -> tuple[Tensor, Tensor | None]:
        """See `CheckpointedSampler.log_prob`."""
        self._check("trajectory", trajectory, trajectory.states, reference)
        numbers = trajectory.step_numbers(steps)
        self._check_stochastic(numbers, trajectory.settings)
        device = trajectory.states.device
        samples = torch.arange(len(trajectory), device=device)
        columns = [
            self._transition(trajectory.states[taken, samples], trajectory.states[taken + 1, samples], taken)
            for taken in sent(numbers, device).unbind(1)
        ]
        return self._scores(columns, trajectory, reference)

    def transitions(self, transitions: Transitions, reference: str | None) -> tuple[Tensor, Tensor | None]:
        """See `CheckpointedSampler.transition_log_prob`."""
        self._check("transitions", transitions, transitions.x, reference)
        if not len(transitions):
            raise ValueError("transitions is empty; re-score at least one.")
        self._check_stochastic(transitions.steps, transitions.settings)
        steps = sent(transitions.steps, transitions.x.device)
        column = self._transition(transitions.x, transitions.next_x, steps)
        log_prob, divergence = self._scores([column], transitions, reference)
        return log_prob[:, 0], None if divergence is None else divergence[:, 0]

    def noisy(self, settings: Mapping[str, Any]) -> list[int]:
        """The steps that have noise, of a trajectory with these settings."""
        return [step for step, noisy in enumerate(self._stochastic(settings)) if noisy]

    def _stochastic(self, settings: Mapping[str, Any]) -> tuple[bool, ...]:
        return self._tables.table.stopped(settings["steps_taken"], settings["output"]).stochastic

    def _check(self, name: str, scored: Trajectory | Transitions, states: Tensor, reference: str | None) -> None:
        """Raises ValueError unless these states can be scored by this sampler."""
        if not self._tables.table.differentiable:
            raise ValueError(self._tables.table.reason)
        if reference not in REFERENCES:
            raise ValueError(f"reference={reference!r} is not known; allowed are None, 'exact' and 'uniform'.")
        scored.check_settings(self._settings)
        if states.device != self._denoiser.device:
            raise ValueError(f"{name} on {states.device} and the UNet on {self._denoiser.device}: call .to(...) first.")
        if torch.is_grad_enabled() and states.is_inference():
            raise ValueError(
                f"{name} was sampled under torch.inference_mode, whose tensors no gradient can pass: sample under "
                "torch.no_grad() instead (or with backprop_steps=0), or re-score under torch.no_grad()."
            )
        if states.dtype != self._denoiser.state_dtype:
            raise ValueError(
                f"{name}'s states are {states.dtype} and this UNet's would be "
                f"{self._denoiser.state_dtype}; re-score with a UNet of the dtype that sampled."
            )

    def _check_stochastic(self, steps: Tensor, settings: dict[str, Any]) -> None:
        """Raises unless each of these steps is one of a chain of `settings`, and has noise."""
        stochastic = self._stochastic(settings)
        for step in sorted(set(steps.flatten().tolist())):
            if not 0 <= step < len(stochastic):
                raise IndexError(f"steps holds {step}; the chain had steps 0 to {len(stochastic) - 1}.")
            if not stochastic[step]:
                possible = self.noisy(settings)
                advice = "sample with eta > 0" if self._tables.table.eta is not None else "sample with DDIM and eta > 0"
                advice = f"steps with noise are {_spans(possible)}" if possible else advice
                raise ValueError(
                    f"steps holds {step}, which is deterministic (sigma = 0) and has no log-probability; {advice}."
                )

    def _transition(self, x: Tensor, next_x: Tensor, steps: Tensor) -> Transition:
        """Step steps[n] (N,) from x[n] to next_x[n] (N, C, h, w), all on one device."""
        table = self._tables.on(x.device, self._denoiser.state_dtype)
        return Transition(
            x=x,
            next_x=next_x,
            steps=steps,
            t=table.timesteps[steps],
            coefficients=table.coefficients[steps],
            input_scales=None if table.input_scales is None else table.input_scales[steps],
        )

    def _scores(
        self, columns: Sequence[Transition], scored: Trajectory | Transitions, reference: str | None
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and divergences (N, S) of S transitions of N rows each, which share their conditioning."""
        joined = scored.conditioning.joined()
        device = columns[0].x.device
        parameters = self._denoiser.trainable() if torch.is_grad_enabled() else {}
        leaves = [*joined.values(), *parameters.values()]
        rescore = Rescore(
            denoiser=self._denoiser,
            transitions=columns,
            timesteps=self._tables.on(device, self._denoiser.state_dtype, scored.settings["steps_taken"]).timesteps,
            guided=self._guided,
            names=list(joined),
            parameters=parameters,
            reference=reference,
        )
        if not torch.is_grad_enabled():
            scores, _, _ = rescore.forward(leaves)
        else:
            replay.check_differentiable(leaves, leaves)
            run = rescore.direct if len(columns) == 1 else lambda leaves: replay.run(rescore, leaves)
            scores = self._denoiser.synchronised(lambda: run(leaves))
        return scores[0], None if reference is None else scores[1]


def _spans(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
