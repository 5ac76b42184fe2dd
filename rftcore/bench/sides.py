"""The works, done by stock code and by ours from the same noise: what is timed, and what is counted."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import checkpoint

import rftcore
from rftcore.algorithms import ddpo, dpok
from rftcore.algorithms.advantages import standardised
from rftcore.bench.methods import Method
from rftcore.bench.models import Problem
from rftcore.sampling import Plan
from rftcore.sampling.adapters import adapters_off

REWARD_WEIGHT, KL_WEIGHT, LEARNING_RATE = 10.0, 0.01, 1e-6
_NOISE_SEED = 2


@dataclass(frozen=True)
class Settled:
    """What ours keeps, settled from bytes before anything is timed.

    Attributes:
        plan: of the chain.
        unet, decoder: levels of `rftcore.accelerate`.
        unet_bytes: that a forward of the UNet may keep, with the level "auto".
        budget: bytes that it was settled for, None where that was no number.
    """

    plan: Plan | None = None
    unet: str | None = None
    decoder: str | None = None
    unet_bytes: int | None = None
    budget: int | None = None


class Step(NamedTuple):
    """A step with noise: the next state, its log-probability (B,), and the Gaussian it was drawn from."""

    next_x: Tensor
    log_prob: Tensor
    mean: Tensor
    sigma: float


class Side:
    """A method at work on a problem. A run leaves gradients in `problem.trained`.

    Args:
        steps: T of a chain.
        backprop_steps: K of its last steps that are differentiated.

    Attributes:
        at_loss: called where a loss has been formed and nothing of its backward has run.
    """

    def __init__(self, method: Method, problem: Problem, steps: int, backprop_steps: int) -> None:
        self.method, self.problem, self.steps, self.backprop_steps = method, problem, steps, backprop_steps
        self.at_loss: Callable[[], Any] = lambda: None
        self._prompts = {name: torch.cat([problem.negative[name], tensor]) for name, tensor in problem.positive.items()}
        self._optimizer = torch.optim.AdamW(problem.trained, lr=LEARNING_RATE)
        for model in (problem.unet, problem.vae):
            if method.blocks:
                model.enable_gradient_checkpointing()

    def run(self, work: str, update: bool = True) -> None:
        """Does a work once; `update`: with the optimizer's step, where the work has one."""
        for parameter in self.problem.trained:
            parameter.grad = None
        # Of the steps' noise.
        torch.manual_seed(_NOISE_SEED)
        getattr(self, work)()
        if update and work in ("ddpo", "dpok"):
            self._optimizer.step()

    def train_step(self) -> None:
        """The mean square of the UNet's output, of the batch at times of each sample's own."""
        noise = self.problem.noise
        times = torch.linspace(1, 999, len(noise), device=noise.device).long()
        loss = self.evaluate(noise, times, self.problem.positive).square().mean()
        self.at_loss()
        loss.backward()

    def draft(self) -> None:
        loss = -self.rewards(self.chain()).mean()
        self.at_loss()
        loss.backward()

    def sampling(self) -> None:
        with torch.no_grad():
            self.chain()

    def ddpo(self) -> None:
        self._policy(None)

    def dpok(self) -> None:
        self._policy("exact")

    def _policy(self, reference: str | None) -> None:
        with torch.no_grad():
            latents, old = self.rollout()
            advantages = standardised(self.rewards(latents))
        for step in range(self.steps):
            log_prob, divergence = self.log_prob(step, reference)
            if divergence is None:
                loss = ddpo.importance_sampling(log_prob, old[:, step], advantages)
            else:
                weights = (REWARD_WEIGHT, KL_WEIGHT)
                loss = dpok.dpok(log_prob, old[:, step], advantages, divergence, *weights)
            self.at_loss()
            (loss / self.steps).backward()

    def chain(self) -> Tensor:
        """(B, 4, h, w) the end of a deterministic chain, with a gradient where grad mode is on."""
        raise NotImplementedError

    def rollout(self) -> tuple[Tensor, Tensor]:
        """The end of a chain with noise, and its log-probabilities (B, T)."""
        raise NotImplementedError

    def log_prob(self, step: int, reference: str | None) -> tuple[Tensor, Tensor | None]:
        """(B,) of a step of the last rollout under the UNet as it is now, and its KL from the model without LoRA."""
        raise NotImplementedError

    def rewards(self, latents: Tensor) -> Tensor:
        """(B,), with a gradient where `latents` have one."""
        raise NotImplementedError

    def evaluate(self, x: Tensor, t: Tensor, told: dict[str, Tensor]) -> Tensor:
        """The UNet's output in the dtype of x."""
        unet = self.problem.unet
        added = {name: tensor for name, tensor in told.items() if name != "prompt_embeds"} or None
        with self._autocast():
            output = unet(
                x.to(unet.conv_in.weight.dtype),
                t,
                encoder_hidden_states=told["prompt_embeds"],
                added_cond_kwargs=added,
                return_dict=False,
            )[0]
        return output.to(x.dtype)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if not self.method.autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.problem.noise.device.type, self.problem.dtype)


