"""What a run can be told: plain dataclasses with diffusers' names. Imports no torch, so that `--help` is instant."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from rftcore.training.errors import UsageError


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text; a mutable default is copied for every instance."""
    metadata = {"help": help}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def group(kind: type) -> Any:
    """A dataclass field that holds a group of options."""
    return dataclasses.field(default_factory=kind)


@dataclass
class ModelConfig:
    """the pipeline that is fine-tuned"""

    pretrained_model_name_or_path: str = option(
        "rftcore.digits", "a StableDiffusionPipeline: hub name, folder, or rftcore.digits (ships with the package)"
    )
    revision: str | None = option(None, "revision on the hub")
    variant: str | None = option(None, "weight file variant, e.g. fp16")


@dataclass
class SamplingConfig:
    """how images are sampled, in training and in evaluation alike"""

    scheduler: Literal["ddim", "ddpm", "euler", "euler_ancestral"] = option(
        "ddim", "built from the model's own scheduler config"
    )
    num_inference_steps: int = option(50, "sampling steps T")
    guidance_scale: float = option(7.5, "classifier-free guidance; 1.0 runs no negative branch")
    eta: float | None = option(None, "DDIM's noise level, 0 to 1; null: the scheduler's own (0 for DDIM)")
    negative_prompt: str = option("", "prompt of the negative branch")
    resolution: int | None = option(None, "image side in pixels; null: the model's own")


@dataclass
class TrainConfig:
    """the optimisation"""

    max_train_steps: int = option(2000, "optimizer steps")
    batch_size: int = option(4, "samples in one optimizer step, over all processes and accumulation steps together")
    gradient_accumulation_steps: int = option(
        1, "parts that each process's share of the batch is computed in: less memory, same gradient"
    )
    learning_rate: float = option(4e-4, "AdamW's step size")
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear"] = option(
        "constant", "constant, or linear decay to 0 at max_train_steps"
    )
    lr_warmup_steps: int = option(0, "optimizer steps of linear warm-up (not for lr_scheduler constant)")
    adam_beta1: float = option(0.9, "AdamW")
    adam_beta2: float = option(0.999, "AdamW")
    adam_weight_decay: float = option(0.1, "AdamW")
    adam_epsilon: float = option(1e-8, "AdamW")
    max_grad_norm: float | None = option(1.0, "gradient norm is clipped to this; null: not clipped")


@dataclass
class DraftTrainConfig(TrainConfig):
    """the optimisation"""

    backprop_steps: int | None = option(
        None, "K: the reward's gradient flows through the last K sampling steps; null: through all of them"
    )


@dataclass
class LoraConfig:
    """the adapter on the UNet (PEFT)"""

    rank: int = option(8, "LoRA rank")
    alpha: float | None = option(None, "LoRA scale is alpha / rank; null: rank, a scale of 1")
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


@dataclass
class RewardConfig:
    """what is maximised"""

    function: str = option(
        "digits", "a known name, or module.function of your own: (images, prompts, metadata) -> tensor (B,)"
    )
    differentiable: bool | None = option(
        None, "declares it for a function that carries no `differentiable` attribute of its own"
    )
    images_per_call: int = option(1, "images decoded and scored at once: fewer need less memory, more are faster")


@dataclass
class EvalConfig:
    """what is measured before, during and after, always from the same noise"""

    held_out_reward: str | None = option(
        None, "a judge that is never trained on: a known name or module.function; null: none"
    )
    validation_prompts: str | list[str] = option(
        "rftcore.digits.held_out_prompts", "prompts that are not trained on: as for `prompts`"
    )
    num_validation_images: int = option(4, "images for each validation prompt, each from a seed of its own")
    validation_steps: int | None = option(None, "also evaluate every so many steps; null: only before and after")
    batch_size: int = option(8, "images sampled at once on each process")
    seed: int = option(1000, "of the evaluation's noise, apart from the run's")


