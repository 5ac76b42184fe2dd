"""Denoising of samples, weighted by their rewards: RWR on the model's own, KL-regularised SFT on the pretrained one's."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from rftcore.algorithms import rwr, sft
from rftcore.algorithms.draft_plus import divergence
from rftcore.rewards import Reward
from rftcore.training.algorithm_configs import RegressionTrainConfig, RwrTrainConfig, SftTrainConfig
from rftcore.training.batches import endless, generator
from rftcore.training.engine import Engine
from rftcore.training.methods.method import Tally, Update
from rftcore.training.methods.rollouts import draw, everyones_rewards


class Regression:
    """An epoch samples, weighs, and takes optimizer steps on batches of samples that are noised at random times.

    Every process holds the weights of all samples and the samples that count; each works on its share of a batch.
    """

    pretrained = False
    train: RegressionTrainConfig

    def __init__(self, engine: Engine) -> None:
        self.engine, self.train = engine, cast(Any, engine.config.train)
        self.sampler = engine.sampler(backprop_steps=0)
        self.share = engine.batch_share
        self.own = engine.share(self.train.samples_per_epoch)
        self.at_once = min(self.train.rollout_batch_size or len(self.share.parts()[0]), self.own.size)
        self.alphas_cumprod = engine.scheduler.alphas_cumprod.double()

    @staticmethod
    def check_reward(reward: Reward) -> None:
        """Any reward will do."""

    def weights(self, prompts: list[str], r: Tensor) -> Tensor:
        """(N,) of all samples' rewards (N,); a sample of weight 0 is not trained on."""
        raise NotImplementedError

    def loss(self, given: dict[str, Any], rows: dict[str, Tensor], tally: Tally) -> Tensor:
        """Of noised samples: rows x_t, target (b, C, h, w), t, weights, rewards (b,)."""
        raise NotImplementedError

    def epoch(self, epoch: int) -> Iterator[Update]:
        engine, train, tally = self.engine, self.train, Tally()
        rollout = draw(engine, self.sampler, epoch, self.own.places, self.at_once, tally, pretrained=self.pretrained)
        prompts, r = everyones_rewards(engine, rollout, epoch)
        # The processes' shares lie in the samples' order.
        x_0 = engine.gathered({"x_0": rollout.trajectory.latents})["x_0"]
        finite = r.isfinite().nonzero().flatten()
        weights = torch.zeros_like(r)
        if len(finite):
            weights[finite] = self.weights([prompts[row] for row in finite], r[finite])
        counting = weights.nonzero().flatten()
        for update in range(train.updates_per_epoch):
            if len(counting):
                first = update * train.batch_size
                order = endless(len(counting), first, train.batch_size, engine.config.seed, "order", epoch)
                taken = counting[order]
                columns = {"x_0": x_0[taken], "weights": weights[taken].to(x_0), "rewards": r[taken].to(x_0)}
                self._accumulate(epoch, update, [prompts[row] for row in taken], columns, tally)
            else:
                tally.skipped = "every sample of the epoch was dropped, or has the weight 0"
            yield tally.update()
            tally = Tally()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _accumulate(
        self, epoch: int, update: int, prompts: list[str], columns: dict[str, Tensor], tally: Tally
    ) -> None:
        """Leaves the gradient of one batch, of rows (batch_size, ...) and their prompts."""
        parts, device = self.share.parts(), self.engine.device
        for number, places in enumerate(parts):
            chosen = list(places)
            noised = self._noised(epoch, update, places, columns["x_0"][chosen])
            rows = {name: column[chosen] for name, column in columns.items()} | noised
            rows = {name: column.to(device) for name, column in rows.items()}
            with self.engine.synchronised(number == len(parts) - 1):
                with self.engine.clock.measure("train"):
                    given = self.engine.inputs.batch([prompts[place] for place in chosen])
                    loss = self.loss(given, rows, tally)
                self.engine.backward(loss / len(parts))
            tally.note("train/loss", loss)
            tally.unet_evaluations += len(chosen) * self.engine.branches

    def _noised(self, epoch: int, update: int, places: range, x_0: Tensor) -> dict[str, Tensor]:
        """Times t (b,), states x_t and what the model should say of them, (b, C, h, w); each place draws its own."""
        sources = [generator(self.engine.config.seed, "time", epoch, update, place) for place in places]
        t = torch.stack([torch.randint(len(self.alphas_cumprod), (), generator=source) for source in sources])
        noise = torch.stack([torch.randn(x_0.shape[1:], generator=source, dtype=x_0.dtype) for source in sources])
        alpha_bar = self.alphas_cumprod[t].to(x_0.dtype).reshape(-1, 1, 1, 1)
        signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        targets = {"epsilon": noise, "v_prediction": signal * noise - sigma * x_0, "sample": x_0}
        target = targets[self.engine.scheduler.config.prediction_type]
        return {"t": t, "x_t": signal * x_0 + sigma * noise, "target": target}


class Rwr(Regression):
    """RWR: the model's own samples, weighted by the softmax of their rewards, or the best of them."""

    train: RwrTrainConfig

    def weights(self, prompts: list[str], r: Tensor) -> Tensor:
        train = self.train
        if train.weighting == "dense":
            weights = functools.partial(rwr.dense_weights, temperature=train.temperature)
        else:
            weights = functools.partial(rwr.sparse_weights, top=train.top)
        return rwr.per_prompt(weights, prompts, r) if train.per_prompt else weights(r)

    def loss(self, given: dict[str, Any], rows: dict[str, Tensor], tally: Tally) -> Tensor:
        output = self.sampler.predict(rows["x_t"], rows["t"], **given)
        return rwr.weighted_mse(output, rows["target"], rows["weights"])


class Sft(Regression):
    """KL-regularised SFT: the pretrained model's samples, weighted by reward + gamma."""

    pretrained = True
    train: SftTrainConfig

    def weights(self, prompts: list[str], r: Tensor) -> Tensor:
        # Every sample counts: what reward + gamma makes of it is the loss's part, and can be 0 or less.
        return torch.ones_like(r)

    def loss(self, given: dict[str, Any], rows: dict[str, Tensor], tally: Tally) -> Tensor:
        train, output = self.train, self.sampler.predict(rows["x_t"], rows["t"], **given)
        nll = (output - rows["target"]).square().flatten(1).mean(1)
        if train.regulariser == "kl_o":
            return sft.kl_o(nll, rows["rewards"], train.gamma)
        with torch.no_grad():
            base = self.sampler.predict(rows["x_t"], rows["t"], **given, adapter=False)
        tally.unet_evaluations += len(nll) * self.engine.branches
        d = divergence(output, base)
        tally.note("train/divergence", d)
        return sft.kl_d(nll, rows["rewards"], train.gamma, train.beta, d)
