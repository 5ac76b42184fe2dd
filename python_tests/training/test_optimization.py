"""The optimizer and its learning rate are torch's and diffusers' own; loss scaling is counted; all of it resumes."""

import copy
import json
import sys
import types

import pytest
import tiny
import torch
from diffusers.optimization import get_scheduler

from rftcore.training import RunError, Trainer, UsageError
from rftcore.training.config import TrainConfig
from rftcore.training.optimization import LossScaling, make_lr_scheduler, make_optimizer

SCHEDULES = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
CPU = torch.device("cpu")


def weights(size=8):
    return [torch.nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(0)))]


def step(optimizer, parameters, number):
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    optimizer.step()


def test_adamw_gets_every_option():
    config = TrainConfig(
        learning_rate=0.3, adam_beta1=0.5, adam_beta2=0.6, adam_weight_decay=0.7, adam_epsilon=0.1, max_train_steps=3
    )
    ours, theirs = weights(), weights()
    optimizer = make_optimizer(config, iter(ours), CPU)
    expected = torch.optim.AdamW(theirs, lr=0.3, betas=(0.5, 0.6), weight_decay=0.7, eps=0.1)
    for number in range(3):
        step(optimizer, ours, number)
        step(expected, theirs, number)
    assert torch.equal(ours[0], theirs[0])


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_diffusers_and_resume_in_the_middle(name):
    config = TrainConfig(
        lr_scheduler=name,
        lr_warmup_steps=0 if name == "constant" else 2,
        lr_num_cycles=3,
        lr_power=2.0,
        learning_rate=0.1,
        max_train_steps=12,
    )
    stock = get_scheduler(
        name,
        torch.optim.AdamW(weights(), lr=0.1),
        num_warmup_steps=2,
        num_training_steps=12,
        num_cycles=3,
        power=2.0,
    )
    optimizer = make_optimizer(config, weights(), CPU)
    scheduler = make_lr_scheduler(config, optimizer)
    for number in range(12):
        if number == 5:
            states = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
            optimizer = make_optimizer(config, weights(), CPU)
            scheduler = make_lr_scheduler(config, optimizer)
            optimizer.load_state_dict(states[0])
            scheduler.load_state_dict(states[1])
        assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0] == stock.get_last_lr()[0]
        optimizer.step()
        scheduler.step()
        stock.optimizer.step()
        stock.step()


def test_schedule_that_cannot_start():
    config = TrainConfig(lr_scheduler="polynomial", learning_rate=1e-9)
    with pytest.raises(UsageError, match="train.lr_scheduler=polynomial cannot start from train.learning_rate=1e-09"):
        make_lr_scheduler(config, make_optimizer(config, weights(), CPU))


def test_8_bit_adam_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match="use_8bit_adam=true needs bitsandbytes.*pip install bitsandbytes"):
        make_optimizer(TrainConfig(use_8bit_adam=True), weights(), CPU)


class NoKernel(torch.optim.AdamW):
    def step(self, closure=None):
        raise NotImplementedError("no kernel for 'cpu'")


class Idle(torch.optim.AdamW):
    def step(self, closure=None):
        pass


@pytest.mark.parametrize(("kind", "why"), [(NoKernel, "no kernel for 'cpu'"), (Idle, "a step changed nothing")])
def test_8_bit_adam_that_takes_no_step_here(monkeypatch, kind, why):
    fake = types.SimpleNamespace(optim=types.SimpleNamespace(AdamW8bit=kind))
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    with pytest.raises(UsageError, match=f"no step of torch.float32 weights on cpu .{why}"):
        make_optimizer(TrainConfig(use_8bit_adam=True), weights(), CPU)


def test_8_bit_adam_follows_adamw_and_resumes():
    pytest.importorskip("bitsandbytes")
    eight, exact = weights(8192), weights(8192)
    config = TrainConfig(use_8bit_adam=True, learning_rate=1e-2, adam_weight_decay=0.0)
    optimizer = make_optimizer(config, eight, CPU)
    expected = torch.optim.AdamW(exact, lr=1e-2, weight_decay=0.0)
    start = exact[0].detach().clone()
    for number in range(6):
        if number == 3:
            state, now = copy.deepcopy(optimizer.state_dict()), eight[0].detach().clone()
        step(optimizer, eight, number)
        step(expected, exact, number)
    assert optimizer.state[eight[0]]["state1"].dtype == torch.uint8
    moved = torch.linalg.norm(exact[0] - start)
    assert 0 < torch.linalg.norm(eight[0] - exact[0]) < 0.1 * moved
    again = [torch.nn.Parameter(now)]
    resumed = make_optimizer(config, again, CPU)
    resumed.load_state_dict(state)
    for number in range(3, 6):
        step(resumed, again, number)
    assert torch.equal(again[0], eight[0])


class Scaler:
    """torch's GradScaler serves no fp16 on a CPU; what it tells of itself does."""

    def __init__(self, scale):
        self.scale = scale

    def get_scale(self):
        return self.scale


def test_overflows_are_counted_by_epoch():
    optimizer, scaler = types.SimpleNamespace(step_was_skipped=False), Scaler(4096.0)
    scaling = LossScaling(optimizer, scaler)
    assert scaling.stepped()
    optimizer.step_was_skipped, scaler.scale = True, 2048.0
    assert not scaling.stepped()
    assert scaling.take() == {"train/loss_scale": 2048.0, "train/overflows": 1}
    assert scaling.take() == {"train/loss_scale": 2048.0, "train/overflows": 0}


def test_gradients_that_never_fit_stop_the_run():
    scaling = LossScaling(types.SimpleNamespace(step_was_skipped=True), Scaler(2.0**-25))
    with pytest.raises(RunError, match="loss scale of 2.98023e-08 still.*mixed_precision=bf16"):
        scaling.stepped()


def test_without_a_scaler_nothing_is_said():
    scaling = LossScaling(types.SimpleNamespace(step_was_skipped=False), None)
    assert scaling.stepped() and scaling.take() == {}


def test_overflows_are_in_the_metrics_and_not_in_the_average(model, tmp_path):
    trainer = Trainer(tiny.config(model, tmp_path / "run", train={"max_train_steps": 2, "ema_decay": 0.5}))
    trainer.loss_scaling = LossScaling(types.SimpleNamespace(step_was_skipped=True), Scaler(512.0))
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [(line["train/loss_scale"], line["train/overflows"]) for line in lines if "train/loss" in line]
    assert told == [(512.0, 1)] * 2
    assert trainer.trained.ema.state_dict()["optimization_step"] == 0
