"""The sampling chain: states and scheduler steps, and the gradient's way back through them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rftcore.ops.held import held
from rftcore.ops.sampler_step import sampler_step
from rftcore.sampling.evaluations import Evaluations
from rftcore.sampling.gradient_path import GradientPath
from rftcore.sampling.module_state import ModuleState
from rftcore.sampling.multistep import next_state
from rftcore.sampling.out_of_memory import explained
from rftcore.sampling.replay import check_reached, gradients


@dataclasses.dataclass
class Chain:
    """A chain of S steps as a `replay.Program`.

    Its leaves are the first state (B, C, h, w), the joined conditioning and the parameters. It gives the end of the
    chain, then as constants every state (S+1, B, C, h, w) and the log-probabilities (B, S). Beside the states it keeps
    the UNet's output of each differentiated step, and what `evaluations` keeps.

    Args:
        evaluations: of the UNet, for these leaves.
        coefficients: (S, 9) on the UNet's device, in the states' dtype.
        weights: (S, S+1) likewise, of a multistep scheduler, which has no gradient; None for one of single steps.
        stochastic: S booleans.
        draw_noise: gives the noise (B, C, h, w) of one step.
    """

    evaluations: Evaluations
    coefficients: Tensor
    weights: Tensor | None
    stochastic: Sequence[bool]
    path: GradientPath
    draw_noise: Callable[[], Tensor]

    def forward(self, leaves: Sequence[Tensor]) -> tuple[tuple[Tensor], tuple[Tensor, Tensor], tuple[Tensor, ...]]:
        x, self._modes = leaves[0].detach(), self.path.effective_modes
        if self.path.differentiates:
            self._module_state = ModuleState.capture(self.evaluations.denoiser.module)
            self._first = next(step for step, mode in enumerate(self._modes) if mode != "none")
            self._start_needed = leaves[0].requires_grad and self.path.reaches_start
        with self._adapters_held():
            return self._forward(x)

    def _forward(self, x: Tensor) -> tuple[tuple[Tensor], tuple[Tensor, Tensor], tuple[Tensor, ...]]:
        states, log_probs, outputs, history = [x], [], [], [x]
        with self._explained("what is made once"):
            self.evaluations.begin()
        for step, mode in enumerate(self._modes):
            with self._explained(f"step {step + 1} of {len(self._modes)}"):
                if mode in ("none", "detach_eps"):
                    output = self.evaluations.output(step, x)
                else:
                    output = self.evaluations.differentiable_output(step, x, self._model_input_needed(step))
                noise = self.draw_noise() if self.stochastic[step] else None
                x, log_prob, _ = sampler_step(x, output, self.coefficients[step], noise=noise)
                if self.weights is not None:
                    history.append(x)
                    x = next_state(torch.stack(history), self.weights[step, : step + 2])
            if mode != "none":
                outputs.append(output)
            states.append(x)
            log_probs.append(log_prob)
        # Autocast has cached casts without a graph; a later forward under the same autocast would lose its gradient.
        torch.clear_autocast_cache()
        if not self.path.differentiates:
            self.evaluations.finish()
        stacked = torch.stack(states)
        return (x,), (stacked, torch.stack(log_probs, dim=1)), (stacked, *outputs)

    def backward(
        self, leaves: Sequence[Tensor], saved: Sequence[Tensor], grads: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        states, outputs, (grad,) = saved[0], list(saved[1:]), grads
        if grad is None:
            return [None] * len(leaves)
        with self._module_state.restored(), self._adapters_held():
            self.evaluations.begin_backward()
            for step in reversed(range(self._first, len(self._modes))):
                with self._explained(f"the backward of step {step + 1} of {len(self._modes)}"):
                    grad = self._step_backward(step, states[step], outputs.pop(), grad)
            found = self.evaluations.gradients()
        self.evaluations.finish()
        parameters = self.evaluations.parameters
        check_reached(found[len(found) - len(parameters) :], parameters)
        return [grad if self._start_needed else None, *found]

    def _step_backward(self, step: int, x: Tensor, output: Tensor, grad: Tensor | None) -> Tensor | None:
        mode = self._modes[step]
        x_leaf = x.detach().requires_grad_(mode != "detach_x" and self._input_needed(step))
        output = output.detach().requires_grad_(mode != "detach_eps")
        with torch.enable_grad():
            next_x = sampler_step(x_leaf, output, self.coefficients[step]).next_sample
        grad_x, grad_output = gradients([next_x], [grad], [x_leaf, output])
        if grad_output is None:
            return grad_x
        if self.evaluations.guided and self.path.guidance == "positive":
            grad_output = _of_positive_branch(grad_output)
        through_the_model = self.evaluations.backward(step, x, grad_output, self._model_input_needed(step))
        if grad_x is None or through_the_model is None:
            return through_the_model if grad_x is None else grad_x
        return grad_x + through_the_model

    def _input_needed(self, step: int) -> bool:
        """Whether a gradient goes on to before this step."""
        return step > self._first or self._start_needed

    def _model_input_needed(self, step: int) -> bool:
        return self._modes[step] == "full" and self._input_needed(step)

    def _adapters_held(self) -> contextlib.AbstractContextManager[None]:
        # Captured work makes its own: a graph would read what is gone by its next launch.
        return held() if self.evaluations.is_plain else contextlib.nullcontext()

    def _explained(self, where: str) -> contextlib.AbstractContextManager[None]:
        return explained(where, self.evaluations.plan, self.evaluations.release)


def _of_positive_branch(grad: Tensor) -> Tensor:
    """Of a gradient (2B, ...) at both branches' outputs, that of the guided output, given to the positive branch."""
    # The branches' weights, 1 - w and w, add up to 1.
    negative, positive = grad.chunk(2)
    return torch.cat([torch.zeros_like(negative), negative + positive])
