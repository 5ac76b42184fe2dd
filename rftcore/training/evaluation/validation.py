"""Measuring the model on fixed prompts and fixed noise: every judge's scores, drift, diversity, a grid to look at."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor

from rftcore.rewards import Reward
from rftcore.sampling import CheckpointedSampler, Trajectory, decode, score
from rftcore.training import weights
from rftcore.training.batches import generator
from rftcore.training.engine import Engine, Samples
from rftcore.training.evaluation import grids
from rftcore.training.evaluation.drift import Features, distance, diversity, thumbnails

DRIFT, DIVERSITY = "drift/", "diversity/"
# Of a chain's steps, the share at which the model is compared with the one without its adapter, but at least so many.
# Each takes two evaluations more: a fifth of the sampling at 50 steps.
_EPS_SHARE, _EPS_LEAST = 0.1, 3


@dataclass(frozen=True)
class Mean:
    """A mean over the n images that have a value, with its standard error: s / sqrt(n), 0 for one image; NaN for none."""

    mean: float
    standard_error: float

    @classmethod
    def of(cls, scores: Sequence[float]) -> Mean:
        kept = [score for score in scores if math.isfinite(score)]
        if not kept:
            return cls(math.nan, math.nan)
        spread = statistics.stdev(kept) if len(kept) > 1 else 0.0
        return cls(statistics.fmean(kept), spread / math.sqrt(len(kept)))


@dataclass(frozen=True)
class Evaluation:
    """What was seen of N images of P prompts, the same on every process. Image j shows prompt j mod P.

    Attributes:
        scores: judge -> (N,) reward points, NaN where a judge had none and such samples are dropped; a weighted sum's
            rewards are among them.
        eps_drift: (N,) mean squared difference of the guided eps (or what the model predicts) from the model without
            its adapter, at the chain's own states, a mean over some of its steps; empty where there is no adapter.
        features: space -> (N, ...) on the CPU.
        prompts: P.
        grid: the first prompts' images.
    """

    scores: dict[str, list[float]]
    eps_drift: list[float]
    features: dict[str, Tensor]
    prompts: int
    grid: Image.Image

    def measures(self, reference: Mapping[str, Tensor] | None) -> dict[str, list[float]]:
        """What a run remembers of it, by name: each judge's scores, and what has a slash in its name.

        "drift/<space>" holds each image's distance from the reference, the same image at step 0, where that is given;
        "drift/eps" the divergence of the model; "diversity/<space>" the mean distance between a prompt's images, for
        each prompt, where it has several.
        """
        found = dict(self.scores)
        for space, features in self.features.items():
            if reference is not None and space in reference:
                found[DRIFT + space] = distance(features, reference[space]).tolist()
            if len(features) > self.prompts:
                found[DIVERSITY + space] = diversity(features, self.prompts).tolist()
        if self.eps_drift:
            found[DRIFT + "eps"] = self.eps_drift
        return found


@dataclass(frozen=True)
class _Seen:
    """One image's part of an evaluation."""

    index: int
    scores: dict[str, float]
    eps_drift: float | None
    features: dict[str, Tensor]
    image: Image.Image | None


