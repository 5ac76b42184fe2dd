"""The options of each algorithm, and its config class. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rftcore.errors import UsageError
from rftcore.training.config import RunConfig, SamplingConfig, TrainConfig, group, option


@dataclass
class RewardGradientTrainConfig(TrainConfig):
    """the optimisation"""

    guidance_gradient: Literal["both", "positive"] = option(
        "both",
        "branches of guidance that the gradient flows through; positive: divided by the guidance scale (FlowBP's), "
        "which is biased",
    )


@dataclass
class DraftTrainConfig(RewardGradientTrainConfig):
    """the optimisation"""

    backprop_steps: int | None = option(
        None, "K: the reward's gradient flows through the last K sampling steps; null: through all of them"
    )

    def problems(self, sampling: SamplingConfig) -> list[str]:
        steps = sampling.num_inference_steps
        if self.backprop_steps is None or 1 <= self.backprop_steps <= steps:
            return []
        return [
            f"train.backprop_steps={self.backprop_steps} must lie in [1, sampling.num_inference_steps={steps}], "
            "or be null for all of them"
        ]


@dataclass
class DraftLvTrainConfig(RewardGradientTrainConfig):
    """the optimisation"""

    noise_draws: int = option(
        2, "n: times that the sample is noised and denoised again, each with a gradient", at_least=1
    )

    def problems(self, sampling: SamplingConfig) -> list[str]:
        return _needs_plain_states(sampling)


@dataclass
class DraftPlusTrainConfig(DraftTrainConfig):
    """the optimisation"""

    backprop_steps: int | None = option(1, "K: the gradient flows through the last K sampling steps; null: all")
    kl_coeff: float = option(1.0, "weight of the divergence from the model without its adapter", at_least=0)

    def problems(self, sampling: SamplingConfig) -> list[str]:
        return super().problems(sampling) + _needs_adapter(self, "train.kl_coeff")


@dataclass
class AlignpropTrainConfig(RewardGradientTrainConfig):
    """the optimisation"""

    truncation: Literal["released", "paper", "gaussian", "none"] = option(
        "paper",
        "where eps is detached: released: at each step by chance, as the code of the paper and TRL draw it; paper: before "
        "the last K ~ U(1, T) steps; gaussian: before one drawn step, as the repository's HEAD does; none: nowhere",
    )
    truncation_low: int = option(0, "released: below this step the gradient is never kept")
    truncation_high: int = option(50, "released: from this step on it always is")
    truncation_mean: float = option(42.0, "gaussian: mean of the drawn step")
    truncation_std: float = option(5.0, "gaussian: its standard deviation", above=0)
    reward_target: float | None = option(
        10.0, "the loss is the distance from this reward (released code: 10 for aesthetics, 1 for HPS); null: -reward"
    )
    loss_scale: float = option(0.01, "what the loss is multiplied by", above=0)

    def problems(self, sampling: SamplingConfig) -> list[str]:
        found, steps = [], sampling.num_inference_steps
        if not self.truncation_low < self.truncation_high:
            found.append(
                f"train.truncation_low={self.truncation_low} must be less than "
                f"train.truncation_high={self.truncation_high}"
            )
        if self.truncation == "released" and self.truncation_low >= steps:
            found.append(
                f"train.truncation_low={self.truncation_low} must be less than sampling.num_inference_steps={steps}: no "
                "step would keep a gradient"
            )
        if self.truncation == "gaussian" and not 1 <= self.truncation_mean < steps:
            found.append(
                f"train.truncation_mean={self.truncation_mean} must lie in [1, sampling.num_inference_steps={steps})"
            )
        if self.truncation == "gaussian" and self.truncation_std > steps:
            found.append(
                f"train.truncation_std={self.truncation_std} must be at most sampling.num_inference_steps={steps}"
            )
        return found


@dataclass
class ReflTrainConfig(RewardGradientTrainConfig):
    """the optimisation"""

    first_step: int = option(30, "the earliest step that the gradient may be taken at, from 0", at_least=0)
    last_step: int = option(39, "the latest", at_least=0)
    margin: float = option(2.0, "the loss is max(0, margin - reward)")
    loss_scale: float = option(1e-3, "what the loss is multiplied by", above=0)

    def problems(self, sampling: SamplingConfig) -> list[str]:
        steps = sampling.num_inference_steps
        if self.first_step <= self.last_step < steps:
            return []
        return [
            f"train.first_step={self.first_step} and train.last_step={self.last_step} must be in order and less than "
            f"sampling.num_inference_steps={steps}"
        ]


@dataclass
class DrtuneTrainConfig(RewardGradientTrainConfig):
    """the optimisation"""

    train_steps: int = option(3, "sampling steps that are trained, equally spaced", at_least=1)
    earliest_stop: int | None = option(
        None,
        "the chain stops at random after as many steps as this or more; null: in its last 40%",
        at_least=1,
    )

    def stops_from(self, steps: int) -> int:
        """The earliest stop of a chain of so many steps."""
        return self.earliest_stop if self.earliest_stop is not None else steps - round(0.4 * steps) + 1

    def problems(self, sampling: SamplingConfig) -> list[str]:
        steps = sampling.num_inference_steps
        if self.train_steps <= self.stops_from(steps) <= steps:
            return []
        return [
            f"train.train_steps={self.train_steps}, train.earliest_stop={self.stops_from(steps)} and "
            f"sampling.num_inference_steps={steps} must not fall in this order"
        ]


@dataclass
class RolloutTrainConfig(TrainConfig):
    """the optimisation"""

    samples_per_epoch: int = option(256, "samples between two samplings, over all processes", at_least=1)
    rollout_batch_size: int | None = option(
        None, "samples drawn at once on each process; null: as many as are trained on at once", at_least=1
    )

    @property
    def samples_drawn(self) -> int:
        return self.samples_per_epoch


@dataclass
class PolicyTrainConfig(RolloutTrainConfig):
    """the optimisation"""

    noisiest_fraction: float = option(
        1.0,
        "share of the sampling steps that is trained on, from the noisiest on; 1.0 is the papers'. The last steps draw "
        "little noise, so that a small change of the model changes their probability much: most of the gradient's "
        "variance is theirs, the more the fewer steps there are",
        above=0,
        at_most=1,
    )
    rescore: bool | None = option(
        None,
        "old log-probabilities are made again by the training's own path before the first update; null: where precision "
        "is low, or sampling took another path or batch",
    )


@dataclass
class DdpoTrainConfig(PolicyTrainConfig):
    """the optimisation"""

    batch_size: int = option(
        128, "samples in one optimizer step, each with its timesteps, over all processes", at_least=1
    )
    learning_rate: float = option(3e-4, "AdamW's step size", above=0)
    adam_weight_decay: float = option(1e-4, "AdamW", at_least=0)
    loss: Literal["is", "sf"] = option(
        "is", "is: importance sampling, clipped, several updates an epoch; sf: score function, one update an epoch"
    )
    inner_epochs: int = option(1, "times that an epoch's samples are trained on", at_least=1)
    clip_range: float = option(1e-4, "the ratio of new to old probability is clipped to 1 +- this", above=0)
    advantage_clip: float = option(5.0, "advantages are clipped to +- this", above=0)
    timestep_fraction: float = option(1.0, "share of each sample's timesteps that is trained on", above=0, at_most=1)
    per_prompt_statistics: bool = option(True, "rewards are standardised by their prompt's history, not by the epoch")
    statistics_buffer_size: int = option(32, "rewards that are kept of each prompt", at_least=1)
    statistics_min_count: int = option(16, "fewer rewards of a prompt: the epoch's statistics are used", at_least=1)
    merged_rollouts: bool = option(False, "the adapter is merged into copies of the weights while sampling")

    @property
    def updates_per_epoch(self) -> int:
        return self.inner_epochs * (self.samples_per_epoch // self.batch_size)

    def problems(self, sampling: SamplingConfig) -> list[str]:
        found = []
        if self.samples_per_epoch % self.batch_size:
            nearest = max(1, round(self.samples_per_epoch / self.batch_size)) * self.batch_size
            found.append(
                f"train.samples_per_epoch={self.samples_per_epoch} does not divide into batches of "
                f"train.batch_size={self.batch_size}; the nearest that does is {nearest}"
            )
        if self.loss == "sf" and self.updates_per_epoch != 1:
            found.append(
                f"train.loss=sf takes one update of fresh samples, and train.samples_per_epoch={self.samples_per_epoch}, "
                f"train.batch_size={self.batch_size} and train.inner_epochs={self.inner_epochs} make "
                f"{self.updates_per_epoch}; set train.batch_size={self.samples_per_epoch} and train.inner_epochs=1, "
                "or train.loss=is"
            )
        if int(self.timestep_fraction * sampling.num_inference_steps) < 1:
            found.append(
                f"train.timestep_fraction={self.timestep_fraction} of {sampling.num_inference_steps} steps is less than "
                "one step; raise it"
            )
        return found + _needs_noise(sampling)


@dataclass
class DpokTrainConfig(PolicyTrainConfig):
    """the optimisation"""

    samples_per_epoch: int = option(10, "samples between two samplings, over all processes", at_least=1)
    batch_size: int = option(24, "transitions in one optimizer step, over all processes and parts together", at_least=1)
    gradient_accumulation_steps: int = option(
        12, "parts that each process's share of the batch is computed in: less memory, same gradient", at_least=1
    )
    learning_rate: float = option(1e-5, "AdamW's step size", above=0)
    adam_weight_decay: float = option(0.0, "AdamW", at_least=0)
    max_grad_norm: float | None = option(0.1, "gradient norm is clipped to this; null: not clipped", above=0)
    policy_steps: int = option(5, "optimizer steps of an epoch", at_least=1)
    buffer_size: int = option(1000, "transitions that are kept, the newest", at_least=1)
    clip_range: float = option(1e-4, "the ratio of new to old probability is clamped to 1 +- this", above=0)
    reward_weight: float = option(
        10.0, "weight of the advantage (released code: 10 for one prompt, 1000 for many)", at_least=0
    )
    kl_weight: float = option(0.01, "weight of the KL (released code: .01 for one prompt, .1 for many)", at_least=0)
    kl: Literal["exact", "uniform"] = option(
        "exact",
        "exact: of the steps' Gaussians, as in the paper; uniform: mean squared difference of eps, as in the code",
    )
    reward_filter: bool = option(False, "rewards below 0 count as 0")
    value_updates: int = option(1, "updates of the value function in an epoch, before the optimizer steps", at_least=0)
    value_minibatches: int = option(5, "parts that one of them is computed in", at_least=1)
    value_batch_size: int = option(256, "transitions in one of those parts", at_least=1)
    value_learning_rate: float = option(1e-4, "the value function's AdamW's step size", above=0)

    @property
    def updates_per_epoch(self) -> int:
        return self.policy_steps

    def problems(self, sampling: SamplingConfig) -> list[str]:
        return _needs_noise(sampling) + _needs_adapter(self, "DPOK's KL")


@dataclass
class RegressionTrainConfig(RolloutTrainConfig):
    """the optimisation"""

    batch_size: int = option(128, "samples in one optimizer step, over all processes and parts together", at_least=1)
    learning_rate: float = option(1e-5, "AdamW's step size", above=0)
    inner_epochs: int = option(5, "times that an epoch's samples are trained on", at_least=1)

    @property
    def samples_kept(self) -> int:
        """Of an epoch's samples, those that are trained on."""
        return self.samples_per_epoch

    @property
    def updates_per_epoch(self) -> int:
        return max(1, self.inner_epochs * self.samples_kept // self.batch_size)

    def problems(self, sampling: SamplingConfig) -> list[str]:
        return _needs_plain_states(sampling)


@dataclass
class RwrTrainConfig(RegressionTrainConfig):
    """the optimisation"""

    samples_per_epoch: int = option(10240, "samples between two samplings, over all processes", at_least=1)
    weighting: Literal["dense", "sparse"] = option(
        "dense", "dense: softmax of the rewards; sparse: the best samples count 1, the others nothing"
    )
    temperature: float = option(0.2, "dense: what rewards are multiplied by in the softmax", above=0)
    top: float = option(0.1, "sparse: share of the samples that counts", above=0, at_most=1)
    per_prompt: bool = option(False, "weights compare the samples of one prompt only")

    @property
    def samples_kept(self) -> int:
        return (
            self.samples_per_epoch
            if self.weighting == "dense"
            else max(1, int(self.top * self.samples_per_epoch + 1e-9))
        )


@dataclass
class SftTrainConfig(RegressionTrainConfig):
    """the optimisation"""

    regulariser: Literal["kl_o", "kl_d"] = option(
        "kl_d", "kl_o: only samples of the pretrained model; kl_d: also the divergence from it"
    )
    gamma: float = option(2.0, "what is added to the reward to make a sample's weight")
    beta: float = option(0.01, "kl_d: weight of the divergence", at_least=0)

    def problems(self, sampling: SamplingConfig) -> list[str]:
        return super().problems(sampling) + _needs_adapter(self, "sampling with it")


@dataclass
class DraftConfig(RunConfig):
    """DRaFT and DRaFT-K (arXiv 2309.17400): the reward's own gradient, through the sampling chain."""

    algorithm: ClassVar[str] = "draft"
    train: DraftTrainConfig = group(DraftTrainConfig)


@dataclass
class DraftLvConfig(RunConfig):
    """DRaFT-LV (arXiv 2309.17400): DRaFT-1, its variance lowered by noising the sample again."""

    algorithm: ClassVar[str] = "draft_lv"
    train: DraftLvTrainConfig = group(DraftLvTrainConfig)


@dataclass
class DraftPlusConfig(RunConfig):
    """DRaFT+ (NeMo): DRaFT-K with a divergence from the pretrained model."""

    algorithm: ClassVar[str] = "draft_plus"
    train: DraftPlusTrainConfig = group(DraftPlusTrainConfig)


@dataclass
class AlignpropConfig(RunConfig):
    """AlignProp (arXiv 2310.03739): the reward's gradient, truncated at random."""

    algorithm: ClassVar[str] = "alignprop"
    train: AlignpropTrainConfig = group(AlignpropTrainConfig)


@dataclass
class ReflConfig(RunConfig):
    """ReFL (arXiv 2304.05977): the gradient of the x0 that is predicted at one late step."""

    algorithm: ClassVar[str] = "refl"
    train: ReflTrainConfig = group(ReflTrainConfig)


@dataclass
class DrtuneConfig(RunConfig):
    """DRTune (arXiv 2405.00760): the reward's gradient at a few steps, with the UNet's input detached."""

    algorithm: ClassVar[str] = "drtune"
    train: DrtuneTrainConfig = group(DrtuneTrainConfig)


@dataclass
class DdpoConfig(RunConfig):
    """DDPO (arXiv 2305.13301): policy gradient over the denoising steps; the reward needs no gradient."""

    algorithm: ClassVar[str] = "ddpo"
    sampling: SamplingConfig = group(lambda: SamplingConfig(guidance_scale=5.0, eta=1.0))
    train: DdpoTrainConfig = group(DdpoTrainConfig)


@dataclass
class DpokConfig(RunConfig):
    """DPOK (arXiv 2305.16381): policy gradient with a KL to the pretrained model and a value function."""

    algorithm: ClassVar[str] = "dpok"
    sampling: SamplingConfig = group(lambda: SamplingConfig(eta=1.0))
    train: DpokTrainConfig = group(DpokTrainConfig)


@dataclass
class RwrConfig(RunConfig):
    """Reward-weighted regression, dense or sparse: denoising of own samples, weighted by their rewards."""

    algorithm: ClassVar[str] = "rwr"
    train: RwrTrainConfig = group(RwrTrainConfig)


@dataclass
class SftConfig(RunConfig):
    """Supervised fine-tuning on the pretrained model's samples with KL regularisation (DPOK's baseline)."""

    algorithm: ClassVar[str] = "sft"
    train: SftTrainConfig = group(SftTrainConfig)


ALGORITHMS: dict[str, type[RunConfig]] = {
    kind.algorithm: kind
    for kind in (
        DraftConfig,
        DraftLvConfig,
        DraftPlusConfig,
        AlignpropConfig,
        ReflConfig,
        DrtuneConfig,
        DdpoConfig,
        DpokConfig,
        RwrConfig,
        SftConfig,
    )
}


def batch_shares(config: RunConfig, processes: int) -> tuple[int, int]:
    """Rows of one optimizer step on each process, and of each of its accumulation parts.

    Raises: UsageError when the batch, or the samples of an epoch, do not divide, with the nearest number that does.
    """
    batch, accumulation = config.train.batch_size, config.train.gradient_accumulation_steps
    _check_divides("train.batch_size", batch, processes * accumulation, processes, accumulation)
    if isinstance(config.train, RolloutTrainConfig):
        _check_divides("train.samples_per_epoch", config.train.samples_per_epoch, processes, processes, 1)
    return batch // processes, batch // (processes * accumulation)


def _check_divides(key: str, value: int, parts: int, processes: int, accumulation: int) -> None:
    if value % parts:
        into = f"{processes} process(es)"
        into += f" x train.gradient_accumulation_steps={accumulation}" if key == "train.batch_size" else ""
        nearest = max(1, round(value / parts)) * parts
        raise UsageError(f"{key}={value} does not divide into {into}; the nearest that does is {nearest}")


def _needs_adapter(train: TrainConfig, what: str) -> list[str]:
    """The pretrained model is the one whose adapter is off."""
    if train.weights == "lora":
        return []
    return [f"train.weights={train.weights} leaves no pretrained model to compare with, which {what} needs; set lora"]


def _needs_plain_states(sampling: SamplingConfig) -> list[str]:
    """Samples are noised as DDIM and DDPM do."""
    if sampling.scheduler in ("ddim", "ddpm"):
        return []
    return [
        f"sampling.scheduler={sampling.scheduler} is not served by an algorithm that trains on noised samples; set ddim "
        "or ddpm"
    ]


def _needs_noise(sampling: SamplingConfig) -> list[str]:
    """A policy gradient needs steps with a probability."""
    if sampling.scheduler == "euler" or (sampling.scheduler == "ddim" and not sampling.eta):
        return [
            f"sampling.scheduler={sampling.scheduler} with sampling.eta={sampling.eta} takes steps without noise, which "
            "have no log-probability; set sampling.scheduler=ddim and sampling.eta=1.0, or another that draws noise"
        ]
    return []
