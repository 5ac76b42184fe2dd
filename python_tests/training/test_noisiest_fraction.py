"""Policy gradients that train on a part of the chain, from its noisiest step on."""

import json
from types import SimpleNamespace

import pytest
import tiny
import torch

from rftcore.training import Trainer
from rftcore.training.algorithm_configs import DdpoConfig, DpokConfig
from rftcore.training.methods.rollouts import trained_steps
from rftcore.training.parsing import build


@pytest.mark.parametrize(("fraction", "steps"), [(1.0, [0, 1, 2, 3]), (0.6, [0, 1, 2]), (0.4, [0, 1]), (0.01, [0])])
def test_steps_are_counted_from_the_noisiest_and_those_without_noise_left_out(fraction, steps):
    chain = SimpleNamespace(timesteps=torch.arange(5), stochastic=torch.tensor([True, True, True, True, False]))
    assert trained_steps(chain, fraction).tolist() == steps


@pytest.mark.parametrize(("kind", "trained"), [(DdpoConfig, {}), (DpokConfig, {"policy_steps": 1})])
def test_other_steps_are_not_evaluated(kind, trained, model, tmp_path):
    """The buffer of DPOK and the updates of DDPO hold 2 of 4 steps of 4 samples."""
    train = {
        "max_train_steps": 1,
        "samples_per_epoch": 4,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "backprop_steps": None,
        "learning_rate": 1e-3,
        "noisiest_fraction": 0.5,
        **trained,
    }
    values = tiny.values(model, tmp_path / "run", train=train, sampling={"num_inference_steps": 4, "eta": 1.0})
    del values["train"]["backprop_steps"]
    trainer = Trainer(build(kind, values))
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = next(line["count/unet_evaluations"] for line in lines if "count/unet_evaluations" in line)
    if kind is DdpoConfig:
        # 4 samples with 2 branches: 4 sampled steps, 2 trained ones
        assert evaluations == 4 * 2 * (4 + 2)
    else:
        assert len(trainer.method.buffer) == 4 * 2
        assert set(trainer.method.buffer.take(torch.arange(8))["steps"].tolist()) == {0, 1}