class Validation:
    """The run's evaluation: the same prompts and noise every time, so that two evaluations compare image by image.

    Args:
        features: further spaces that drift and diversity are measured in, by name.
    """

    def __init__(
        self,
        engine: Engine,
        sampler: CheckpointedSampler,
        prompts: Sequence[str],
        judges: Sequence[Reward],
        features: Mapping[str, Features] | None = None,
    ) -> None:
        self.engine = engine
        self.sampler = sampler
        self.judges = list(judges)
        self.spaces: dict[str, Features] = {"pixels": thumbnails, **(features or {})}
        # Image j shows prompt j mod P, so that any leading part of the images covers the prompts evenly.
        self.prompts = [*prompts] * engine.config.eval.num_validation_images
        self.distinct = len(prompts)

    @torch.no_grad()
    def __call__(self) -> Evaluation:
        model, accelerator = self.engine.model, self.engine.accelerator
        was_training = model.training
        model.eval()
        mine = range(len(self.prompts))[accelerator.process_index :: accelerator.num_processes]
        size = self.engine.config.eval.batch_size
        results = [seen for start in range(0, len(mine), size) for seen in self._look(mine[start : start + size])]
        model.train(was_training)
        everyone = sorted(gather_object(results), key=lambda seen: seen.index)
        return Evaluation(
            scores={name: [seen.scores[name] for seen in everyone] for name in everyone[0].scores},
            eps_drift=[seen.eps_drift for seen in everyone if seen.eps_drift is not None],
            features={space: torch.stack([seen.features[space] for seen in everyone]) for space in self.spaces},
            prompts=self.distinct,
            grid=grids.prompt_grid(
                self.prompts[: self.distinct], {seen.index: seen.image for seen in everyone if seen.image is not None}
            ),
        )

    def _look(self, indices: Sequence[int]) -> list[_Seen]:
        prompts = [self.prompts[index] for index in indices]
        noise = [generator(self.engine.config.eval.seed, "validation", index) for index in indices]
        trajectory = self.engine.sample(self.sampler, Samples(indices, prompts, noise))
        images = torch.cat([decode(self.engine.vae, latent) for latent in trajectory.latents.split(1)])  # (b, 3, H, W)
        scores = self._scores(images, prompts)
        eps_drift = self._eps_drift(trajectory, prompts)
        # Copies: a row would keep its whole batch.
        features = {space: [row.cpu().clone() for row in make(images)] for space, make in self.spaces.items()}
        return [
            _Seen(
                index,
                {name: values[row] for name, values in scores.items()},
                eps_drift[row],
                {space: rows[row] for space, rows in features.items()},
                None if grids.place(index, self.distinct) is None else _to_image(images[row]),
            )
            for row, index in enumerate(indices)
        ]

    def _scores(self, images: Tensor, prompts: list[str]) -> dict[str, list[float]]:
        """Each judge's (b,), a weighted sum's rewards after it."""
        found: dict[str, list[float]] = {}
        for judge in self.judges:
            # As the output of a pixel-space model: decoded once for all judges.
            values, stats = score(
                None,
                images * 2 - 1,
                judge,
                prompts,
                images_per_call=len(prompts),
                on_nan=self.engine.config.reward.on_nan,
                return_stats=True,
            )
            found |= {name: column.double().tolist() for name, column in {judge.name: values, **stats["parts"]}.items()}
        return found

    def _eps_drift(self, trajectory: Trajectory, prompts: list[str]) -> list[float | None]:
        """Of each sample: mean over evenly spread steps of the mean squared difference from the model without adapter."""
        if not weights.is_lora(self.engine.model):
            return [None] * len(prompts)
        given, total = self.engine.inputs.batch(prompts), torch.zeros((), dtype=torch.float64)
        count = len(trajectory.timesteps)
        steps = _spread(count, max(_EPS_LEAST, round(_EPS_SHARE * count)))
        for step in steps:
            x_t, t = trajectory.states[step], trajectory.timesteps[step]
            base = self.sampler.predict(x_t, t, **given, adapter=False)
            difference = self.sampler.predict(x_t, t, **given) - base
            total = total + difference.double().square().flatten(1).mean(1)  # (b,)
        return (total / len(steps)).tolist()


def metrics(now: Mapping[str, Sequence[float]], first: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The figures of an evaluation's measures, as they are logged; `first` are those of step 0."""
    logged = {}
    if dropped := sum(not math.isfinite(value) for values in now.values() for value in values):
        logged["eval/dropped_scores"] = float(dropped)
    for name, values in now.items():
        if name.startswith(DIVERSITY):
            space = name.removeprefix(DIVERSITY)
            logged["eval/diversity" if space == "pixels" else f"eval/{name}"] = diversity_left(name, now, first)
        elif name.startswith(DRIFT):
            logged[f"eval/{name}"] = Mean.of(values).mean
        else:
            mean = Mean.of(values)
            logged[f"eval/reward/{name}"] = mean.mean
            logged[f"eval/reward/{name}/standard_error"] = mean.standard_error
    return logged


def line(figures: Mapping[str, float]) -> str:
    """Those figures for a terminal."""
    parts = []
    for name, value in figures.items():
        if name.startswith("eval/reward/"):
            if (error := figures.get(f"{name}/standard_error")) is not None:
                parts.append(f"{name.removeprefix('eval/reward/')} {value:.3f} ± {error:.3f}")
        elif math.isfinite(value):
            parts.append(f"{name.removeprefix('eval/')} {value:.3g}")
    return "  ".join(parts)


def diversity_left(name: str, now: Mapping[str, Sequence[float]], first: Mapping[str, Sequence[float]]) -> float:
    """Mean diversity relative to step 0's; NaN where that is unknown, or 0."""
    before = statistics.fmean(first.get(name, [0.0]))
    return statistics.fmean(now[name]) / before if before else math.nan


def _spread(count: int, most: int) -> list[int]:
    """At most so many of `count` steps, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(number * (count - 1) / (most - 1)) for number in range(most)]


def _to_image(image: Tensor) -> Image.Image:
    pixels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)  # (3, H, W)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
