"""Every training loop against the same loop by hand: the gradient before each optimizer step, in fp64, to 1e-11."""

import copy
import dataclasses
import functools
from unittest.mock import patch

import pytest
import tiny
import tiny_models
import torch
from accelerate.state import AcceleratorState
from by_hand import ByHand, ValueByHand
from diffusers import DDPMPipeline, StableDiffusionPipeline

from rftcore.rewards import declare
from rftcore.sampling.denoiser import Denoiser
from rftcore.training import RunError, Trainer, weights
from rftcore.training.algorithm_configs import ALGORITHMS
from rftcore.training.batches import shuffled_in_lanes
from rftcore.training.engine import Scores
from rftcore.training.methods import rollouts
from rftcore.training.parsing import build

STEPS = 4


@declare(differentiable=True)
def likes(images, prompts, metadata=None):
    """Each prompt likes another brightness."""
    wanted = torch.tensor([sum(map(ord, prompt)) % 7 / 7 for prompt in prompts], dtype=images.dtype)
    return -5 * (images - wanted[:, None, None, None]).square().mean(dim=(1, 2, 3)) + images[:, 0].mean(dim=(1, 2))


@declare(differentiable=True)
def likes_all_but_one(images, prompts, metadata=None):
    """Has no opinion of one prompt."""
    unknown = torch.tensor([prompt.endswith("two") for prompt in prompts])
    return torch.where(unknown, torch.nan, likes(images, prompts))


@declare(differentiable=True)
def likes_only_one(images, prompts, metadata=None):
    known = torch.tensor([prompt.endswith("two") for prompt in prompts])
    return torch.where(known, likes(images, prompts), -0.5)


@declare(differentiable=True)
def is_indifferent_to_one(images, prompts, metadata=None):
    known = torch.tensor([not prompt.endswith("two") for prompt in prompts])
    return torch.where(known, likes(images, prompts), -0.5)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixels")
    tiny_models.save("pixels", folder)
    return folder


@functools.cache
def loaded(folder, kind):
    """The pipeline in fp64."""
    if kind == "pixels":
        return DDPMPipeline.from_pretrained(folder).to(torch.float64)
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(torch.float64)


class Pair:
    """A run and the same by hand, with the UNet's evaluations and the reward's counted."""

    def __init__(
        self,
        folder,
        output_dir,
        algorithm,
        train,
        kind="sd",
        prediction_type="epsilon",
        function=likes,
        planned=True,
        **groups,
    ):
        pipes = [copy.deepcopy(loaded(folder, kind)) for _ in range(2)]
        for pipe in pipes:
            pipe.scheduler.register_to_config(prediction_type=prediction_type)
        values = tiny.values(folder, output_dir, **groups)
        values["sampling"] = {"num_inference_steps": STEPS, "guidance_scale": tiny_models.GUIDANCE[kind], "eta": 1.0}
        values["sampling"] |= groups.get("sampling", {})
        values["train"] = {
            "batch_size": 2,
            "max_grad_norm": None,
            "learning_rate": 1e-3,
            "max_train_steps": 2520,
            **train,
        }
        if kind == "pixels":
            values["prompts"] = [""]
        config = build(ALGORITHMS[algorithm], values)
        self.evaluations = self.queries = 0

        @declare(differentiable=True)
        def counted(images, prompts, metadata=None):
            self.queries += len(images)
            return function(images, prompts)

        self.trainer = Trainer(config, reward=counted, pipeline=pipes[0])
        self.method = self.trainer.method
        unet = self.trainer.engine.model
        self.parameters = {name: p for name, p in unet.named_parameters() if p.requires_grad}
        source = torch.Generator().manual_seed(3)
        for parameter in self.parameters.values():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=source, dtype=torch.float64)
        if not planned:
            # What a hook does cannot be planned for: every step is replayed, and no time goes into a plan.
            unet.register_forward_pre_hook(lambda module, inputs: None)
        self.hand = ByHand(pipes[1], self.trainer, function)

    def _count(self, evaluate):
        """Rows of the UNet's input; a hook on the UNet would change how its memory is planned."""

        def counted(denoiser, x, *arguments, guided, **options):
            # What is planned with has no data.
            if type(x) is torch.Tensor:
                self.evaluations += len(x) * (2 if guided else 1)
            return evaluate(denoiser, x, *arguments, guided=guided, **options)

        return counted

    def epoch(self, epoch=1):
        """Updates of an epoch, with an optimizer step after each."""
        self.evaluations = self.queries = 0
        counted = [0, 0]
        with patch.object(Denoiser, "__call__", self._count(Denoiser.__call__)):
            for update in self.method.epoch(epoch):
                counted[0] += update.unet_evaluations
                counted[1] += update.reward_queries
                yield update
                self.trainer.optimizer.step()
                self.trainer.optimizer.zero_grad()
                self.hand.follow()
        assert counted == [self.evaluations, self.queries]

    def gradient(self):
        return {name: parameter.grad for name, parameter in self.parameters.items()}

    def check(self, expected, tolerance=1e-11):
        ours = torch.cat([self.gradient()[name].flatten() for name in expected])
        theirs = torch.cat([gradient.flatten() for gradient in expected.values()])
        assert ours.isfinite().all() and torch.linalg.norm(theirs) > 0
        assert torch.linalg.norm(ours - theirs) <= tolerance * torch.linalg.norm(theirs)


