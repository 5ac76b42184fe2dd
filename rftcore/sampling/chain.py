"""The sampling chain: forward without a graph, backward by replaying each differentiated step from its state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from rftcore.ops.sampler_step import sampler_step
from rftcore.sampling.ambient import Ambient, RandomState
from rftcore.sampling.denoiser import Denoiser
from rftcore.sampling.gradient_path import GradientPath
from rftcore.sampling.module_state import ModuleState
from rftcore.sampling.replay import GradientSum, check_reached, gradients, replay_parameters


@dataclasses.dataclass
class Chain:
    """A chain of S steps as a `replay.Program`.

    Its leaves are the first state (B, C, h, w), the joined conditioning in the order of `names` and the parameters.
    It gives the end of the chain, then as constants every state (S+1, B, C, h, w) and the log-probabilities (B, S).

    Args:
        timesteps: (S,) on the UNet's device.
        coefficients: (S, 9) on the UNet's device, in the states' dtype.
        stochastic: S booleans.
        draw_noise: gives the noise (B, C, h, w) of one step.
    """

    denoiser: Denoiser
    timesteps: Tensor
    coefficients: Tensor
    stochastic: Sequence[bool]
    guided: bool
    names: Sequence[str]
    parameters: Mapping[str, nn.Parameter]
    path: GradientPath
    draw_noise: Callable[[], Tensor]

    def forward(self, leaves: Sequence[Tensor]) -> tuple[tuple[Tensor], tuple[Tensor, Tensor], tuple[Tensor, ...]]:
        x, conditioning = leaves[0].detach(), dict(zip(self.names, leaves[1:], strict=False))
        self._modes = self.path.effective_modes
        if self.path.differentiates:
            self._ambient = Ambient.capture(x.device)
            self._module_state = ModuleState.capture(self.denoiser.module)
        self._random: dict[int, RandomState] = {}
        states, log_probs, outputs = [x], [], []
        for step, mode in enumerate(self._modes):
            if mode not in ("none", "detach_eps"):
                self._random[step] = RandomState.capture(x.device)
            model_output = self.denoiser(x, self.timesteps[step], conditioning, guided=self.guided)
            if mode == "detach_eps":
                outputs.append(model_output)
            noise = self.draw_noise() if self.stochastic[step] else None
            x, log_prob, _ = sampler_step(x, model_output, self.coefficients[step], noise=noise)
            states.append(x)
            log_probs.append(log_prob)
        # Autocast has cached casts without a graph; a later forward under the same autocast would lose its gradient.
        torch.clear_autocast_cache()
        stacked = torch.stack(states)
        return (x,), (stacked, torch.stack(log_probs, dim=1)), (stacked, *outputs)

    def backward(
        self, leaves: Sequence[Tensor], saved: Sequence[Tensor], grads: Sequence[Tensor | None], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        conditioning, conditioning_needed = leaves[1 : 1 + len(self.names)], needed[1 : 1 + len(self.names)]
        parameters, swapped = replay_parameters(self.parameters)
        total = GradientSum([*conditioning, *parameters])
        start_needed = needed[0] and self.path.reaches_start
        states, outputs, (grad,) = saved[0], list(saved[1:]), grads
        first = next(step for step, mode in enumerate(self._modes) if mode != "none")
        with self._module_state.restored():
            for step in reversed(range(first, len(self._modes))):
                mode = self._modes[step]
                x_needed = mode != "detach_x" and (step > first or start_needed)
                x = states[step].detach().requires_grad_(x_needed)
                if mode == "detach_eps":
                    with torch.enable_grad():
                        next_x = sampler_step(x, outputs.pop(), self.coefficients[step]).next_sample
                    (grad,) = gradients([next_x], [grad], [x])
                    continue
                replicas = [
                    c.detach().requires_grad_(n) for c, n in zip(conditioning, conditioning_needed, strict=True)
                ]
                next_x = self._replay(step, x, replicas, swapped, detach_input=mode == "detach_input")
                grad, *rest = gradients([next_x], [grad], [x, *replicas, *parameters])
                total.add(rest)
        result = total.result()
        check_reached(result[len(self.names) :], self.parameters)
        return [grad if start_needed else None, *result]

    def _replay(
        self, step: int, x: Tensor, conditioning: list[Tensor], swapped: dict[str, Tensor], *, detach_input: bool
    ) -> Tensor:
        with torch.enable_grad(), self._ambient.restored(), self._random[step].restored():
            model_output = self.denoiser(
                x.detach() if detach_input else x,
                self.timesteps[step],
                dict(zip(self.names, conditioning, strict=True)),
                guided=self.guided,
                parameters=swapped,
            )
            return sampler_step(x, model_output, self.coefficients[step]).next_sample