@dataclass
class RunConfig:
    """What every algorithm's run is told."""

    algorithm: ClassVar[str]

    output_dir: str = option("output", "where everything the run makes is written")
    seed: int = option(0, "of adapter initialisation, noise, and prompt order")
    prompts: str | list[str] = option(
        "rftcore.digits.train_prompts",
        "training prompts: a .txt (one a line, # comments) or .jsonl (key prompt) file, module.function, or a list",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = option("no", "of the frozen weights; LoRA weights stay fp32")
    cpu_threads: int | None = option(
        None, "threads of torch's CPU arithmetic in this process; null: torch's own choice"
    )
    report_to: Literal["tensorboard"] | None = option(None, "tracker, beside metrics.jsonl")
    checkpointing_steps: int = option(500, "a resumable checkpoint every so many steps")
    checkpoints_total_limit: int | None = option(None, "older checkpoints are removed; null: none is")
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
        sampling, train, lora, evaluation = self.sampling, self.train, self.lora, self.eval
        at_least_one = {
            "sampling.num_inference_steps": sampling.num_inference_steps,
            "sampling.resolution": sampling.resolution,
            "train.max_train_steps": train.max_train_steps,
            "train.batch_size": train.batch_size,
            "train.gradient_accumulation_steps": train.gradient_accumulation_steps,
            "lora.rank": lora.rank,
            "reward.images_per_call": self.reward.images_per_call,
            "eval.num_validation_images": evaluation.num_validation_images,
            "eval.validation_steps": evaluation.validation_steps,
            "eval.batch_size": evaluation.batch_size,
            "cpu_threads": self.cpu_threads,
            "checkpointing_steps": self.checkpointing_steps,
            "checkpoints_total_limit": self.checkpoints_total_limit,
        }
        positive = {
            "train.learning_rate": train.learning_rate,
            "train.adam_epsilon": train.adam_epsilon,
            "train.max_grad_norm": train.max_grad_norm,
            "lora.alpha": lora.alpha,
        }
        not_negative = {
            "seed": self.seed,
            "eval.seed": evaluation.seed,
            "train.lr_warmup_steps": train.lr_warmup_steps,
            "train.adam_weight_decay": train.adam_weight_decay,
            "sampling.guidance_scale": sampling.guidance_scale,
        }
        fractions = {"train.adam_beta1": train.adam_beta1, "train.adam_beta2": train.adam_beta2}
        found = [
            f"{key}={value} must be at least 1"
            for key, value in at_least_one.items()
            if value is not None and value < 1
        ]
        found += [
            f"{key}={value} must be greater than 0"
            for key, value in positive.items()
            if value is not None and not value > 0
        ]
        found += [f"{key}={value} must not be negative" for key, value in not_negative.items() if not value >= 0]
        found += [f"{key}={value} must lie in [0, 1)" for key, value in fractions.items() if not 0 <= value < 1]
        if not self.output_dir.strip():
            found.append("output_dir is empty; give the folder that the run may write into")
        if sampling.eta is not None and sampling.scheduler != "ddim":
            found.append(
                f"sampling.eta={sampling.eta} is DDIM's; leave it null with sampling.scheduler={sampling.scheduler}"
            )
        elif sampling.eta is not None and not 0 <= sampling.eta <= 1:
            found.append(f"sampling.eta={sampling.eta} must lie in [0, 1]")
        if train.lr_scheduler == "constant" and train.lr_warmup_steps:
            found.append(
                f"train.lr_warmup_steps={train.lr_warmup_steps} has no effect with train.lr_scheduler=constant; "
                "choose constant_with_warmup or linear"
            )
        if not lora.target_modules:
            found.append("lora.target_modules is empty; name at least one module, such as to_q")
        return found

    def validate(self) -> None:
        """Raises UsageError with every problem found, not only the first."""
        found = self.problems()
        if found:
            raise UsageError("; ".join(found))


@dataclass
class DraftConfig(RunConfig):
    """DRaFT (arXiv 2309.17400): the reward's own gradient, through the sampling chain."""

    algorithm: ClassVar[str] = "draft"

    train: DraftTrainConfig = group(DraftTrainConfig)

    def problems(self) -> list[str]:
        found = super().problems()
        backprop_steps, steps = self.train.backprop_steps, self.sampling.num_inference_steps
        if backprop_steps is not None and not 1 <= backprop_steps <= steps:
            found.append(
                f"train.backprop_steps={backprop_steps} must lie in [1, sampling.num_inference_steps={steps}], "
                "or be null for all of them"
            )
        return found


ALGORITHMS: dict[str, type[RunConfig]] = {kind.algorithm: kind for kind in (DraftConfig,)}


def batch_shares(config: RunConfig, processes: int) -> tuple[int, int]:
    """Samples of one optimizer step on each process, and of each of its accumulation parts.

    Raises: UsageError when the batch does not divide, with the nearest batch that does.
    """
    batch, accumulation = config.train.batch_size, config.train.gradient_accumulation_steps
    parts = processes * accumulation
    if batch % parts:
        nearest_batch = max(1, round(batch / parts)) * parts
        raise UsageError(
            f"train.batch_size={batch} does not divide into {processes} process(es) x "
            f"train.gradient_accumulation_steps={accumulation}; the nearest batch that does is {nearest_batch}"
        )
    return batch // processes, batch // parts