def alignprop_loss(r):
    return 0.01 * (r - 10).abs()


def refl_loss(r):
    return 1e-3 * torch.relu(2 - r)


def draft_loss(r):
    return -r


@pytest.mark.parametrize(
    ("algorithm", "train", "loss", "options"),
    [
        ("draft", {}, draft_loss, {}),
        ("draft", {"guidance_gradient": "positive"}, draft_loss, {"planned": False}),
        ("draft", {}, draft_loss, {"sampling": {"eta": 0.0}, "prediction_type": "v_prediction", "planned": False}),
        (
            "draft",
            {"gradient_accumulation_steps": 2},
            draft_loss,
            {"sampling": {"scheduler": "ddpm", "eta": None}, "planned": False},
        ),
        ("draft", {}, draft_loss, {"memory": {"budget": "1MiB"}}),
        ("draft", {"backprop_steps": 1, "gradient_accumulation_steps": 2}, draft_loss, {}),
        (
            "alignprop",
            {"truncation": "released", "truncation_low": 0, "truncation_high": 4},
            alignprop_loss,
            {"seed": 2},
        ),
        ("alignprop", {"truncation": "paper"}, alignprop_loss, {"planned": False}),
        ("refl", {"first_step": 1, "last_step": 3}, refl_loss, {"seed": 1, "planned": False}),
        ("drtune", {"train_steps": 2, "earliest_stop": 3}, draft_loss, {"seed": 2}),
    ],
)
def test_reward_gradients(model, tmp_path, algorithm, train, loss, options):
    pair = Pair(model, tmp_path, algorithm, train, **options)
    path = pair.method._drawn_path(1)
    for _ in pair.epoch():
        assert bool(pair.method.sampler.plan.replays) == ("memory" in options or "planned" in options)
        pair.hand.reward_gradient(1, loss, path, positive_only="guidance_gradient" in train)
        pair.check(pair.hand.take())
    assert path.stop in {"refl": (2, 3), "drtune": (3,)}.get(algorithm, (None,))


@pytest.mark.parametrize(
    ("algorithm", "train", "options"),
    [
        ("draft_lv", {"noise_draws": 2}, {}),
        ("draft_lv", {"guidance_gradient": "positive"}, {}),
        ("draft_lv", {"gradient_accumulation_steps": 2}, {"prediction_type": "v_prediction"}),
        ("draft_plus", {"backprop_steps": 2, "kl_coeff": 0.7}, {}),
        ("draft_plus", {"backprop_steps": 1, "gradient_accumulation_steps": 2}, {}),
    ],
)
def test_reward_gradients_of_several_terms(model, tmp_path, algorithm, train, options):
    pair = Pair(model, tmp_path, algorithm, train, planned=False, **options)
    for _ in pair.epoch():
        if "guidance_gradient" in train:
            pair.hand.draft_lv(1, positive_only=True)
        else:
            getattr(pair.hand, algorithm)(1)
        pair.check(pair.hand.take())


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_reward_gradients_of_an_unconditional_model(pixels, tmp_path, scheduler):
    sampling = {"scheduler": scheduler, "eta": 1.0 if scheduler == "ddim" else None}
    pair = Pair(
        pixels, tmp_path, "draft", {"backprop_steps": 3}, kind="pixels", sampling=sampling, planned=scheduler == "ddim"
    )
    for _ in pair.epoch():
        pair.hand.reward_gradient(1, draft_loss, pair.method._drawn_path(1))
        pair.check(pair.hand.take())