class Stock(Side):
    """A loop over diffusers' scheduler, and ddpo-pytorch's step for log-probabilities."""

    def __init__(self, method: Method, problem: Problem, steps: int, backprop_steps: int) -> None:
        super().__init__(method, problem, steps, backprop_steps)
        if method.compiled is not None:
            torch._functorch.config.activation_memory_budget = method.compiled
            problem.unet.compile(dynamic=False)
        # Its table has numbers, whatever the models' tensors have.
        with _disable_current_modes():
            self._scheduler = copy.deepcopy(problem.scheduler)
            self._scheduler.set_timesteps(steps)
            self._numbers, self._alphas = (
                t.tolist() for t in (self._scheduler.timesteps, self._scheduler.alphas_cumprod)
            )
        # For the UNet on its device; the scheduler's table is on the CPU.
        self._times = [(t.to(problem.noise.device), t) for t in self._scheduler.timesteps]
        self._states: list[Tensor] = []

    def chain(self) -> Tensor:
        x, first = self.problem.noise, self.steps - self.backprop_steps
        for index, times in enumerate(self._times):
            differentiated = torch.is_grad_enabled() and index >= first
            with torch.set_grad_enabled(differentiated):
                if differentiated and self.method.steps:
                    x = checkpoint(self._step, x, *times, use_reentrant=False)
                else:
                    x = self._step(x, *times)
        return x

    def _step(self, x: Tensor, t: Tensor, time: Tensor) -> Tensor:
        return self._scheduler.step(self._guided(x, t), time, x, return_dict=False)[0]

    def rollout(self) -> tuple[Tensor, Tensor]:
        self._states, log_probs = [self.problem.noise], []
        for (t, _), number in zip(self._times, self._numbers, strict=True):
            step = self._noisy_step(self._guided(self._states[-1], t), number, self._states[-1])
            self._states.append(step.next_x)
            log_probs.append(step.log_prob)
        return self._states[-1], torch.stack(log_probs, 1)

    def log_prob(self, step: int, reference: str | None) -> tuple[Tensor, Tensor | None]:
        (t, _), number, x, next_x = self._times[step], self._numbers[step], *self._states[step : step + 2]
        taken = self._noisy_step(self._guided(x, t), number, x, next_x)
        if reference is None:
            return taken.log_prob, None
        with torch.no_grad(), adapters_off(self.problem.unet):
            base = self._noisy_step(self._guided(x, t), number, x, next_x).mean
        divergence = (taken.mean - base).square() / (2 * taken.sigma**2)
        return taken.log_prob, divergence.flatten(1).mean(1)

    def _noisy_step(self, output: Tensor, number: int, x: Tensor, next_x: Tensor | None = None) -> Step:
        """A step of DDIM with eta = 1, drawn or given.

        Source: Song et al. 2021 (DDIM), eq. 12 and 16; the last step ends on the table's first entry (ddpo-pytorch).
        """
        a_t, a_p = (self._alphas[max(t, 0)] for t in (number, number - 1000 // self.steps))
        if self._scheduler.config.prediction_type == "v_prediction":
            x0, eps = (
                math.sqrt(a_t) * x - math.sqrt(1 - a_t) * output,
                math.sqrt(a_t) * output + math.sqrt(1 - a_t) * x,
            )
        else:
            x0, eps = (x - math.sqrt(1 - a_t) * output) / math.sqrt(a_t), output
        sigma = math.sqrt((1 - a_p) / (1 - a_t) * (1 - a_t / a_p))
        mean = math.sqrt(a_p) * x0 + math.sqrt(1 - a_p - sigma**2) * eps
        if next_x is None:
            # The same numbers in every precision.
            next_x = mean + sigma * randn_tensor(x.shape, device=x.device, dtype=torch.float32).to(x)
        scores = -((next_x - mean) ** 2) / (2 * sigma**2) - math.log(sigma) - 0.5 * math.log(2 * math.pi)
        return Step(next_x, scores.flatten(1).mean(1), mean, sigma)

    def _guided(self, x: Tensor, t: Tensor) -> Tensor:
        scale = self.problem.guidance_scale
        if scale == 1.0:
            return self.evaluate(x, t, self.problem.positive)
        negative, positive = self.evaluate(torch.cat([x, x]), t, self._prompts).chunk(2)
        return negative + scale * (positive - negative)

    def rewards(self, latents: Tensor) -> Tensor:
        if not self.method.images:
            return self._rewarded(latents, self.problem.prompts)
        parts = zip(latents.split(1), self.problem.prompts, strict=True)
        return torch.cat([checkpoint(self._rewarded, x, [text], use_reentrant=False) for x, text in parts])

    def _rewarded(self, latents: Tensor, prompts: list[str]) -> Tensor:
        vae = self.problem.vae
        with self._autocast():
            scaled = (latents / vae.config.scaling_factor).to(vae.dtype)
            images = vae.decode(scaled, return_dict=False)[0].to(latents.dtype)
        return self.problem.reward((images / 2 + 0.5).clamp(0, 1), prompts, None)


class Ours(Stock):
    """Chains and their re-scoring by `CheckpointedSampler`, decoding by `score`, each where the method has it."""

    def __init__(
        self, method: Method, problem: Problem, steps: int, backprop_steps: int, settled: Settled | None = None
    ) -> None:
        super().__init__(method, problem, steps, backprop_steps)
        settled = settled or Settled()
        unet, decoder = settled.unet or method.unet, settled.decoder or method.decoder
        if unet:
            rftcore.accelerate(problem.unet, unet, memory_budget=settled.unet_bytes)
        if decoder:
            rftcore.accelerate(problem.vae, decoder)
        plan = settled.plan
        if method.replayed:
            modes = ["none"] * (steps - backprop_steps) + ["full"] * backprop_steps
            plan = Plan.replayed(modes, len(problem.noise))
        self._differentiable = self._sampler(backprop_steps=backprop_steps, plan=plan)
        self._noisy = self._sampler(backprop_steps=0, eta=1.0, final_step="clamp")
        self._given: dict[str, Any] = {"latents": problem.noise}
        for prefix, told in (("", problem.positive), ("negative_", problem.negative)):
            if prefix and problem.guidance_scale == 1.0:
                continue
            self._given[f"{prefix}prompt_embeds"] = told["prompt_embeds"]
            added = {name: tensor for name, tensor in told.items() if name != "prompt_embeds"}
            self._given[f"{prefix}added_cond_kwargs"] = added or None

    @property
    def plan(self) -> Plan | None:
        return self._differentiable.plan

    def _sampler(self, **options: Any) -> rftcore.CheckpointedSampler:
        with _disable_current_modes():
            return rftcore.CheckpointedSampler(
                self.problem.unet, self.problem.scheduler, num_inference_steps=self.steps,
                guidance_scale=self.problem.guidance_scale, **options,
            )  # fmt: skip

    def chain(self) -> Tensor:
        if not self.method.sampler:
            return super().chain()
        merged = self.method.merged and not torch.is_grad_enabled()
        return self._differentiable(**self._given, merged=merged).latents

    def rollout(self) -> tuple[Tensor, Tensor]:
        if not self.method.sampler:
            return super().rollout()
        self._trajectory = self._noisy(**self._given)
        return self._trajectory.latents, self._trajectory.log_probs

    def log_prob(self, step: int, reference: str | None) -> tuple[Tensor, Tensor | None]:
        if not self.method.sampler:
            return super().log_prob(step, reference)
        transitions = self._trajectory.transitions(torch.tensor([step]))
        return self._noisy.transition_log_prob(transitions, reference)

    def rewards(self, latents: Tensor) -> Tensor:
        if not self.method.score:
            return super().rewards(latents)
        rewards = rftcore.score(self.problem.vae, latents, self.problem.reward, self.problem.prompts)
        assert isinstance(rewards, Tensor)  # without stats
        return rewards


def make_side(
    method: Method, problem: Problem, steps: int, backprop_steps: int, settled: Settled | None = None
) -> Side:
    """Stock's or ours."""
    if method.sampler or method.score or method.unet or method.decoder:
        return Ours(method, problem, steps, backprop_steps, settled)
    return Stock(method, problem, steps, backprop_steps)
