"""Log-probabilities before the first update: rescored where another path made them, or the run ends."""

import dataclasses

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from by_hand import ValueByHand
from pairs import Pair

from rftcore.training import RunError, Trainer, weights
from rftcore.training.algorithm_configs import ALGORITHMS
from rftcore.training.methods import rollouts
from rftcore.training.parsing import build


def spoil(monkeypatch, algorithm, by):
    """Rollouts' log-probabilities are off, as another path than training's makes them."""

    def draw(*arguments, **options):
        rollout = rollouts.draw(*arguments, **options)
        trajectory = rollout.trajectory
        wrong = dataclasses.replace(trajectory, log_probs=trajectory.log_probs + by)
        return dataclasses.replace(rollout, trajectory=wrong)

    monkeypatch.setattr(f"rftcore.training.methods.{algorithm}.draw", draw)


@pytest.mark.parametrize("merged", [pytest.param(False, marks=pytest.mark.slow), True])
def test_ddpo_rescores_all_that_it_trains_on(model, tmp_path, monkeypatch, merged):
    """Log-probabilities of another path than training's have no part in any inner epoch."""
    spoil(monkeypatch, "ddpo", 1.0)
    train = {"samples_per_epoch": 4, "inner_epochs": 2, "timestep_fraction": 0.5, "rescore": True}
    pair = Pair(model, tmp_path, "ddpo", {**train, "merged_rollouts": merged})
    for _, expected in zip(pair.epoch(), pair.hand.ddpo(1, {}), strict=True):
        pair.check(expected)


DPOK = {"samples_per_epoch": 2, "batch_size": 5, "gradient_accumulation_steps": 1, "policy_steps": 2}


def test_dpok_rescores_below_fp32(model, tmp_path, monkeypatch):
    spoil(monkeypatch, "dpok", 1.0)
    pair = Pair(model, tmp_path, "dpok", DPOK)
    # The model itself stays in fp64.
    pair.trainer.config.mixed_precision = "bf16"
    value = ValueByHand(pair.hand, pair.method.value)
    for epoch in (1, 2):
        for _, expected in zip(pair.epoch(epoch), pair.hand.dpok(epoch, value), strict=True):
            pair.check(expected)


@pytest.mark.parametrize(
    ("algorithm", "train"),
    [
        ("ddpo", {"samples_per_epoch": 4, "inner_epochs": 2, "rescore": False}),
        pytest.param("dpok", DPOK, marks=pytest.mark.slow),
    ],
)
def test_log_probabilities_of_another_path_end_the_run(model, tmp_path, monkeypatch, algorithm, train):
    """Above a tenth of the clip range; below, they are reported."""
    spoil(monkeypatch, algorithm, 0.9e-5)
    first, *rest = list(Pair(model, tmp_path / "1", algorithm, train).epoch())
    assert first.largest["train/max_log_ratio_before_update"] == pytest.approx(0.9e-5, rel=1e-6)
    assert not any(update.largest for update in rest)
    spoil(monkeypatch, algorithm, 1.1e-5)
    with pytest.raises(RunError, match="1.1e-05, more than a tenth of train.clip_range=0.0001"):
        next(Pair(model, tmp_path / "2", algorithm, train).epoch())


@pytest.fixture
def accelerate_anew():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def log_ratio(model, output_dir, precision, accelerate, **train):
    """The largest before the first update, of a run as a user starts it."""
    values = tiny.values(model, output_dir, mixed_precision=precision, memory={"accelerate": accelerate})
    values["sampling"] |= {"eta": 1.0, "num_inference_steps": 5}
    values["train"] = {"batch_size": 4, "samples_per_epoch": 8, "max_train_steps": 2, **train}
    trainer = Trainer(build(ALGORITHMS["ddpo"], values))
    source = torch.Generator().manual_seed(3)
    for parameter in weights.trainable(trainer.engine.model).values():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=source)
    return next(iter(trainer.method.epoch(1))).largest["train/max_log_ratio_before_update"]


@pytest.mark.parametrize(
    ("train", "accelerate", "largest"),
    [
        ({"rescore": False}, True, 0),
        ({"rescore": False}, False, 0),
        ({"rescore": False, "rollout_batch_size": 8}, True, 1e-5),
        ({"rescore": False, "rollout_batch_size": 1}, False, 1e-5),
        ({"rollout_batch_size": 1}, False, 0),
    ],
)
def test_ratio_before_the_first_update(model, tmp_path, train, accelerate, largest):
    """Exactly 1 by the same path or once rescored; by another batch, within rounding."""
    found = log_ratio(model, tmp_path, "no", accelerate, **train)
    assert found <= largest
    # Rounding there is: what is rescored is not equal by chance.
    assert bool(found) == bool(largest)


@pytest.mark.parametrize("merged", [pytest.param(False, marks=pytest.mark.slow), True])
def test_ratio_before_the_first_update_in_bf16(model, tmp_path, accelerate_anew, merged):
    assert log_ratio(model, tmp_path / "1", "bf16", True, merged_rollouts=merged) == 0
    if merged:
        with pytest.raises(RunError, match="more than a tenth of train.clip_range"):
            log_ratio(model, tmp_path / "2", "bf16", True, merged_rollouts=True, rescore=False)
