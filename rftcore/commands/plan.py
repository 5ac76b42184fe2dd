"""`rftcore plan`: the memory plan of a chain of a named model, on any machine, without weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from rftcore import published
from rftcore.blocks import accelerate
from rftcore.blocks.budget import bytes_of, text_of
from rftcore.commands.plan_options import ATTENTION, DTYPES, OPTIMIZERS, PlanOptions
from rftcore.commands.plan_reward import REWARDS, reward_bytes
from rftcore.documents import from_json
from rftcore.errors import UsageError, nearest
from rftcore.sampling.conditioning import Conditioning
from rftcore.sampling.denoiser import Denoiser
from rftcore.sampling.gradient_path import GradientPath
from rftcore.sampling.plan import Plan
from rftcore.sampling.planner import Planner
from rftcore.sampling.simulation import Simulation, decoding

# The decoder's levels, from the one of the fewest FLOPs.
_DECODER_LEVELS = ("none", "block")
# What a run leaves of its budget to decoding where it is told neither.
_RESERVE = 2 * 2**30


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a training step takes.

    Attributes:
        size: of an image, in pixels.
        plan: of the chain, as the sampler makes it under the memory_budget `plan.budget`.
        held: bytes on the device by what they are for, all the time.
        taken: bytes by what they are for, during the step; not all of them are there at the same time.
        peak_bytes: on the device.
        decoder_level: what the decoder makes again.
        flops: of the step, decoding included and the reward not.
        largest_batch: that fits, where every step is replayed one image at a time; 0 for a recipe, which has its own.
        largest_k: how many steps of this batch can be stored, where that is fewer FLOPs than replaying some or not;
            likewise.
    """

    size: int
    plan: Plan
    held: dict[str, int]
    taken: dict[str, int]
    peak_bytes: int
    decoder_level: str
    flops: int
    largest_batch: int
    largest_k: int