@pytest.mark.parametrize(
    ("kind", "epochs", "train", "options"),
    [
        (
            "sd",
            2,
            {
                "inner_epochs": 2,
                "statistics_min_count": 3,
                "statistics_buffer_size": 3,
                "advantage_clip": 1.2,
                "clip_range": 1e-3,
            },
            {},
        ),
        (
            "sd",
            1,
            {
                "inner_epochs": 2,
                "per_prompt_statistics": False,
                "timestep_fraction": 0.5,
                "gradient_accumulation_steps": 2,
            },
            {"prediction_type": "v_prediction"},
        ),
        ("sd", 1, {"loss": "sf", "batch_size": 6, "gradient_accumulation_steps": 3}, {}),
        ("sd", 1, {}, {"sampling": {"scheduler": "ddpm", "eta": None}}),
        ("pixels", 1, {}, {}),
    ],
)
def test_ddpo(model, pixels, tmp_path, kind, epochs, train, options):
    """The optimizer's steps leave the clip range."""
    train = {"samples_per_epoch": 6, "clip_range": 5e-3, **train}
    pair = Pair(model if kind == "sd" else pixels, tmp_path, "ddpo", train, kind=kind, **options)
    remembered, ratios = {}, []
    for epoch in range(1, epochs + 1):
        for _, expected in zip(pair.epoch(epoch), pair.hand.ddpo(epoch, remembered), strict=True):
            pair.check(expected)
            ratios += pair.hand.ratios
    if pair.trainer.config.train.loss == "is":
        outside = [abs(ratio - 1) > pair.trainer.config.train.clip_range for ratio in ratios]
        assert 0.1 < sum(outside) / len(outside) < 0.9


@pytest.mark.parametrize(
    ("train", "prediction_type"),
    [
        ({"kl": "exact"}, "epsilon"),
        ({"kl": "uniform", "reward_filter": True, "value_minibatches": 2, "value_updates": 2}, "v_prediction"),
    ],
)
def test_dpok(model, tmp_path, train, prediction_type):
    """Two epochs, of which the buffer does not hold all."""
    train = {
        "samples_per_epoch": 3,
        "buffer_size": 20,
        "batch_size": 8,
        "gradient_accumulation_steps": 2,
        "policy_steps": 2,
        "value_batch_size": 7,
        "value_learning_rate": 1e-2,
        "clip_range": 5e-4,
        "kl_weight": 0.3,
        **train,
    }
    pair = Pair(model, tmp_path, "dpok", train, prediction_type=prediction_type)
    value, ratios = ValueByHand(pair.hand, pair.method.value), []
    for epoch in (1, 2):
        for _, expected in zip(pair.epoch(epoch), pair.hand.dpok(epoch, value), strict=True):
            pair.check(expected)
            ratios += pair.hand.ratios
    for name, parameter in pair.method.value.named_parameters():
        assert torch.linalg.norm(parameter - value.weights[name]) <= 1e-11 * torch.linalg.norm(parameter)
    outside = [abs(ratio - 1) > pair.trainer.config.train.clip_range for ratio in ratios]
    assert 0.1 < sum(outside) / len(outside) < 0.9


@pytest.mark.parametrize(
    ("algorithm", "train", "options"),
    [
        ("rwr", {"weighting": "dense", "temperature": 3.0, "gradient_accumulation_steps": 2}, {}),
        ("rwr", {"weighting": "dense", "per_prompt": True}, {"prediction_type": "v_prediction"}),
        ("rwr", {"weighting": "sparse", "top": 0.5}, {}),
        (
            "rwr",
            {"weighting": "sparse", "top": 0.5, "per_prompt": True},
            {"sampling": {"scheduler": "ddpm", "eta": None}},
        ),
        ("sft", {"regulariser": "kl_o", "gamma": 0.3, "gradient_accumulation_steps": 2}, {}),
        ("sft", {"regulariser": "kl_d", "gamma": 0.3, "beta": 0.8}, {}),
    ],
)
def test_regressions(model, tmp_path, algorithm, train, options):
    train = {"samples_per_epoch": 6, "batch_size": 2, "inner_epochs": 1, **train}
    pair = Pair(model, tmp_path, algorithm, train, **options)
    for _, expected in zip(pair.epoch(), pair.hand.regression(1), strict=True):
        pair.check(expected)


@pytest.mark.parametrize(
    ("algorithm", "train"),
    [
        ("draft", {"batch_size": 3}),
        ("draft", {"batch_size": 3, "gradient_accumulation_steps": 3}),
        ("draft_lv", {"batch_size": 3}),
        ("draft_plus", {"batch_size": 3}),
        ("ddpo", {"batch_size": 3, "samples_per_epoch": 6, "per_prompt_statistics": False}),
        ("ddpo", {"batch_size": 6, "samples_per_epoch": 6, "statistics_min_count": 2}),
        ("dpok", {"samples_per_epoch": 3, "batch_size": 4, "gradient_accumulation_steps": 2, "policy_steps": 1}),
        ("rwr", {"samples_per_epoch": 6, "inner_epochs": 1, "per_prompt": True}),
        ("rwr", {"samples_per_epoch": 6, "inner_epochs": 1, "weighting": "sparse", "top": 0.5}),
        ("sft", {"samples_per_epoch": 6, "inner_epochs": 1}),
    ],
)
def test_dropped_samples_have_no_part_in_the_gradient(model, tmp_path, algorithm, train):
    """What depends on the reward is as if they had the weight 0; DRaFT+'s divergence does not depend on it."""
    pair = Pair(model, tmp_path, algorithm, train, function=likes_all_but_one, planned=False, reward={"on_nan": "drop"})
    hand = pair.hand
    if algorithm == "draft":
        expected = once(lambda: hand.reward_gradient(1, draft_loss, pair.method._drawn_path(1)), hand.take)
    elif algorithm in ("draft_lv", "draft_plus"):
        expected = once(lambda: getattr(hand, algorithm)(1), hand.take)
    elif algorithm == "ddpo":
        expected = hand.ddpo(1, {})
    elif algorithm == "dpok":
        expected = hand.dpok(1, ValueByHand(hand, pair.method.value))
    else:
        expected = hand.regression(1)
    dropped = 0
    for update, gradient in zip(pair.epoch(), expected, strict=True):
        pair.check(gradient)
        dropped += sum(int(scores.rewards.isnan().sum()) for scores in update.scores)
    assert dropped == pair.queries / 3 if algorithm != "draft_lv" else 1


