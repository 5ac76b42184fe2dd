"""Twenty steps in other ways are the same twenty steps: batches in parts, replayed chains, rftcore's own blocks.

One run is everybody's reference, in fp64 and in fp32; each way is one run more. Bounds are relative, of the final LoRA in
the Frobenius norm: 1e-11 in fp64, 1e-5 in fp32.
"""

import functools
import json

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline

from rftcore.training import Trainer, weights
from rftcore.training.algorithm_configs import DdpoConfig
from rftcore.training.parsing import build

BOUNDS = {torch.float64: 1e-11, torch.float32: 1e-5}
STOCK = {"accelerate": False}
# Another number of parts is another shape of every matrix product; a budget of a few steps replays the others.
WAYS = {
    "accumulated": ({"gradient_accumulation_steps": 4}, STOCK),
    "replayed": ({}, STOCK | {"budget": "1.5MiB"}),
    "accelerated": ({}, {}),
    "accelerated and replayed": ({}, {"budget": "1MiB"}),
}


def run(model, folder, dtype, algorithm, train, memory):
    """The final LoRA, flat, and the run's metrics."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, safety_checker=None).to(dtype)
    values = tiny.values(
        model,
        folder,
        train={"max_train_steps": 20, "batch_size": 4, "learning_rate": 1e-3, **train},
        sampling={"num_inference_steps": 2, "eta": 1.0},
        memory=memory,
        eval={"lora_scales": [], "held_out_reward": None, "validation_prompts": tiny.HELD_OUT_PROMPTS[:1]},
    )
    if algorithm == "ddpo":
        del values["train"]["backprop_steps"]
        values["train"]["samples_per_epoch"] = 4
        trainer = Trainer(build(DdpoConfig, values), pipeline=pipeline)
    else:
        trainer = Trainer(tiny.config(model, folder, **values), pipeline=pipeline)
    trainer.train()
    trained = weights.trainable(trainer.engine.model)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.cat([weight.detach().flatten() for weight in trained.values()]), lines


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory):
    """Stock blocks, every step stored, each batch in one piece."""

    @functools.cache
    def get(dtype, algorithm):
        return run(model, tmp_path_factory.mktemp("reference") / "run", dtype, algorithm, {}, STOCK)

    return get


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "way"),
    [
        *((torch.float64, way) for way in ("accumulated", "replayed", "accelerated")),
        *((torch.float32, way) for way in ("accumulated", "accelerated and replayed")),
    ],
    ids=str,
)
def test_draft(model, tmp_path, reference, dtype, way):
    lora, lines = run(model, tmp_path / "run", dtype, "draft", *WAYS[way])
    expected, expected_lines = reference(dtype, "draft")
    assert lora.dtype == expected.dtype == dtype
    assert torch.linalg.norm(lora - expected) <= BOUNDS[dtype] * torch.linalg.norm(expected)
    if "replayed" in way:
        # It was another computation: the differentiated steps ran twice.
        assert lines[-2]["count/unet_evaluations"] > expected_lines[-2]["count/unet_evaluations"]


@pytest.mark.slow
def test_ddpo_accumulated(model, tmp_path, reference):
    lora, _ = run(model, tmp_path / "run", torch.float64, "ddpo", *WAYS["accumulated"])
    expected, _ = reference(torch.float64, "ddpo")
    assert torch.linalg.norm(lora - expected) <= 1e-11 * torch.linalg.norm(expected)
