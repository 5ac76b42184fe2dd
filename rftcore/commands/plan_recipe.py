"""What `rftcore plan` has to be told of a run, read off its recipe. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from rftcore.errors import UsageError
from rftcore.training import recipes
from rftcore.training.config import RunConfig
from rftcore.training.parsing import load_config

# Bytes of a device that no tensor gets: the driver's context, libraries' workspaces, what the allocator rounds up.
CONTEXT = "0.7GiB"
_SERVED = ("draft", "ddpo")
_DTYPES = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}
# Of hub names, in lower case: what is in them -> the model, and its own resolution where that is not the model's.
_MODELS = {
    "xl": ("sdxl", None),
    "stable-diffusion-v1": ("sd15", None),
    "stable-diffusion-2-1-base": ("sd21", 512),
    "stable-diffusion-2-base": ("sd21", 512),
    "stable-diffusion-2": ("sd21", None),
    "sd-turbo": ("sd21", 512),
}


def options_of(recipe: str) -> dict[str, Any]:
    """The fields of `PlanOptions` that a recipe, by name or path, says, for one process.

    Raises: UsageError for a recipe that is not found or not sound, or a run that is not predicted.
    """
    config = load_config(_algorithm(recipe), recipe)
    model, resolution = _model(config.model.pretrained_model_name_or_path)
    sampling, train = config.sampling, cast(Any, config.train)  # of the algorithm's own class
    kept = [name for name, given in config.reward.options.items() if given.get("checkpointing") is False]
    if kept:
        raise UsageError(
            f"--recipe {recipe}: reward.options of {', '.join(kept)} has checkpointing: false, which is not predicted; "
            "leave it out"
        )
    if train.weights != "lora":
        raise UsageError(f"--recipe {recipe}: train.weights={train.weights} is not predicted; LoRA is")
    part = train.batch_size // train.gradient_accumulation_steps
    options = {
        "model": model,
        "resolution": sampling.resolution or resolution,
        "steps": sampling.num_inference_steps,
        "guidance_scale": sampling.guidance_scale,
        "rank": config.lora.rank,
        "target": list(config.lora.target_modules),
        "dtype": _DTYPES[config.mixed_precision],
        "optimizer": "adamw8bit" if train.use_8bit_adam else "adamw",
        "memory_budget": config.memory.budget,
        "reserve": config.memory.reserve,
        "reward_memory": _rewards(config),
        "images_per_call": config.reward.images_per_call,
        "evaluated_at_once": config.eval.batch_size,
        "context_memory": CONTEXT,
    }
    if config.algorithm == "draft":
        return options | {"batch": part, "backprop_steps": train.backprop_steps}
    if train.merged_rollouts:
        raise UsageError(f"--recipe {recipe}: train.merged_rollouts=true is not predicted; set it to false")
    rollout = {"batch": train.rollout_batch_size or part, "backprop_steps": 0}
    return options | rollout | {"trained_at_once": part, "samples": train.samples_per_epoch}


def _algorithm(recipe: str) -> str:
    name = recipe if recipe in recipes.names() else recipes.find(recipe).stem
    try:
        algorithm = recipes.algorithm(name)
    except ValueError:
        algorithm = None
    if algorithm not in _SERVED:
        whose = f"is {algorithm}'s" if algorithm else "does not say by its name whose it is"
        raise UsageError(
            f"--recipe {recipe} {whose}; those of {' and '.join(_SERVED)} are predicted, whose names begin so, such as "
            f"{_SERVED[0]}_mine.yaml"
        )
    return algorithm


def _model(name: str) -> tuple[str, int | None]:
    if Path(name).is_dir():
        return name, None
    for part, known in _MODELS.items():
        if part in name.lower():
            return known
    raise UsageError(
        f"--recipe: of model.pretrained_model_name_or_path={name!r} the shapes are not known; give it as a pipeline's "
        f"folder, or a name with one of {', '.join(_MODELS)} in it"
    )


def _rewards(config: RunConfig) -> str:
    function = config.reward.function
    return "+".join(function) if isinstance(function, Mapping) else function