def once(*parts):
    """A generator of the last part's result, once all parts have run."""
    yield [part() for part in parts][-1]


@pytest.mark.parametrize("algorithm", ["ddpo", "dpok", "rwr", "sft"])
def test_an_epoch_whose_every_sample_is_dropped(model, tmp_path, algorithm):
    pair = Pair(
        model,
        tmp_path,
        algorithm,
        {"samples_per_epoch": 2, "batch_size": 2, "gradient_accumulation_steps": 1},
        function=lambda images, prompts: images.mean(dim=(1, 2, 3)) * torch.nan,
        reward={"on_nan": "drop"},
    )
    for epoch in (1, 2):
        updates = list(pair.epoch(epoch))
        assert len(updates) == pair.trainer.config.train.updates_per_epoch
        assert all(update.skipped for update in updates)
        assert Scores.cat(updates[0].scores).rewards.isnan().all()


def test_ddpo_skips_batches_without_an_advantage(model, tmp_path):
    """The first of them would otherwise look like a gradient that something has cut."""
    train = {"samples_per_epoch": 6, "batch_size": 1, "inner_epochs": 2, "statistics_min_count": 2}
    pair = Pair(model, tmp_path, "ddpo", train, function=likes_only_one)
    skipped = []
    for update, expected in zip(pair.epoch(), pair.hand.ddpo(1, {}), strict=True):
        skipped.append(update.skipped is not None)
        if skipped[-1]:
            assert not any(gradient.any() for gradient in expected.values())
            assert all(gradient is None for gradient in pair.gradient().values())
        else:
            pair.check(expected)
            reported = "train/max_log_ratio_before_update" in update.largest
            assert reported == (skipped.count(False) == 1)
    assert skipped.count(True) == 8 and skipped[0]


def test_sft_counts_samples_of_weight_zero(model, tmp_path):
    """Their share of the mean, and of the divergence, is theirs as any other's."""
    train = {"samples_per_epoch": 6, "inner_epochs": 1, "gamma": 0.5, "beta": 0.8}
    pair = Pair(model, tmp_path, "sft", train, function=is_indifferent_to_one)
    for _, expected in zip(pair.epoch(), pair.hand.regression(1), strict=True):
        pair.check(expected)


def spoil(monkeypatch, algorithm, by):
    """Rollouts' log-probabilities are off, as another path than training's makes them."""

    def draw(*arguments, **options):
        rollout = rollouts.draw(*arguments, **options)
        trajectory = rollout.trajectory
        wrong = dataclasses.replace(trajectory, log_probs=trajectory.log_probs + by)
        return dataclasses.replace(rollout, trajectory=wrong)

    monkeypatch.setattr(f"rftcore.training.methods.{algorithm}.draw", draw)


@pytest.mark.parametrize("merged", [False, True])
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
    ("algorithm", "train"), [("ddpo", {"samples_per_epoch": 4, "inner_epochs": 2, "rescore": False}), ("dpok", DPOK)]
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


@pytest.mark.parametrize("merged", [False, True])
def test_ratio_before_the_first_update_in_bf16(model, tmp_path, accelerate_anew, merged):
    assert log_ratio(model, tmp_path / "1", "bf16", True, merged_rollouts=merged) == 0
    if merged:
        with pytest.raises(RunError, match="more than a tenth of train.clip_range"):
            log_ratio(model, tmp_path / "2", "bf16", True, merged_rollouts=True, rescore=False)


def test_lanes_are_shuffled_by_themselves():
    lanes = shuffled_in_lanes(5, 4, 0, "lanes", 1, 1)
    samples = lanes * 4 + torch.arange(4)
    assert sorted(samples.flatten().tolist()) == list(range(20))
    assert (samples % 4 == torch.arange(4)).all()
    assert len({tuple(lane) for lane in lanes.T.tolist()}) > 1
