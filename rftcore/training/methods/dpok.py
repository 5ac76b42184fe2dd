"""DPOK: policy gradient on a buffer of transitions, with a value function and a KL to the pretrained model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from rftcore.algorithms import dpok
from rftcore.algorithms.value_function import ValueFunction
from rftcore.rewards import Reward
from rftcore.sampling.conditioning import Conditioning
from rftcore.sampling.trajectory import Trajectory
from rftcore.sampling.transitions import Transitions
from rftcore.training.algorithm_configs import DpokTrainConfig
from rftcore.training.batches import derived_seed, endless, generator
from rftcore.training.engine import Engine
from rftcore.training.methods.method import Tally, Update
from rftcore.training.methods.rollouts import Rollout, check_same_model, draw, trained_steps
from rftcore.training.transition_buffer import TransitionBuffer

# Columns of the buffer that are looked at, not computed with.
_ON_CPU = ("steps", "prompts")


class Dpok:
    """An epoch samples a few images, adds their transitions to the buffer, and takes optimizer steps on batches of it.

    Every process holds the same buffer and the same value function, drawn from and trained alike; each works on its
    share of a batch.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.train = engine, cast(DpokTrainConfig, engine.config.train)
        self.sampler = engine.sampler(backprop_steps=0)
        self.share = engine.batch_share
        self.own = engine.share(self.train.samples_per_epoch)
        self.at_once = min(self.train.rollout_batch_size or len(self.share.parts()[0]), self.own.size)
        self.buffer = TransitionBuffer(self.train.buffer_size)
        self.prompts = list(dict.fromkeys(engine.plan.prompts))
        self.number_of = {prompt: number for number, prompt in enumerate(self.prompts)}
        self.settings: dict[str, Any] = {}
        self.value, self.value_optimizer = self._value_function()

    @staticmethod
    def check_reward(reward: Reward) -> None:
        """Any reward will do."""

    def epoch(self, epoch: int) -> Iterator[Update]:
        tally = Tally()
        rollout = draw(self.engine, self.sampler, epoch, self.own.places, self.at_once, tally)
        added = self._remember(rollout, tally)
        for update in range(self.train.value_updates if len(self.buffer) else 0):
            self._learn_values(epoch, update, tally)
        for update in range(self.train.policy_steps):
            if len(self.buffer):
                self._accumulate(epoch, update, 0 if update else added, tally)
            else:
                tally.skipped = "no reward has been finite so far"
            yield tally.update()
            tally = Tally()

    def state_dict(self) -> dict[str, Any]:
        return {
            "buffer": self.buffer.state_dict(),
            "settings": self.settings,
            "value": self.value.state_dict(),
            "value_optimizer": self.value_optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state["buffer"])
        self.settings = state["settings"]
        self.value.load_state_dict(state["value"])
        self.value_optimizer.load_state_dict(state["value_optimizer"])

    def _value_function(self) -> tuple[ValueFunction, torch.optim.Optimizer]:
        engine, channels = self.engine, self.engine.model.config.in_channels
        size = engine.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        with torch.random.fork_rng():
            torch.manual_seed(derived_seed(engine.config.seed, "value function"))
            value = ValueFunction(
                latent_size=channels * height * width,
                text_size=engine.inputs.features(self.prompts[:1]).shape[1],
                num_steps=engine.config.sampling.num_inference_steps,
            )
        value = value.to(engine.device, self.sampler.denoiser.state_dtype)
        return value, torch.optim.AdamW(value.parameters(), lr=self.train.value_learning_rate)

    def _remember(self, rollout: Rollout, tally: Tally) -> int:
        """Adds the transitions of all processes' samples to the buffer of each, and says how many it now has of them.

        A dropped sample's are left out.
        """
        trajectory = rollout.trajectory
        taken = trained_steps(trajectory, self.train.noisiest_fraction)
        rows = torch.arange(len(trajectory)).repeat_interleave(len(taken))
        steps = taken.repeat(len(trajectory))
        self.settings = dict(trajectory.settings)
        rewards = rollout.scores.rewards
        if self.train.reward_filter:
            rewards = rewards.clamp(min=0)
        numbers = torch.tensor([self.number_of[prompt] for prompt in rollout.prompts])
        columns = {
            "x": trajectory.states[steps, rows],
            "next_x": trajectory.states[steps + 1, rows],
            "steps": steps,
            "log_probs": self._old_log_probs(trajectory, rows, steps, tally),
            "rewards": rewards.to(trajectory.log_probs)[rows],
            "prompts": numbers[rows],
        }
        gathered = self.engine.gathered(columns)
        kept = gathered["rewards"].isfinite()
        if kept.any():
            self.buffer.add({name: column[kept] for name, column in gathered.items()})
        return min(int(kept.sum()), len(self.buffer))

    @torch.no_grad()
    def _old_log_probs(self, trajectory: Trajectory, rows: Tensor, steps: Tensor, tally: Tally) -> Tensor:
        """(N,) as they were sampled or, in low precision or where it is asked for, as training would find them now."""
        found = trajectory.log_probs[rows, steps]
        low_precision = self.engine.config.mixed_precision != "no"
        if not (low_precision if self.train.rescore is None else self.train.rescore):
            return found
        # The last batch is filled up: one of another size would be another path.
        at_once = len(self.share.parts()[0])
        places = torch.arange(-(-len(found) // at_once) * at_once) % len(found)
        with self.engine.clock.measure("train"):
            for part in places.split(at_once):
                transitions = trajectory.transitions(steps[part, None], rows=rows[part])
                found[part] = self.sampler.transition_log_prob(transitions)[0]
                tally.unet_evaluations += at_once * self.engine.branches
        return found

    def _learn_values(self, epoch: int, update: int, tally: Tally) -> None:
        """One step of the value function, the same on every process."""
        minibatches, seed = self.train.value_minibatches, self.engine.config.seed
        for minibatch in range(minibatches):
            rows = self._rows(self._drawn(self.train.value_batch_size, seed, "value batch", epoch, update, minibatch))
            with self.engine.clock.measure("train"):
                loss = dpok.value_loss(self._values(rows), rows["rewards"])
                (loss / minibatches).backward()
            tally.note("train/value_loss", loss)
        self.value_optimizer.step()
        self.value_optimizer.zero_grad()

    def _drawn(self, rows: int, *key: int | str) -> Tensor:
        """As many of the buffer's rows, or all; none twice."""
        return torch.randperm(len(self.buffer), generator=generator(*key))[:rows]

    def _accumulate(self, epoch: int, update: int, added: int, tally: Tally) -> None:
        """Leaves the policy's gradient of one batch of the buffer's transitions.

        Its `added` newest ones were sampled by the UNet as it is now.
        """
        seed, train, parts = self.engine.config.seed, self.train, self.share.parts()
        taken = endless(len(self.buffer), 0, train.batch_size, seed, "policy batch", epoch, update)
        for number, places in enumerate(parts):
            rows = self._rows(taken[list(places)])
            with self.engine.synchronised(number == len(parts) - 1):
                with self.engine.clock.measure("train"):
                    scores = self.sampler.transition_log_prob(self._transitions(rows), reference=train.kl)
                    log_prob, divergence = cast(tuple[Tensor, Tensor], scores)
                    with torch.no_grad():
                        advantages = rows["rewards"] - self._values(rows)
                    loss = dpok.dpok(
                        log_prob,
                        rows["log_probs"],
                        advantages,
                        divergence,
                        reward_weight=train.reward_weight,
                        kl_weight=train.kl_weight,
                        clip_range=train.clip_range,
                    )
                self.engine.backward(loss / len(parts))
            tally.unet_evaluations += 2 * len(places) * self.engine.branches
            log_ratio = log_prob.detach() - rows["log_probs"]
            if not update:
                fresh = taken[list(places)] >= len(self.buffer) - added
                apart = log_ratio.abs().where(fresh.to(log_ratio.device), 0)
                tally.note_largest("train/max_log_ratio_before_update", apart)
                check_same_model(float(apart.max()), train.clip_range)
            tally.note("train/loss", loss)
            tally.note("train/divergence", divergence)
            tally.note("train/advantage", advantages)
            tally.note("train/clip_frac", ((log_ratio.exp() - 1).abs() > train.clip_range).double())

    def _rows(self, taken: Tensor) -> dict[str, Tensor]:
        rows = self.buffer.take(taken)
        return {name: rows[name] if name in _ON_CPU else rows[name].to(self.engine.device) for name in rows}

    def _values(self, rows: dict[str, Tensor]) -> Tensor:
        features = self.engine.inputs.features([self.prompts[number] for number in rows["prompts"].tolist()])
        return self.value(rows["x"], features.to(rows["x"]), rows["steps"].to(rows["x"].device))

    def _transitions(self, rows: dict[str, Tensor]) -> Transitions:
        given = self.engine.inputs.batch([self.prompts[number] for number in rows["prompts"].tolist()])
        names = ("prompt_embeds", "negative_prompt_embeds", "added_cond_kwargs", "negative_added_cond_kwargs")
        conditioning = Conditioning.build(*(given.get(name) for name in names), guided=self.sampler.guided)
        return Transitions(
            x=rows["x"],
            next_x=rows["next_x"],
            steps=rows["steps"],
            log_probs=rows["log_probs"],
            conditioning=self.sampler.denoiser.told(conditioning, self.engine.config.sampling.guidance_scale),
            settings=self.settings,
        )
