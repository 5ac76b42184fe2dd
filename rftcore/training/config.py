"""What a run can be told: plain dataclasses with diffusers' names. Imports no torch, so that `--help` is instant."""

from __future__ import annotations

import dataclasses
import math
import operator
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rftcore.errors import UsageError
from rftcore.rewards import option_types

# A bound's name -> how it is said, and its test.
_BOUNDS = {
    "at_least": ("at least", operator.ge),
    "above": ("greater than", operator.gt),
    "at_most": ("at most", operator.le),
    "below": ("less than", operator.lt),
}


def option(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field with its help text and the bounds of its value; a mutable default is copied for every instance."""
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    metadata = {"help": help, "bounds": {name: bound for name, bound in bounds.items() if bound is not None}}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def group(kind: Callable[[], Any]) -> Any:
    """A dataclass field that holds a group of options."""
    return dataclasses.field(default_factory=kind)


@dataclass
class ModelConfig:
    """the pipeline that is fine-tuned"""

    pretrained_model_name_or_path: str = option(
        "rftcore.digits",
        "a Stable Diffusion, SDXL or unconditional DDPM pipeline: hub name, folder, one .safetensors or .ckpt file, or "
        "rftcore.digits",
    )
    revision: str | None = option(None, "revision on the hub")
    variant: str | None = option(None, "weight file variant, e.g. fp16")
    original_config: str | None = option(
        None,
        "for a checkpoint that is one file: the pipeline, hub name or folder, whose configs and tokenizers it is built "
        "with; null: what diffusers takes for its kind",
    )
    vae: str | None = option(
        None, "another VAE: hub name, folder or file, such as madebyollin/sdxl-vae-fp16-fix; null: the model's own"
    )
    fuse_lora: list[str] = option(
        [], "LoRAs (PATH or PATH:scale) that are merged into the weights before training, such as LCM-LoRA"
    )


@dataclass
class SamplingConfig:
    """how images are sampled, in training and in evaluation alike"""

    scheduler: Literal["ddim", "ddpm", "euler", "euler_ancestral", "lcm"] = option(
        "ddim", "built from the model's own scheduler config"
    )
    num_inference_steps: int = option(50, "sampling steps T", at_least=1)
    guidance_scale: float = option(7.5, "classifier-free guidance; 1.0 runs no negative branch", at_least=0)
    eta: float | None = option(
        None, "DDIM's noise level, 0 to 1; null: the scheduler's own (0 for DDIM)", at_least=0, at_most=1
    )
    negative_prompt: str = option("", "prompt of the negative branch")
    clip_skip: int | None = option(
        None, "layers of the text encoder that are left out at its end; null: none but the model's own", at_least=1
    )
    resolution: int | None = option(None, "image side in pixels; null: the model's own", at_least=1)


@dataclass
class TrainConfig:
    """the optimisation"""

    weights: Literal["lora", "full"] = option("lora", "what is trained: an adapter, or every weight of the UNet")
    max_train_steps: int = option(2000, "optimizer steps", at_least=1)
    batch_size: int = option(
        4, "samples in one optimizer step, over all processes and accumulation steps together", at_least=1
    )
    gradient_accumulation_steps: int = option(
        1, "parts that each process's share of the batch is computed in: less memory, same gradient", at_least=1
    )
    learning_rate: float = option(4e-4, "AdamW's step size", above=0)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = option("constant", "diffusers' schedules; those that decay reach their end at max_train_steps")
    lr_warmup_steps: int = option(0, "optimizer steps of linear warm-up (not for lr_scheduler constant)", at_least=0)
    lr_num_cycles: int = option(1, "restarts of lr_scheduler cosine_with_restarts", at_least=1)
    lr_power: float = option(1.0, "of lr_scheduler polynomial", above=0)
    use_8bit_adam: bool = option(False, "AdamW with 8-bit moments, by bitsandbytes")
    adam_beta1: float = option(0.9, "AdamW", at_least=0, below=1)
    adam_beta2: float = option(0.999, "AdamW", at_least=0, below=1)
    adam_weight_decay: float = option(0.1, "AdamW", at_least=0)
    adam_epsilon: float = option(1e-8, "AdamW", above=0)
    max_grad_norm: float | None = option(1.0, "gradient norm is clipped to this; null: not clipped", above=0)
    ema_decay: float | None = option(
        None,
        "an exponential moving average of the trained weights is evaluated and saved; null: none",
        at_least=0,
        below=1,
    )

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps from one sampling to the next."""
        return 1

    @property
    def samples_drawn(self) -> int:
        """New samples of an epoch, over all processes."""
        return self.batch_size

    def problems(self, sampling: SamplingConfig) -> list[str]:
        """What only an algorithm's own options can have wrong; its general ones are the run's to check."""
        return []


@dataclass
class LoraConfig:
    """the adapter on the UNet (PEFT)"""

    rank: int = option(8, "LoRA rank", at_least=1)
    alpha: float | None = option(None, "LoRA scale is alpha / rank; null: rank, a scale of 1", above=0)
    target_modules: list[str] = option(
        ["to_q", "to_k", "to_v", "to_out.0"], "names, or endings of names, of the adapted modules"
    )


@dataclass
class MemoryConfig:
    """what the sampling chain may take, and by which means it is fast"""

    budget: str | None = option(
        None, "what a chain and its backward may take beyond the model, such as 8GiB; null: what is free on the device"
    )
    reserve: str | None = option(
        None,
        "what budget: null leaves to decoding and the reward; null: 2GiB, or half of what is free where that is less",
    )
    accelerate: bool = option(True, "rftcore's blocks in the UNet and the VAE; false: diffusers' own")
    capture: bool = option(True, "on CUDA, chains are captured and launched as graphs")
    compile: bool = option(False, "the UNet is run through torch.compile")


@dataclass
class RewardConfig:
    """what is maximised"""

    function: str | dict[str, float] = option(
        "digits",
        "a known name, module.function of your own: (images, prompts, metadata) -> tensor (B,), or several of them with "
        "their weights, whose weighted sum is maximised: {pickscore: 10, aesthetic: 0.05}",
    )
    options: dict[str, dict[str, Any]] = option(
        {},
        "what rewards, held-out ones too, are made with, by their names: {aesthetic: {model: FOLDER}}",
    )
    differentiable: bool | None = option(
        None, "declares it for a function that carries no `differentiable` attribute of its own"
    )
    images_per_call: int = option(
        1, "images decoded and scored at once: fewer need less memory, more are faster", at_least=1
    )
    on_nan: Literal["stop", "drop"] = option(
        "stop", "where the reward of a sample is NaN or inf: stop the run, or drop that sample and count it"
    )


@dataclass
class EvalConfig:
    """what is measured before, during and after, always from the same noise"""

    held_out_reward: str | list[str] | None = option(
        None, "judges that are never trained on: known names or module.function; null: none"
    )
    validation_prompts: str | list[str] = option(
        "rftcore.digits.held_out_prompts", "prompts that are not trained on: as for `prompts`"
    )
    num_validation_images: int = option(4, "images for each validation prompt, each from a seed of its own", at_least=1)
    validation_steps: int | None = option(
        None, "also evaluate every so many steps; null: only before and after", at_least=1
    )
    batch_size: int = option(8, "images sampled at once on each process", at_least=1)
    seed: int = option(1000, "of the evaluation's noise, apart from the run's", at_least=0)
    lora_scales: list[float] = option(
        [0.0, 0.25, 0.5, 0.75, 1.0], "scales of the trained adapter that are compared at the end; empty: none"
    )
    early_stop_patience: int | None = option(
        None,
        "stops after so many evaluations in which the first held-out reward was not its best; null: never",
        at_least=1,
    )


@dataclass
class RunConfig:
    """What every algorithm's run is told."""

    algorithm: ClassVar[str]

    output_dir: str = option("output", "where everything the run makes is written")
    seed: int = option(0, "of adapter initialisation, noise, and prompt order", at_least=0)
    prompts: str | list[str] = option(
        "rftcore.digits.train_prompts",
        "training prompts: a known set, a .txt (one a line, # comments), .jsonl, .json, .csv or .tsv file, "
        "module.function, or a list",
    )
    prompt_template: str | None = option(
        None, 'text with {} where each training and validation prompt is put, such as "a photo of a {}"; null: none'
    )
    held_out_share: float | None = option(
        None,
        "share of `prompts` that is not trained on and is evaluated instead of eval.validation_prompts: those whose "
        "text's hash says so, the same in every run; null: none",
        above=0,
        below=1,
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "of the frozen weights; trained ones stay fp32")
    cpu_threads: int | None = option(
        None, "threads of torch's CPU arithmetic in this process; null: torch's own choice", at_least=1
    )
    report_to: str | list[str] | None = option(
        None, "trackers beside metrics.jsonl, by accelerate's names: tensorboard, wandb, ..."
    )
    push_to_hub: bool = option(False, "the result is uploaded to the hub at the end")
    hub_model_id: str | None = option(None, "repository on the hub; null: the name of output_dir")
    checkpointing_steps: int = option(500, "a resumable checkpoint every so many steps", at_least=1)
    checkpoints_total_limit: int | None = option(None, "older checkpoints are removed; null: none is", at_least=1)
    resume_from_checkpoint: str | None = option(None, '"latest" in output_dir, or the path of a checkpoint')
    model: ModelConfig = group(ModelConfig)
    sampling: SamplingConfig = group(SamplingConfig)
    train: TrainConfig = group(TrainConfig)
    lora: LoraConfig = group(LoraConfig)
    memory: MemoryConfig = group(MemoryConfig)
    reward: RewardConfig = group(RewardConfig)
    eval: EvalConfig = group(EvalConfig)

    def problems(self) -> list[str]:
        """Every value that cannot work, as a sentence that names it, what it is and what is allowed."""
        if found := _of_other_types(self):
            return found
        sampling, train, lora = self.sampling, self.train, self.lora
        found = _out_of_bounds(self)
        # With numbers out of bounds there is no arithmetic.
        countable = not any(problem.startswith(("train.", "sampling.")) for problem in found)
        if not self.output_dir.strip():
            found.append("output_dir is empty; give the folder that the run may write into")
        if sampling.eta is not None and sampling.scheduler != "ddim":
            found.append(
                f"sampling.eta={sampling.eta} is DDIM's; leave it null with sampling.scheduler={sampling.scheduler}"
            )
        if train.lr_scheduler == "constant" and train.lr_warmup_steps:
            found.append(
                f"train.lr_warmup_steps={train.lr_warmup_steps} has no effect with train.lr_scheduler=constant; "
                "choose constant_with_warmup or linear"
            )
        if self.memory.compile and self.memory.accelerate:
            found.append(
                "memory.compile=true with memory.accelerate=true: torch.compile does not look into rftcore's blocks, so "
                "that nothing is left to compile; set memory.compile=false, or memory.accelerate=false to have "
                "diffusers' own blocks compiled"
            )
        if not lora.target_modules:
            found.append("lora.target_modules is empty; name at least one module, such as to_q")
        found += train.problems(sampling) if countable else []
        return found or self._epoch_problems()

    def _epoch_problems(self) -> list[str]:
        """A run is a whole number of epochs: their sampling is what its checkpoints lie between."""
        steps, updates = self.train.max_train_steps, self.train.updates_per_epoch
        if steps % updates == 0:
            return []
        nearest = max(1, round(steps / updates)) * updates
        return [
            f"train.max_train_steps={steps} is no whole number of epochs of {updates} optimizer steps; the nearest that "
            f"is one is {nearest}"
        ]

    def validate(self) -> None:
        """Raises UsageError with every problem found, not only the first."""
        found = self.problems()
        if found:
            raise UsageError("; ".join(found))


def _of_other_types(config: Any, prefix: str = "") -> list[str]:
    """Every value of a config, and of its groups, that is not of its option's type: jsonargparse takes null for any."""
    found = []
    types = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, type_ = getattr(config, field.name), types[field.name]
        if dataclasses.is_dataclass(value):
            found += _of_other_types(value, f"{prefix}{field.name}.")
        elif not option_types.fits(value, type_):
            found.append(f"{prefix}{field.name}={value!r} must be {option_types.expected(type_)}")
    return found


def _out_of_bounds(config: Any, prefix: str = "") -> list[str]:
    """Every number of a config, and of its groups, that lies outside its option's bounds or is no number to count with."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found += _out_of_bounds(value, f"{prefix}{field.name}.")
            continue
        bounds = {} if value is None else field.metadata.get("bounds", {})
        if not all(_BOUNDS[name][1](value, bound) for name, bound in bounds.items()):
            allowed = " and ".join(f"{_BOUNDS[name][0]} {bound:g}" for name, bound in bounds.items())
            found.append(f"{prefix}{field.name}={value} must be {allowed}")
        elif not all(map(_is_usable, value if isinstance(value, list) else [value])):
            found.append(f"{prefix}{field.name}={value} must be finite, and below 2^63 where it is a whole number")
    return found


def _is_usable(value: Any) -> bool:
    if isinstance(value, int):
        return abs(value) < 2**63
    return not isinstance(value, float) or math.isfinite(value)
