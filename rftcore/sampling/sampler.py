"""`CheckpointedSampler`: a sampling chain one can differentiate through, on whatever memory there is."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rftcore.ops.sampler_step import Coefficient
from rftcore.sampling import replay
from rftcore.sampling.adapters import adapters_off
from rftcore.sampling.captures import Captures
from rftcore.sampling.chain import Chain
from rftcore.sampling.conditioning import Conditioning
from rftcore.sampling.denoiser import Denoiser
from rftcore.sampling.device_table import DeviceTables
from rftcore.sampling.evaluations import Evaluations
from rftcore.sampling.first_state import draw, first_state
from rftcore.sampling.gradient_path import GUIDANCES, GradientPath
from rftcore.sampling.merged import merged as merged_weights
from rftcore.sampling.plan import Plan
from rftcore.sampling.plans import Plans
from rftcore.sampling.schedule import step_table
from rftcore.sampling.scoring import Scoring
from rftcore.sampling.trajectory import Trajectory
from rftcore.sampling.transitions import Transitions

_MERGED_WITH_GRADIENT = (
    "merged=True under grad mode: merged weights carry no gradient to the adapters. Sample under torch.no_grad() or with "
    "backprop_steps=0, or without merged."
)


class CheckpointedSampler:
    """Samples with a UNet, differentiably if asked, and re-scores what it sampled.

    A differentiated step keeps its graph as far as memory allows, and is else replayed from its state in the backward
    pass: down to the memory of one step of one image, whatever the number of steps. Which of them keep what is planned
    from shapes (`sampler.plan`). Gradients are exact in every plan, through both branches of guidance and through x_t,
    and reach every parameter once a backward, so that DDP averages them once.

    On CUDA the chain is captured as graphs at its second run and launched from then on, as long as nothing that is
    built into them changes (`sampler.uncaptured` says why it was not). A chain along another gradient path than the
    sampler's own first has to come a second time: paths may be drawn at random.

    Args:
        unet: diffusers `UNet2DConditionModel` or `UNet2DModel`; PEFT, `torch.compile`, accelerate and DDP wrappings
            are accepted.
        scheduler: diffusers' `DDIMScheduler`, `DDPMScheduler`, `EulerDiscreteScheduler`,
            `EulerAncestralDiscreteScheduler` or `LCMScheduler`, as its user configured it; it is not changed. Without a
            gradient also `DPMSolverMultistepScheduler` and `UniPCMultistepScheduler`.
        num_inference_steps: T.
        guidance_scale: w of classifier-free guidance; 1.0 runs no negative branch. Any other value guides, 0.0 to the
            negative prompt alone (diffusers' pipelines switch guidance off below 1). A UNet with time_cond_proj_dim
            (latent consistency models) is told w instead, and runs one branch at any w.
        eta: DDIM's; None is 0. Other schedulers have their own noise, or none, and take None only.
        backprop_steps: None differentiates the whole chain, K the last K steps, 0 none.
        gradient_path: where the gradient flows, step by step; backprop_steps is its short form, give one of the two.
        final_step: "scheduler" ends as the scheduler does, "clamp" on alphas_cumprod[0] (ddpo-pytorch).
        cross_attention_kwargs: handed to every UNet call, e.g. {"scale": 0.5} for the LoRA's scale.
        memory_budget: what the chain, decoding and the reward may take beyond what is allocated already: bytes, or a
            text such as "8GiB". None: what is free on the device; the least of all ranks' where there are several.
        reserve: bytes, or a text, that stored steps leave of it to decoding and the reward. None: nothing of a
            memory_budget that is given; else 2 GiB, or half of what is free where that is less.
        plan: which steps keep what, instead of planning: `sampler.plan` of an earlier run.
        capture: whether graphs may be captured.

    Raises:
        ValueError, TypeError: for arguments that are not served, naming what is.
    """

    def __init__(
        self,
        unet: nn.Module,
        scheduler: Any,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        eta: float | None = None,
        backprop_steps: int | None = None,
        gradient_path: GradientPath | None = None,
        final_step: str = "scheduler",
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        memory_budget: int | str | None = None,
        reserve: int | str | None = None,
        plan: Plan | None = None,
        capture: bool = True,
    ) -> None:
        if not _is_finite(guidance_scale):
            raise ValueError(f"guidance_scale={guidance_scale!r} must be a finite number; 1.0 means no guidance.")
        self.denoiser = Denoiser(unet, cross_attention_kwargs)
        self.guided = self.denoiser.guided(guidance_scale)
        if self.guided and not self.denoiser.conditional:
            raise ValueError(
                f"guidance_scale={guidance_scale} with the unconditional {type(self.denoiser.model).__name__}: there "
                "is no prompt to guide by; use guidance_scale=1.0."
            )
        self.table = step_table(
            scheduler, num_inference_steps, guidance_scale=guidance_scale, eta=eta, final_step=final_step
        )
        if gradient_path is not None and backprop_steps is not None:
            raise ValueError(f"give gradient_path or backprop_steps={backprop_steps}, its short form, not both.")
        num_inference_steps = len(self.table)
        self.gradient_path = gradient_path or GradientPath.last(backprop_steps, num_inference_steps)
        self._check_path(self.gradient_path)
        if not self.table.differentiable and (gradient_path or backprop_steps) and self.gradient_path.differentiates:
            raise ValueError(self.table.reason)
        self._plans = Plans(self.denoiser, memory_budget, reserve, plan, guided=self.guided)
        self._captures = Captures(self.denoiser, capture)
        self.settings: dict[str, Any] = {
            "scheduler": type(scheduler).__name__,
            "prediction_type": scheduler.config.prediction_type,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": float(guidance_scale),
            "eta": self.table.eta,
            "final_step": final_step,
            "schedule": self.table.fingerprint,
            "cross_attention_kwargs": repr(dict(cross_attention_kwargs or {})),
        }
        self._tables = DeviceTables(self.table)
        self._scoring = Scoring(self.denoiser, self._tables, self.guided, self.settings)
        self._evaluations = 0

    @property
    def plan(self) -> Plan | None:
        """What the differentiated steps of the last chain kept; None before the first one."""
        return self._plans.last

    @property
    def branches(self) -> int:
        """UNet evaluations of one sample in one step: 2 with guidance, else 1."""
        return 2 if self.guided else 1

    @property
    def evaluations(self) -> int:
        """UNet evaluations of one sample in the last chain, those that its backward repeats among them.

        Each branch of guidance counts, and of a path that stops early the steps that were taken; 0 before the first
        chain.
        """
        return self._evaluations

    @property
    def uncaptured(self) -> str | None:
        """Why the last chain was not launched as captured graphs; None where it was, or will be."""
        return self._captures.reason

    def __call__(
        self,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        *,
        latents: Tensor | None = None,
        batch_size: int | None = None,
        sample_size: int | tuple[int, int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        negative_added_cond_kwargs: Mapping[str, Tensor] | None = None,
        gradient_path: GradientPath | None = None,
        merged: bool = False,
    ) -> Trajectory:
        """Runs the chain; under grad mode along `gradient_path`, without a gradient otherwise.

        Args:
            prompt_embeds, negative_prompt_embeds: (B, tokens, width); none for an unconditional UNet.
            latents: (B, C, h, w) noise of unit variance to start from, may require grad; None draws it.
            batch_size: B, where neither embeddings nor latents say it.
            sample_size: (h, w) of the latents, default the UNet's own.
            generator: one, or one a sample, for the first state and the noise of each step that has
                some; None uses the default one.
            added_cond_kwargs, negative_added_cond_kwargs: SDXL's, (B, ...) each; see `Conditioning.build`.
            gradient_path: instead of the sampler's own, for this call.
            merged: samples, without a gradient, with the LoRA added to copies of the weights that live for this chain.
                In low precision the log-probabilities are then another model's: train on `rescored(trajectory)`.

        Raises:
            ValueError: when arguments do not fit together, or a gradient is asked for and nothing is trainable.
        """
        path = gradient_path or self.gradient_path
        self._check_path(path)
        conditioning = self._conditioning(
            prompt_embeds, negative_prompt_embeds, added_cond_kwargs, negative_added_cond_kwargs
        )
        sizes = {"prompt_embeds": conditioning.batch_size, "batch_size": batch_size}
        latents = first_state(self.denoiser, self.table.init_noise_sigma, latents, sample_size, sizes, generator)
        table = self.table.stopped(len(path.modes), path.output)
        joined = conditioning.joined()
        differentiate = torch.is_grad_enabled() and path.differentiates
        parameters = self.denoiser.trainable() if differentiate and path.reaches_model else {}
        leaves = [latents, *joined.values(), *parameters.values()]
        if differentiate:
            if not self.table.differentiable or merged:
                raise ValueError(self.table.reason or _MERGED_WITH_GRADIENT)
            start = [latents] if path.reaches_start else []
            model = [*joined.values(), *parameters.values()] if path.reaches_model else []
            replay.check_differentiable([*start, *model], leaves)
            path = path.needed(start=latents.requires_grad)
        else:
            path = GradientPath(("none",) * len(path.modes), output=path.output)
        plan = None
        if differentiate:
            plan = self._plans.choose(latents, joined, parameters, path.modes, self._captures.bytes)
        on_device = self._tables.on(latents.device, latents.dtype, len(path.modes), path.output)
        # Tables are kept, and so an id is one's own.
        built_in = (path, plan and plan.work, id(on_device))
        chain = Chain(
            evaluations=Evaluations(
                self.denoiser,
                guided=self.guided,
                timesteps=on_device.timesteps,
                input_scales=on_device.input_scales,
                conditioning=joined,
                parameters=parameters,
                plan=plan,
                run=self._captures.begin(
                    latents,
                    joined,
                    built_in,
                    differentiates=differentiate,
                    merged=merged,
                    passing=differentiate and path != self.gradient_path.needed(start=latents.requires_grad),
                ),
                batch=len(latents),
            ),
            coefficients=on_device.coefficients,
            weights=on_device.weights,
            stochastic=table.stochastic,
            path=path,
            draw_noise=lambda: draw(latents.shape, generator, latents),
        )
        if differentiate:
            end, states, log_probs = self.denoiser.synchronised(lambda: replay.run(chain, leaves))
        else:
            with torch.no_grad(), self._merged() if merged else contextlib.nullcontext():
                (end,), (states, log_probs), _ = chain.forward(leaves)
        self._evaluations = self.branches * (len(table) + (plan.replays if plan else 0))
        return Trajectory(
            latents=end,
            states=states,
            timesteps=on_device.timesteps.clone(),
            log_probs=log_probs,
            stochastic=on_device.coefficients[:, Coefficient.SIGMA] > 0,
            conditioning=conditioning,
            settings={**self.settings, "steps_taken": len(table), "output": path.output, "merged": merged},
        )

    def rescored(self, trajectory: Trajectory) -> Trajectory:
        """The trajectory with the log-probabilities of its steps as `log_prob` gives them now, without a gradient.

        For a rollout that another path made (merged weights, another batch, another attention kernel): its own
        log-probabilities are those of a model that differs by rounding, and in low precision a ratio of new to old
        would be off by more than a clip range before the first update.

        Raises:
            ValueError: as `log_prob`.
        """
        steps = self._scoring.noisy(trajectory.settings)
        if not steps:
            return trajectory
        with torch.no_grad():
            scores, _ = self.log_prob(trajectory, steps)
        log_probs = trajectory.log_probs.clone()
        log_probs[:, steps] = scores.to(log_probs)
        return dataclasses.replace(trajectory, log_probs=log_probs, settings={**trajectory.settings, "merged": False})

    def log_prob(
        self, trajectory: Trajectory, steps: Sequence[int] | Tensor, reference: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of a trajectory's steps under the UNet as it is now, differentiable.

        Args:
            steps: (S,) indices of steps, or (B, S) for steps of each sample's own. On the CPU: a device tensor syncs.
            reference: None, or the divergence from the UNet with its adapters off: "exact" is the KL of the two
                Gaussians (nats per element), "uniform" the mean squared difference of the guided eps (DPOK's code).

        Returns:
            log_prob (B, S) in nats per element, and divergence (B, S) or None.

        Raises:
            ValueError: for a trajectory of other settings, an unknown reference, a deterministic step, or nothing
                trainable under grad mode.
            IndexError: for a step out of range.
        """
        return self._scoring.trajectory(trajectory, steps, reference)

    def transition_log_prob(
        self, transitions: Transitions, reference: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of transitions under the UNet as it is now, in one evaluation and plain autograd.

        Of the steps of a whole batch they are the numbers of `log_prob`, bit for bit.

        Args:
            transitions: N of them, on the UNet's device; `trajectory.transitions(steps)`.
            reference: as in `log_prob`.

        Returns:
            log_prob (N,) in nats per element, and divergence (N,) or None.

        Raises:
            ValueError: for transitions of other settings or none at all, an unknown reference, a deterministic step,
                or nothing trainable under grad mode.
        """
        return self._scoring.transitions(transitions, reference)

    def predict(
        self,
        x_t: Tensor,
        t: int | Tensor,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        *,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        negative_added_cond_kwargs: Mapping[str, Tensor] | None = None,
        adapter: bool = True,
        guidance_gradient: str = "both",
    ) -> Tensor:
        """One guided evaluation of the UNet, in plain autograd and the caller's grad mode.

        Args:
            x_t: (B, C, h, w) state, as the scheduler's states are (Euler's are given to the UNet scaled).
            t: the model's time, one for all or (B,); of a scheduler that scales its states, a time of its steps.
            adapter: False evaluates the base model.
            guidance_gradient: as `GradientPath.guidance`.

        Returns:
            (B, C, h, w) the guided model output, of the scheduler's prediction type, in the states' dtype.

        Raises:
            ValueError: as the sampler's call; for an unknown guidance_gradient.
        """
        if guidance_gradient not in GUIDANCES:
            raise ValueError(
                f"guidance_gradient={guidance_gradient!r} is not known; allowed are {', '.join(map(repr, GUIDANCES))}."
            )
        conditioning = self._conditioning(
            prompt_embeds, negative_prompt_embeds, added_cond_kwargs, negative_added_cond_kwargs
        )
        if conditioning.batch_size not in (None, x_t.shape[0]):
            raise ValueError(f"x_t has batch size {x_t.shape[0]} and prompt_embeds {conditioning.batch_size}.")
        t = torch.as_tensor(t, device=x_t.device)
        scaled = x_t * self._input_scale(t, x_t)

        def evaluate() -> tuple[Tensor]:
            return (self.denoiser(scaled, t, conditioning.joined(), guided=self.guided),)

        if adapter:
            (output,) = self.denoiser.synchronised(evaluate)
        else:
            with adapters_off(self.denoiser.module):
                (output,) = evaluate()
        output = output.to(self.denoiser.state_dtype)
        if not self.guided:
            return output
        negative, positive = output.chunk(2)
        guided = negative + self.settings["guidance_scale"] * (positive - negative)
        # The same value, with the positive branch's gradient.
        return guided if guidance_gradient == "both" else guided.detach() + (positive - positive.detach())

    def _conditioning(self, *given: Any) -> Conditioning:
        conditioning = Conditioning.build(*given, guided=self.guided)
        self.denoiser.check_conditioning(conditioning)
        return self.denoiser.told(conditioning, self.settings["guidance_scale"])

    def _check_path(self, path: GradientPath) -> None:
        if not isinstance(path, GradientPath):
            raise ValueError(
                f"gradient_path must be an rftcore.GradientPath, got {type(path).__name__}; "
                "write GradientPath(modes) with a mode for every step."
            )
        path.check_length(len(self.table))

    def _input_scale(self, t: Tensor, x_t: Tensor) -> Tensor | float:
        """What a state is multiplied by for the model at time t; NaN at a time that no step has."""
        table = self._tables.on(x_t.device, self.denoiser.state_dtype)
        if table.input_scales is None:
            return 1.0
        # (B, T): without waiting for t.
        found = table.timesteps == t.reshape(-1, 1)
        scale = torch.where(found.any(1), (found * table.input_scales).sum(1) / found.sum(1), torch.nan)
        return scale.reshape(-1, *[1] * (x_t.dim() - 1))

    def _merged(self) -> contextlib.AbstractContextManager[Any]:
        """The UNet with its LoRA in its weights, for a block."""
        extra = self.denoiser.extra.get("cross_attention_kwargs", {})
        return merged_weights(self.denoiser.module, extra.get("scale", 1.0))


def _is_finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)
