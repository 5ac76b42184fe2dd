"""DDPO: sample, compare each reward with its prompt's, and make the good samples' steps more probable."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from rftcore.algorithms import ddpo
from rftcore.algorithms.advantages import PromptStatistics, standardised
from rftcore.rewards import Reward
from rftcore.training.algorithm_configs import DdpoTrainConfig
from rftcore.training.batches import generator, shuffled_in_lanes
from rftcore.training.engine import Engine
from rftcore.training.methods.method import Tally, Update
from rftcore.training.methods.rollouts import Rollout, check_same_model, draw, everyones_rewards, trained_steps


class Ddpo:
    """An epoch samples once and takes several optimizer steps, each on a batch of samples with some of their timesteps.

    A process holds the samples of its places in every batch, so that no trajectory moves between processes.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.train = engine, cast(DdpoTrainConfig, engine.config.train)
        self.sampler = engine.sampler(backprop_steps=0)
        self.statistics = PromptStatistics(self.train.statistics_buffer_size, self.train.statistics_min_count)
        self.batches = self.train.samples_per_epoch // self.train.batch_size
        self.share = engine.batch_share
        self.at_once = self.train.rollout_batch_size or len(self.share.parts()[0])

    @staticmethod
    def check_reward(reward: Reward) -> None:
        """Any reward will do."""

    def epoch(self, epoch: int) -> Iterator[Update]:
        batch_size, fraction, tally = self.train.batch_size, self.train.timestep_fraction, Tally()
        indices = [batch * batch_size + place for batch in range(self.batches) for place in self.share.places]
        rollout = draw(
            self.engine, self.sampler, epoch, indices, self.at_once, tally, merged=self.train.merged_rollouts
        )
        everyones, constant = self._advantages(rollout, epoch)
        advantages = everyones[rollout.indices].to(rollout.trajectory.log_probs)
        old = rollout.trajectory.log_probs.clone()  # (n, T)
        lanes = torch.arange(self.batches)[:, None].expand(-1, batch_size)
        steps, updated = self._timesteps(rollout, epoch, 0, fraction), False
        if self._rescores() and not constant:
            # Later inner epochs draw other steps than the first one's.
            rescored = steps if self.train.inner_epochs == 1 else self._timesteps(rollout, epoch, 0, 1.0)
            self._rescore(rollout, self._rows(lanes), rescored, old, tally)
        for inner in range(self.train.inner_epochs):
            if inner:
                lanes = shuffled_in_lanes(self.batches, batch_size, self.engine.config.seed, "lanes", epoch, inner)
                steps = self._timesteps(rollout, epoch, inner, fraction)
            rows, numbers = self._rows(lanes), lanes * batch_size + torch.arange(batch_size)
            for batch in range(self.batches):
                if everyones[numbers[batch]].any():
                    self._accumulate(rollout, rows[batch], steps, advantages, old, tally, not updated)
                    updated = True
                else:
                    tally.skipped = constant or "all advantages of the batch are 0"
                yield tally.update()
                tally = Tally()

    def state_dict(self) -> dict[str, Any]:
        return {"statistics": self.statistics.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.statistics.load_state_dict(state["statistics"])

    def _advantages(self, rollout: Rollout, epoch: int) -> tuple[Tensor, str | None]:
        """(N,) of all processes' samples, in their order, and why all are 0, if they are.

        A dropped sample's is 0.
        """
        prompts, r = everyones_rewards(self.engine, rollout, epoch)
        kept = r.isfinite().nonzero().flatten()
        advantages = torch.zeros_like(r)
        if len(kept):
            if self.train.per_prompt_statistics:
                advantages[kept] = self.statistics.advantages([prompts[index] for index in kept], r[kept])
            else:
                advantages[kept] = standardised(r[kept])
        constant = None
        if not advantages.any():
            constant = (
                f"all advantages are 0: every reward is {float(r[kept[0]]):g}" if len(kept) else "no reward is finite"
            )
        clip = self.train.advantage_clip
        return advantages.clamp(-clip, clip), constant

    def _rows(self, lanes: Tensor) -> Tensor:
        """(batches, places) of this process's samples, those that each update takes of lanes (batches, batch size)."""
        return lanes[:, self.share.places] * self.share.size + torch.arange(self.share.size)

    def _timesteps(self, rollout: Rollout, epoch: int, inner: int, fraction: float) -> Tensor:
        """(n, S) this share of the steps of each sample, in an order of its own; a larger share begins alike."""
        noisy = trained_steps(rollout.trajectory, self.train.noisiest_fraction)
        count = max(1, int(fraction * len(noisy)))
        seed = self.engine.config.seed
        orders = [
            torch.randperm(len(noisy), generator=generator(seed, "timesteps", epoch, inner, index))[:count]
            for index in rollout.indices
        ]
        return noisy[torch.stack(orders)]

    def _rescores(self) -> bool:
        """Whether sampling took another path than training will, so that its log-probabilities are another model's."""
        if self.train.loss == "sf":
            return False
        if self.train.rescore is not None:
            return self.train.rescore
        other_batch = self.at_once != len(self.share.parts()[0])
        return other_batch or self.train.merged_rollouts or self.engine.config.mixed_precision != "no"

    @torch.no_grad()
    def _rescore(self, rollout: Rollout, rows: Tensor, steps: Tensor, old: Tensor, tally: Tally) -> None:
        """Writes into `old` (n, T) what training would find before its first update, of steps (n, S)."""
        with self.engine.clock.measure("train"):
            for part in self._parts(rows.flatten()):
                for taken in steps[part].unbind(1):
                    old[part, taken] = self._log_prob(rollout, part, taken, tally)

    def _accumulate(
        self,
        rollout: Rollout,
        rows: Tensor,
        steps: Tensor,
        advantages: Tensor,
        old: Tensor,
        tally: Tally,
        before_any_update: bool,
    ) -> None:
        """Leaves the gradient of one batch: rows (m,) of this process, each with its steps (n, S)."""
        parts, count = self._parts(rows), steps.shape[1]
        for number, part in enumerate(parts):
            for place, taken in enumerate(steps[part].unbind(1)):
                with self.engine.synchronised(number == len(parts) - 1 and place == count - 1):
                    with self.engine.clock.measure("train"):
                        log_prob = self._log_prob(rollout, part, taken, tally)
                    loss = self._loss(log_prob, old[part, taken], advantages[part], tally, before_any_update)
                    self.engine.backward(loss / (len(parts) * count))

    def _log_prob(self, rollout: Rollout, rows: Tensor, steps: Tensor, tally: Tally) -> Tensor:
        """(b,) of one step of each row, under the UNet as it is now."""
        tally.unet_evaluations += len(rows) * self.engine.branches
        transitions = rollout.trajectory.transitions(steps[:, None], rows=rows)
        return self.sampler.transition_log_prob(transitions)[0]

    def _loss(self, log_prob: Tensor, old: Tensor, A: Tensor, tally: Tally, before_any_update: bool) -> Tensor:
        clip = self.train.clip_range
        if self.train.loss == "sf":
            loss = ddpo.score_function(log_prob, A)
        else:
            loss = ddpo.importance_sampling(log_prob, old, A, clip)
            if before_any_update:
                ratios = (log_prob.detach() - old).abs()
                tally.note_largest("train/max_log_ratio_before_update", ratios)
                check_same_model(float(ratios.max()), clip)
            tally.note("train/approx_kl", ddpo.approx_kl(log_prob, old))
            tally.note("train/clip_frac", ddpo.clip_fraction(log_prob, old, clip))
        tally.note("train/loss", loss)
        return loss

    def _parts(self, rows: Tensor) -> Sequence[Tensor]:
        return rows.split(len(self.share.parts()[0]))
