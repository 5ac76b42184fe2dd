"""A run on several rewards with weights: what is trained, logged and refused."""

import json

import pytest
import tiny
import torch

from rftcore.rewards import RewardSpecError, declare
from rftcore.training import RunError, Trainer, UsageError
from rftcore.training.algorithm_configs import DdpoConfig
from rftcore.training.parsing import build

SUM = {"tiny.brightness": 2.0, "test_summed_rewards.closeness": -0.5}


@declare(differentiable=True)
def closeness(images, prompts, metadata=None, *, target=0.0):
    return (images - target).square().mean((1, 2, 3))


def last_line(folder, key):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in reversed(lines) if key in line)


@pytest.mark.parametrize("algorithm", ["draft", "ddpo"])
def test_every_reward_of_a_sum_is_logged(algorithm, model, tmp_path):
    groups = {"reward": {"function": SUM, "options": {"test_summed_rewards.closeness": {"target": 0.25}}}}
    if algorithm == "draft":
        config = tiny.config(model, tmp_path / "run", **groups, train={"max_train_steps": 1})
    else:
        values = tiny.values(model, tmp_path / "run", **groups)
        values["sampling"]["eta"] = 1.0
        values["train"] = {"max_train_steps": 1, "batch_size": 4, "learning_rate": 1e-3, "samples_per_epoch": 4}
        config = build(DdpoConfig, values)
    Trainer(config).train()
    trained = last_line(tmp_path / "run", "reward/weighted_sum/mean")
    expected = 2 * trained["reward/brightness/mean"] - 0.5 * trained["reward/closeness/mean"]
    assert trained["reward/weighted_sum/mean"] == pytest.approx(expected, rel=1e-5)
    seen = last_line(tmp_path / "run", "eval/reward/weighted_sum")
    expected = 2 * seen["eval/reward/brightness"] - 0.5 * seen["eval/reward/closeness"]
    assert seen["eval/reward/weighted_sum"] == pytest.approx(expected, rel=1e-5)
    assert seen["eval/reward/closeness"] > 0 and "eval/reward/contrast" in seen


def test_options_reach_rewards_and_their_gradient(model, tmp_path):
    """A sum of one with weight 1 trains as the reward itself does."""
    name = "test_summed_rewards.closeness"
    options, found = {name: {"target": 0.25}}, []
    for number, function in enumerate([name, {name: 1.0}]):
        reward = {"function": function, "options": options}
        trainer = Trainer(tiny.config(model, tmp_path / str(number), reward=reward, train={"max_train_steps": 2}))
        trainer.train()
        found.append([p.detach().clone() for p in trainer.engine.model.parameters() if p.requires_grad])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"reward": {"options": {"tiny.brightnes": {"gain": 1}}}},
            "reward.options has 'tiny.brightnes', and no reward",
        ),
        (
            {"reward": {"function": SUM}, "eval": {"held_out_reward": "tiny.brightness"}},
            "the trained and a held-out reward are both named 'brightness'",
        ),
    ],
)
def test_what_is_refused(groups, message, model, tmp_path):
    with pytest.raises(UsageError, match=message):
        Trainer(tiny.config(model, tmp_path / "run", **groups))
    assert not (tmp_path / "run").exists()


def test_a_reward_that_fails_in_a_run_says_what_was_saved(model, tmp_path, monkeypatch):
    """As one does whose server stops answering."""
    calls = []

    @declare(differentiable=True)
    def served(images, prompts, metadata=None):
        calls.append(len(images))
        if len(calls) > 6:
            raise RewardSpecError("http://localhost:1 does not answer")
        return images.mean((1, 2, 3))

    with pytest.raises(
        RunError, match=r"after step 2: http://localhost:1 does not answer\. .*checkpoint-2 is the last"
    ):
        Trainer(tiny.config(model, tmp_path / "run", checkpointing_steps=1), reward=served).train()