class _Model(NamedTuple):
    """Configs of a pipeline's models, and the number of its text tokens."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    tokens: int


def predict(options: PlanOptions) -> Prediction:
    """The plan that fits, and what it takes. Raises: UsageError."""
    model = _model(options.model or "")
    dtype = getattr(torch, DTYPES[options.dtype])
    unet, (vae, _) = _unet(model, options, dtype), published.autoencoder(model.vae, dtype)
    accelerate(unet)
    accelerate(vae)
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    pixels = options.resolution or unet.config.sample_size * scale
    if pixels % scale:
        raise UsageError(f"--resolution {pixels} must be a multiple of {scale}, the autoencoder's scale")
    held = _held(unet, vae, options, pixels)
    size, denoiser = pixels // scale, Denoiser(unet)
    try:
        given = Conditioning(published.conditioning(unet, 1, model.tokens))
    except ValueError as error:
        raise UsageError(f"--model {options.model}: {error}") from error
    conditioning = denoiser.told(given, options.guidance_scale).positive
    simulation = Simulation(denoiser, conditioning, size, size, guided=denoiser.guided(options.guidance_scale))
    planner = Planner(
        simulation, options.batch, GradientPath.last(options.backprop_steps, options.steps).effective_modes
    )
    device = None if options.device_memory is None else _bytes("--device-memory", options.device_memory)
    # A run says its budget, or takes what is free, and leaves the decoder as it is.
    beside = None if device is None else device - sum(held.values())
    as_run = beside is None or options.memory_budget is not None or options.recipe is not None
    levels = _DECODER_LEVELS if planner.steps and not as_run else _DECODER_LEVELS[:1]
    images, gradient = min(options.images_per_call, options.batch), bool(planner.steps)
    decoders = {level: decoding(vae, size, size, images=images, level=level, gradient=gradient) for level in levels}

    plans: dict[str, Plan] = {}
    if beside is None or as_run:
        available, reserve = _settled(options, beside)
        # Only what waits for its backward is in the way of decoding.
        reserve = reserve if planner.steps else 0
        reserves = dict.fromkeys(levels, reserve)
        try:
            plans[levels[0]] = planner.plan(available, reserve)
        except ValueError as error:
            raise UsageError(f"--{error}") from error
    else:
        available = beside
        reserves = {level: step.peak for level, step in decoders.items()}
        plans = {level: plan for level in levels if (plan := _fitted(planner, available, reserves[level])) is not None}
        if not plans:
            raise UsageError(_too_small(options, planner, held, min(reserves.values())))
    flops = {
        level: plan.flops
        + math.ceil(options.batch / images) * (decoders[level].forward_flops + decoders[level].backward_flops)
        for level, plan in plans.items()
    }
    level = min(plans, key=flops.__getitem__)
    plan, decode = plans[level], decoders[level].peak
    taken = {
        "states and noise": planner.fixed,
        "stored steps": plan.stored_bytes,
        "beside them, at the chain's peak": plan.peak_bytes - plan.stored_bytes - planner.fixed,
        f"or, after the chain, decoding {'an image' if images == 1 else f'{images} images'}": decode,
    }
    peak = max(plan.peak_bytes, planner.fixed + plan.stored_bytes + decode)
    if options.trained_at_once or options.samples:
        states, step = _scored_again(simulation, conditioning, options)
        taken |= {"states of an epoch": states, "or, a step that is scored again": step}
        # They are joined once all are there: for a moment there are two of each.
        peak = max(states + peak, 2 * states, states + step)
    if options.evaluated_at_once:
        # States, their stack, and what a step has besides, as the planner counts them.
        states = (2 * options.steps + 6) * simulation.latent_bytes(options.evaluated_at_once)
        taken["or, at another time, evaluating"] = states + simulation.forward(options.evaluated_at_once).peak
        peak = max(peak, taken["or, at another time, evaluating"])
    peak += sum(held.values())
    if device is not None and peak > device:
        raise UsageError(
            f"--device-memory {options.device_memory} is too small: {text_of(peak)} are predicted, of which "
            f"{text_of(sum(held.values()))} are weights, optimizer, reward and context, and the chain's budget is "
            f"{text_of(available)}; make the budget, the batch or the resolution smaller"
        )
    return Prediction(
        size=pixels,
        plan=plan,
        held=held,
        taken=taken,
        peak_bytes=peak,
        decoder_level=level,
        flops=flops[level],
        largest_batch=0 if options.recipe else _largest_batch(planner, available, min(reserves.values())),
        largest_k=min(options.steps, planner.longest(available, reserves[level]))
        if planner.steps and not options.recipe
        else 0,
    )


def describe(options: PlanOptions, prediction: Prediction) -> str:
    """The prediction for people."""
    plan = prediction.plan
    rows = [*prediction.held.items(), *prediction.taken.items(), ("predicted peak", prediction.peak_bytes)]
    width = max(len(name) for name, _ in rows)
    guided = "guided" if options.guidance_scale != 1.0 else "not guided"
    policy = bool(options.trained_at_once or options.samples)
    uncounted = "the CUDA context, and what" if options.context_memory == "0" else "what"
    lines = [
        *([options.recipe] if options.recipe else []),
        f"{options.model}, {prediction.size} px, {guided}, LoRA of rank {options.rank} on {' '.join(options.target)}, "
        f"{options.dtype}",
        *str(plan).split("; "),
        "",
        *(f"{name:<{width}}  {text_of(size):>10}" for name, size in rows if size or name == "predicted peak"),
        f"not counted: {uncounted} the allocator cannot use of what it has reserved",
        "",
    ]
    if policy:
        lines.append(f"FLOPs: {prediction.flops / 1e12:.1f} T to sample and decode {options.batch} images")
        return "\n".join(lines)
    lines.append(
        f"FLOPs: {prediction.flops / 1e12:.1f} T a training step; decoder and gradients included, the reward not"
    )
    if options.recipe:
        return "\n".join(lines)
    stored = f"; {prediction.largest_k} of {options.steps} steps of this batch without replay"
    lines += [
        f'use: CheckpointedSampler(..., memory_budget="{(plan.budget or 0) // 2**20}MiB"), '
        f'rftcore.accelerate(vae, recompute="{prediction.decoder_level}")',
        f"fits at most: a batch of {prediction.largest_batch} (steps replayed, an image at a time)"
        + (stored if plan.differentiated else ""),
    ]
    return "\n".join(lines)


def _model(name: str) -> _Model:
    """Raises: UsageError for a name that is not known and no folder of a pipeline."""
    if name in published.UNETS:
        return _Model(published.UNETS[name], published.AUTOENCODER, published.TOKENS)
    folder = Path(name)
    if not folder.is_dir():
        raise UsageError(
            f"--model {name} is no known model and no folder; {nearest(name, published.UNETS)} "
            f"({', '.join(published.UNETS)}, or a diffusers pipeline's folder)"
        )
    configs: dict[str, dict[str, Any]] = {}
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
        config = _config(folder / part / "config.json")
        if config is None:
            raise UsageError(f"--model {name}: there is no {part}/config.json; give the folder of a diffusers pipeline")
        if (found := config.get("_class_name", kind.__name__)) != kind.__name__:
            raise UsageError(f"--model {name}: its {part} is a {found}; a {kind.__name__} is served")
        configs[part] = config
    text_encoder = _config(folder / "text_encoder" / "config.json") or {}
    return _Model(**configs, tokens=text_encoder.get("max_position_embeddings", published.TOKENS))


def _config(path: Path) -> dict[str, Any] | None:
    try:
        return from_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"--model: {path} cannot be read: {error}") from error


def _unet(model: _Model, options: PlanOptions, dtype: torch.dtype) -> UNet2DConditionModel:
    targets = [name for target in options.target for name in (published.ATTENTION if target == ATTENTION else [target])]
    try:
        return published.unet(model.unet, torch.float32, options.rank, targets, dtype)[0]
    except ValueError as error:
        raise UsageError(f"--target {' '.join(options.target)}: {error}") from error


def _held(unet: UNet2DConditionModel, vae: AutoencoderKL, options: PlanOptions, pixels: int) -> dict[str, int]:
    count = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    return {
        "UNet": sum(p.nbytes for p in unet.parameters() if not p.requires_grad),
        "autoencoder": sum(p.nbytes for p in vae.parameters()),
        "LoRA": 4 * count,
        "its gradients": 4 * count,
        f"{options.optimizer}'s state": OPTIMIZERS[options.optimizer] * count,
        "reward": _reward(options, pixels),
        "context": _bytes("--context_memory", options.context_memory),
    }


def _reward(options: PlanOptions, pixels: int) -> int:
    """Raises: UsageError for a reward of which nothing is known."""
    names = options.reward_memory.split("+")
    if names[0][:1].isdigit():
        return _bytes("--reward_memory", options.reward_memory)
    if unknown := [name for name in names if name not in REWARDS]:
        raise UsageError(
            f"--reward_memory {options.reward_memory} must be a number of bytes with its unit, such as 2GiB, or names of "
            f"{', '.join(REWARDS)}; of {unknown[0]} nothing is known"
        )
    gradient = options.backprop_steps != 0
    return sum(reward_bytes(name, pixels, options.images_per_call, gradient=gradient) for name in names)


def _settled(options: PlanOptions, free: int | None) -> tuple[int, int]:
    """A run's memory.budget and memory.reserve, which follow from what is free where they are not said."""
    if options.memory_budget is not None:
        budget = _bytes("--memory_budget", options.memory_budget)
        return budget, 0 if options.reserve is None else _bytes("--reserve", options.reserve)
    budget = max(0, free or 0)
    return budget, min(_RESERVE, budget // 2) if options.reserve is None else _bytes("--reserve", options.reserve)


def _scored_again(simulation: Simulation, conditioning: Mapping[str, Tensor], options: PlanOptions) -> tuple[int, int]:
    """Bytes of an epoch's states and texts, and of a step that is scored again with a gradient."""
    # Of both branches, whether there are two or not.
    texts = 2 * sum(tensor.nbytes for tensor in conditioning.values())
    sample = (options.steps + 1) * simulation.latent_bytes(1) + texts
    made = simulation.constants(options.trained_at_once, options.steps)
    step = simulation.step(options.trained_at_once, None).peak if options.trained_at_once else 0
    return options.samples * sample, made.kept + made.peak + step


def _bytes(flag: str, text: str) -> int:
    """Raises: UsageError."""
    if text == "0":
        return 0
    try:
        return bytes_of(text)
    except ValueError as error:
        raise UsageError(f"{flag} {text} must be a number of bytes with its unit, such as 24GiB") from error


def _fitted(planner: Planner, available: int, reserve: int) -> Plan | None:
    """The plan of the largest budget under which the chain fits, and the stored steps beside the decoding."""
    budget = available
    while budget > 0:
        try:
            plan = planner.plan(budget)
        except ValueError:
            return None
        excess = planner.fixed + plan.stored_bytes + reserve - available
        if excess <= 0:
            return plan
        if not plan.stored_bytes:
            return None
        budget -= excess
    return None


def _too_small(options: PlanOptions, planner: Planner, held: dict[str, int], reserve: int) -> str:
    least = planner.least(reserve)
    part = max(least, key=least.__getitem__)
    return (
        f"--device-memory {options.device_memory} is too small: weights, optimizer and reward take "
        f"{text_of(sum(held.values()))} and {part} of {options.batch} images {text_of(least[part])} more, together "
        f"{text_of(sum(held.values()) + least[part])}; make --batch or --resolution smaller"
    )


def _largest_batch(planner: Planner, available: int, reserve: int) -> int:
    """How many images fit where each step is replayed, one image at a time."""
    simulation, batch, made = planner.simulation, planner.batch, planner.constants
    fixed, trained = planner.fixed / batch, simulation.trained_bytes if planner.steps else 0
    # Each part's bytes are a line in the number of images.
    more = max(2, batch)
    one, many = (simulation.forward(images).peak for images in (1, more))
    slope = (many - one) / (more - 1)
    lines = [(one - slope, slope + fixed), (reserve, fixed), (trained, (made.sums + made.peak) / batch + fixed)]
    if planner.steps:
        # Of one image, as a share of the whole batch's.
        replay = min(planner.step(count).peak for count in (0, planner.most)) / batch
        lines.append((trained + replay + made.kept / batch, (made.sums + made.wanted) / batch + fixed))
    return max(0, math.floor(min((available - constant) / growth for constant, growth in lines)))
