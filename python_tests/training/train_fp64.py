"""Trains the tiny pipeline in fp64 for `accelerate launch`: model folder and output folder are the arguments."""

import sys

import tiny
import torch
from diffusers import StableDiffusionPipeline

from rftcore.training import Trainer


def main(model: str, output_dir: str) -> None:
    torch.set_num_threads(1)
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None).to(torch.float64)
    train = {"max_train_steps": 3, "batch_size": 4, "gradient_accumulation_steps": 2}
    # 3 images on 2 processes: uneven shares, to be put back in order.
    evaluation = {"validation_prompts": [*tiny.HELD_OUT_PROMPTS, tiny.TRAIN_PROMPTS[0]]}
    Trainer(tiny.config(model, output_dir, train=train, eval=evaluation), pipeline=pipeline).train()


if __name__ == "__main__":
    main(*sys.argv[1:])
