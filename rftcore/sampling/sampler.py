"""`CheckpointedSampler`: a sampling chain one can differentiate through, on whatever memory there is."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from rftcore.ops.sampler_step import Coefficient
from rftcore.sampling import replay
from rftcore.sampling.adapters import adapters_off
from rftcore.sampling.captures import Captures
from rftcore.sampling.chain import Chain
from rftcore.sampling.conditioning import Conditioning
from rftcore.sampling.denoiser import Denoiser
from rftcore.sampling.device_table import DeviceTable
from rftcore.sampling.evaluations import Evaluations
from rftcore.sampling.gradient_path import GUIDANCES, GradientPath
from rftcore.sampling.merged import merged as merged_weights
from rftcore.sampling.plan import Plan
from rftcore.sampling.plans import Plans
from rftcore.sampling.records import sent
from rftcore.sampling.rescore import Rescore, Transition
from rftcore.sampling.schedule import step_table
from rftcore.sampling.trajectory import Trajectory
from rftcore.sampling.transitions import Transitions

REFERENCES = (None, "exact", "uniform")
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
        self._tables: dict[tuple, DeviceTable] = {}
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
        latents = self._first_state(latents, batch_size, sample_size, conditioning, generator)
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
            _check_differentiable([*start, *model], leaves)
            path = path.needed(start=latents.requires_grad)
        else:
            path = GradientPath(("none",) * len(path.modes), output=path.output)
        plan = None
        if differentiate:
            plan = self._plans.choose(latents, joined, parameters, path.modes, self._captures.bytes)
        on_device = self._on(self.denoiser.device, len(path.modes), path.output)
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
            draw_noise=lambda: _draw(latents.shape, generator, latents),
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
        steps = [step for step, noisy in enumerate(self._stochastic(trajectory.settings)) if noisy]
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
        self._check_scored("trajectory", trajectory, trajectory.states, reference)
        numbers = trajectory.step_numbers(steps)
        self._check_stochastic(numbers, trajectory.settings)
        device = trajectory.states.device
        samples = torch.arange(len(trajectory), device=device)
        columns = [
            self._transition(trajectory.states[taken, samples], trajectory.states[taken + 1, samples], taken)
            for taken in sent(numbers, device).unbind(1)
        ]
        return self._scores(columns, trajectory.conditioning, trajectory.settings, reference)

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
        self._check_scored("transitions", transitions, transitions.x, reference)
        if not len(transitions):
            raise ValueError("transitions is empty; re-score at least one.")
        self._check_stochastic(transitions.steps, transitions.settings)
        steps = sent(transitions.steps, transitions.x.device)
        column = self._transition(transitions.x, transitions.next_x, steps)
        log_prob, divergence = self._scores([column], transitions.conditioning, transitions.settings, reference)
        return log_prob[:, 0], None if divergence is None else divergence[:, 0]

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

    def _first_state(
        self,
        latents: Tensor | None,
        batch_size: int | None,
        sample_size: int | tuple[int, int] | None,
        conditioning: Conditioning,
        generator: torch.Generator | Sequence[torch.Generator] | None,
    ) -> Tensor:
        sizes = {"prompt_embeds": conditioning.batch_size, "batch_size": batch_size}
        sizes["latents"] = None if latents is None else latents.shape[0]
        known = {name: size for name, size in sizes.items() if size is not None}
        if not known:
            raise ValueError("batch_size=None: say how many samples to draw, by batch_size= or latents=.")
        if len(set(known.values())) > 1:
            raise ValueError(f"the batch sizes do not agree: {known}; give one row for each sample.")
        count = next(iter(known.values()))
        if count < 1:
            raise ValueError(f"the batch holds {count} samples; sample at least one.")
        if isinstance(generator, Sequence) and len(generator) != count:
            raise ValueError(f"generator is a list of {len(generator)} for {count} samples; give one, or one a sample.")
        channels = self.denoiser.config.in_channels
        if latents is not None:
            if latents.ndim != 4 or latents.shape[1] != channels:
                raise ValueError(f"latents has shape {tuple(latents.shape)}; the UNet takes (B, {channels}, h, w).")
            if sample_size is not None:
                raise ValueError(f"give latents or sample_size={sample_size}, not both: latents have their own.")
            latents = latents.to(self.denoiser.device, self.denoiser.state_dtype)
        else:
            size = sample_size if sample_size is not None else self.denoiser.config.sample_size
            if size is None:
                raise ValueError("sample_size=None and the UNet's config has none; give the latents' (h, w).")
            height, width = (size, size) if isinstance(size, int) else size
            like = torch.empty((), dtype=self.denoiser.state_dtype, device=self.denoiser.device)
            latents = _draw((count, channels, height, width), generator, like)
        sigma = self.table.init_noise_sigma
        return latents if sigma == 1.0 else latents * sigma

    def _check_path(self, path: GradientPath) -> None:
        if not isinstance(path, GradientPath):
            raise ValueError(
                f"gradient_path must be an rftcore.GradientPath, got {type(path).__name__}; "
                "write GradientPath(modes) with a mode for every step."
            )
        path.check_length(len(self.table))

    def _on(self, device: torch.device, steps: int, output: str) -> DeviceTable:
        """The table of a chain on a device, copied to it once."""
        key = (device, self.denoiser.state_dtype, steps, output)
        if key not in self._tables:
            # The copy outlives this call, which may be made under inference mode, or one that counts.
            with torch.inference_mode(False), _disable_current_modes():
                self._tables[key] = DeviceTable.of(self.table.stopped(steps, output), device, key[1])
        return self._tables[key]

    def _input_scale(self, t: Tensor, x_t: Tensor) -> Tensor | float:
        """What a state is multiplied by for the model at time t; NaN at a time that no step has."""
        table = self._on(x_t.device, len(self.table), "latents")
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

    def _stochastic(self, settings: Mapping[str, Any]) -> tuple[bool, ...]:
        """Of each step of a trajectory with these settings, whether it has noise."""
        return self.table.stopped(settings["steps_taken"], settings["output"]).stochastic

    def _check_scored(self, name: str, scored: Trajectory | Transitions, states: Tensor, reference: str | None) -> None:
        """Raises ValueError unless these states can be scored by this sampler."""
        if not self.table.differentiable:
            raise ValueError(self.table.reason)
        if reference not in REFERENCES:
            raise ValueError(f"reference={reference!r} is not known; allowed are None, 'exact' and 'uniform'.")
        scored.check_settings(self.settings)
        if states.device != self.denoiser.device:
            raise ValueError(f"{name} on {states.device} and the UNet on {self.denoiser.device}: call .to(...) first.")
        if torch.is_grad_enabled() and states.is_inference():
            raise ValueError(
                f"{name} was sampled under torch.inference_mode, whose tensors no gradient can pass: sample under "
                "torch.no_grad() instead (or with backprop_steps=0), or re-score under torch.no_grad()."
            )
        if states.dtype != self.denoiser.state_dtype:
            raise ValueError(
                f"{name}'s states are {states.dtype} and this UNet's would be "
                f"{self.denoiser.state_dtype}; re-score with a UNet of the dtype that sampled."
            )

    def _check_stochastic(self, steps: Tensor, settings: Mapping[str, Any]) -> None:
        """Raises unless each of these steps is one of a chain of `settings`, and has noise."""
        stochastic = self._stochastic(settings)
        for step in sorted(set(steps.flatten().tolist())):
            if not 0 <= step < len(stochastic):
                raise IndexError(f"steps holds {step}; the chain had steps 0 to {len(stochastic) - 1}.")
            if not stochastic[step]:
                possible = [index for index, noisy in enumerate(stochastic) if noisy]
                advice = "sample with eta > 0" if self.table.eta is not None else "sample with DDIM and eta > 0"
                advice = f"steps with noise are {_spans(possible)}" if possible else advice
                raise ValueError(
                    f"steps holds {step}, which is deterministic (sigma = 0) and has no log-probability; {advice}."
                )

    def _transition(self, x: Tensor, next_x: Tensor, steps: Tensor) -> Transition:
        """Step steps[n] (N,) from x[n] to next_x[n] (N, C, h, w), all on one device."""
        table = self._on(x.device, len(self.table), "latents")
        return Transition(
            x=x,
            next_x=next_x,
            steps=steps,
            t=table.timesteps[steps],
            coefficients=table.coefficients[steps],
            input_scales=None if table.input_scales is None else table.input_scales[steps],
        )

    def _scores(
        self,
        columns: Sequence[Transition],
        conditioning: Conditioning,
        settings: Mapping[str, Any],
        reference: str | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities and divergences (N, S) of S transitions of N rows each, which share their conditioning."""
        joined = conditioning.joined()
        parameters = self.denoiser.trainable() if torch.is_grad_enabled() else {}
        leaves = [*joined.values(), *parameters.values()]
        rescore = Rescore(
            denoiser=self.denoiser,
            transitions=columns,
            timesteps=self._on(columns[0].x.device, settings["steps_taken"], "latents").timesteps,
            guided=self.guided,
            names=list(joined),
            parameters=parameters,
            reference=reference,
        )
        if not torch.is_grad_enabled():
            scores, _, _ = rescore.forward(leaves)
        else:
            _check_differentiable(leaves, leaves)
            run = rescore.direct if len(columns) == 1 else lambda leaves: replay.run(rescore, leaves)
            scores = self.denoiser.synchronised(lambda: run(leaves))
        return scores[0], None if reference is None else scores[1]


def _is_finite(value: object) -> bool:
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _draw(shape: Sequence[int], generator: torch.Generator | Sequence[torch.Generator] | None, like: Tensor) -> Tensor:
    generator = list(generator) if isinstance(generator, Sequence) else generator
    return randn_tensor(tuple(shape), generator=generator, device=like.device, dtype=like.dtype)


def _check_differentiable(reached: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """Raises ValueError unless something that the gradient reaches requires it, and everything can be saved for it."""
    if not any(tensor.requires_grad for tensor in reached):
        raise ValueError(
            "a gradient is asked for (grad mode is on), but nothing that it reaches requires grad: add an adapter with "
            "unet.add_adapter(LoraConfig(...)), or unet.requires_grad_(True); to run without a gradient use "
            "torch.no_grad(), or sample with backprop_steps=0."
        )
    if any(tensor.is_inference() for tensor in leaves):
        raise ValueError(
            "latents or embeddings were made under torch.inference_mode, whose tensors no gradient can pass: make them "
            "under torch.no_grad() instead."
        )


def _spans(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
