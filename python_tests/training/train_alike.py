"""Trains the tiny pipeline by several algorithms in turn, in one dtype; several processes compare their gradients."""

from pathlib import Path

import tiny
import torch
from accelerate.utils import gather
from diffusers import StableDiffusionPipeline

from rftcore.training import Trainer
from rftcore.training.algorithm_configs import ALGORITHMS
from rftcore.training.parsing import build

STEPS = 5
DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
# Several updates an epoch, and places that other processes hold elsewhere, where an algorithm has them.
TRAIN = {
    "draft": {"backprop_steps": 2},
    "ddpo": {"samples_per_epoch": 20, "statistics_min_count": 3},
    "dpok": {"samples_per_epoch": 2, "policy_steps": 5, "buffer_size": 40, "value_batch_size": 8, "value_minibatches": 2},
    "rwr": {"samples_per_epoch": 4, "inner_epochs": 5},
}  # fmt: skip


def config(algorithm: str, model: str, output_dir: str):
    # 3 images on 2 processes: uneven shares, to be put back in order.
    evaluation = {"validation_prompts": [*tiny.HELD_OUT_PROMPTS, tiny.TRAIN_PROMPTS[0]], "lora_scales": []}
    sampling = {"eta": 0.0 if algorithm == "draft" else 1.0}
    values = tiny.values(model, output_dir, eval=evaluation, sampling=sampling, checkpointing_steps=STEPS)
    shared = {"max_train_steps": STEPS, "batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    values["train"] = shared | TRAIN[algorithm]
    return build(ALGORITHMS[algorithm], values)


def compare_gradients(trainer: Trainer, compared: list[int]) -> None:
    """Before each step of the optimizer, asserts that every process has this one's gradients, bit for bit."""

    def compare(optimizer, *_):
        own = torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]])
        for other in gather(own[None]):
            assert torch.equal(own, other) and bool(own.any())
        compared.append(len(own))

    trainer.optimizer.optimizer.register_step_pre_hook(compare)


def main(folder: Path, rank: int, model: str, dtype: str) -> None:
    for algorithm in TRAIN:
        pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None).to(DTYPES[dtype])
        trainer, compared = Trainer(config(algorithm, model, str(folder / algorithm)), pipeline=pipeline), []
        compare_gradients(trainer, compared)
        # It would leave the group of processes, which the next run needs.
        trainer.accelerator.end_training = trainer.accelerator.wait_for_everyone
        trainer.train()
        assert len(compared) == STEPS, compared
