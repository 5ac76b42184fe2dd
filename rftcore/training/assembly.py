"""A run's parts, put together from its config: the model and what is trained of it, the algorithm, the evaluation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import DiffusionPipeline
from torch import nn

from rftcore import blocks, rewards
from rftcore.errors import UsageError
from rftcore.training import memory_plan, pipeline, trackers, weights
from rftcore.training.accounting import Stopwatch
from rftcore.training.batches import SamplePlan
from rftcore.training.checkpoint import Trained
from rftcore.training.compilation import compile_unet
from rftcore.training.config import ModelConfig, RunConfig
from rftcore.training.ema import Ema
from rftcore.training.engine import Engine
from rftcore.training.evaluation import early_stop, scale_sweep
from rftcore.training.evaluation.validation import Validation
from rftcore.training.methods import METHODS, Method
from rftcore.training.models import usage
from rftcore.training.optimization import make_lr_scheduler, make_optimizer
from rftcore.training.prompt_inputs import encode_prompts
from rftcore.training.run_directory import RunDirectory

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Assembly:
    """What `assemble` made. The model that was fine-tuned is named by `base_model`, and made by `base_lines` of Python."""

    engine: Engine
    method: Method
    validation: Validation
    trained: Trained
    base_model: str
    base_lines: str


def load_judges(
    config: RunConfig, reward: Callable | None, held_out_reward: Callable | Sequence[Callable] | None
) -> list[rewards.Reward]:
    """The trained reward and the held-out judges, all of other names.

    Raises: UsageError where two have the same name, options are of a reward that is not there, or the evaluation is
        asked what it cannot do with them.
    """
    held_out = held_out_reward or config.eval.held_out_reward or []
    specs: list[Any] = (
        list(held_out) if isinstance(held_out, Sequence) and not isinstance(held_out, str) else [held_out]
    )
    unused = dict(config.reward.options)
    judges = [_trained_reward(reward or config.reward.function, config.reward.differentiable, unused)]
    # A judge is only measured: whether it has a gradient does not matter.
    judges += [rewards.load_judge(spec, options=_options_of(spec, unused)) for spec in specs]
    if unused:
        raise UsageError(
            f"reward.options has {', '.join(map(repr, unused))}, and no reward of the run has that name; name a reward as "
            "reward.function or eval.held_out_reward does"
        )
    trained = {judges[0].name, *judges[0].parts}
    seen = set(trained)
    for judge in judges[1:]:
        if judge.name in seen:
            kinds = "the trained and a held-out reward" if judge.name in trained else "two held-out rewards"
            raise UsageError(
                f"{kinds} are both named {judge.name!r}; a held-out judge must be another function, with a name of its "
                "own"
            )
        seen.add(judge.name)
    early_stop.check(config.eval, judges[1:])
    scale_sweep.check(config.eval)
    return judges


def _trained_reward(
    spec: str | Callable | Mapping[str, float], differentiable: bool | None, unused: dict[str, dict[str, Any]]
) -> rewards.Reward:
    """One reward, or the weighted sum of several; takes their options out of `unused`."""
    if not isinstance(spec, Mapping):
        return rewards.load(spec, differentiable=differentiable, options=_options_of(spec, unused))
    load = functools.partial(rewards.load, differentiable=differentiable)
    return rewards.weighted_sum(
        [(load(name, options=_options_of(name, unused)), weight) for name, weight in spec.items()]
    )


def _options_of(spec: str | Callable, unused: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return unused.pop(spec, {}) if isinstance(spec, str) else {}


def start_accelerator(config: RunConfig) -> Accelerator:
    log_with = trackers.names(config.report_to)
    try:
        return Accelerator(
            mixed_precision=config.mixed_precision,
            log_with=log_with or None,
            project_config=ProjectConfiguration(
                project_dir=config.output_dir, logging_dir=str(RunDirectory(config.output_dir).path / "logs")
            ),
        )
    except (ImportError, ValueError) as error:
        raise UsageError(f"accelerate cannot start with mixed_precision={config.mixed_precision}: {error}") from error


def assemble(
    config: RunConfig,
    accelerator: Accelerator,
    judges: Sequence[rewards.Reward],
    *,
    train_prompts: Sequence[str],
    validation_prompts: Sequence[str],
    given: DiffusionPipeline | None = None,
    memory: memory_plan.Memory | None = None,
) -> Assembly:
    """Loads the model, attaches what is trained, and builds the rest round it.

    Args:
        judges: the trained reward first.
        given: a pipeline instead of `config.model`.
        memory: what the chains are planned with, where an earlier part of the run has settled it.

    Raises:
        UsageError: for a model, or settings of it, that cannot be served.
    """
    device = accelerator.device
    if given is None:
        pipe = pipeline.load(config.model, DTYPES[config.mixed_precision], weights.master_dtype(config))
    else:
        pipe = given
        pipeline.check_given(pipe, config.model)
    pipeline.check_sampling(pipe, config.sampling)
    if pipeline.unconditional(pipe):
        # Rewards are still given a text for each image.
        train_prompts = validation_prompts = [""]
    vae, sample_size = pipeline.vae(pipe), pipeline.sample_size(pipe, config.sampling)
    model = config.model if given is None else ModelConfig(str(pipe.name_or_path))
    prompts = [*train_prompts, *validation_prompts]
    inputs = encode_prompts(
        pipe, prompts, config.sampling.negative_prompt, device, sample_size, config.sampling.clip_skip
    )
    weights.attach(pipe, config, config.seed)
    if config.memory.accelerate:
        for part in (pipe.unet, vae):
            if part is not None:
                blocks.accelerate(part)
    # Before the chains' memory is planned.
    judges = [judge.to(device) for judge in judges]
    optimizer = make_optimizer(config.train, weights.trainable(pipe.unet).values(), device)
    # Not prepared: accelerate would step it once for every process.
    lr_scheduler = make_lr_scheduler(config.train, optimizer)
    unet, optimizer = accelerator.prepare(pipe.unet, optimizer)
    engine = Engine(
        accelerator=accelerator,
        unet=unet,
        vae=None if vae is None else vae.to(device).requires_grad_(False).eval(),
        scheduler=pipeline.scheduler(pipe, config.sampling),
        inputs=inputs,
        plan=SamplePlan(train_prompts, config.train.samples_drawn, config.seed),
        sample_size=sample_size,
        reward=judges[0],
        config=config,
        clock=Stopwatch(device),
        memory=memory or _settled_memory(config, accelerator, unet),
    )
    if config.memory.compile:
        compile_unet(engine)
    method, decay = METHODS[config.algorithm](engine), config.train.ema_decay
    ema = None if decay is None else Ema(weights.trainable(engine.model).values(), decay)
    return Assembly(
        engine=engine,
        method=method,
        validation=Validation(engine, method.sampler, validation_prompts, judges),
        trained=Trained(engine.model, optimizer, lr_scheduler, method, accelerator.scaler, ema),
        base_model=model.pretrained_model_name_or_path,
        base_lines=usage.lines(model, type(pipe)),
    )


def _settled_memory(config: RunConfig, accelerator: Accelerator, unet: nn.Module) -> memory_plan.Memory:
    # AdamW's two moments come with the first step.
    moments = sum(2 * weight.nbytes for weight in weights.trainable(accelerator.unwrap_model(unet)).values())
    return memory_plan.settled(config, accelerator.device, moments)
