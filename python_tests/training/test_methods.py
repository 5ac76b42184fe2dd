"""Every training loop against the same loop by hand: the gradient before each optimizer step, in fp64, to 1e-11."""

import pytest
import tiny_models
import torch
from by_hand import ValueByHand
from pairs import Pair, likes

from rftcore.rewards import declare
from rftcore.training.batches import shuffled_in_lanes
from rftcore.training.engine import Scores


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
        pytest.param(
            "draft", {"guidance_gradient": "positive"}, draft_loss, {"planned": False}, marks=pytest.mark.slow
        ),
        ("draft", {}, draft_loss, {"sampling": {"eta": 0.0}, "prediction_type": "v_prediction", "planned": False}),
        (
            "draft",
            {"gradient_accumulation_steps": 2},
            draft_loss,
            {"sampling": {"scheduler": "ddpm", "eta": None}, "planned": False},
        ),
        ("draft", {}, draft_loss, {"memory": {"budget": "1MiB"}}),
        pytest.param(
            "draft", {"backprop_steps": 1, "gradient_accumulation_steps": 2}, draft_loss, {}, marks=pytest.mark.slow
        ),
        (
            "alignprop",
            {"truncation": "released", "truncation_low": 0, "truncation_high": 4},
            alignprop_loss,
            {"seed": 2},
        ),
        pytest.param("alignprop", {"truncation": "paper"}, alignprop_loss, {"planned": False}, marks=pytest.mark.slow),
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
        pytest.param("sd", 1, {}, {"sampling": {"scheduler": "ddpm", "eta": None}}, marks=pytest.mark.slow),
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
        pytest.param(
            "rwr",
            {"weighting": "dense", "per_prompt": True},
            {"prediction_type": "v_prediction"},
            marks=pytest.mark.slow,
        ),
        pytest.param("rwr", {"weighting": "sparse", "top": 0.5}, {}, marks=pytest.mark.slow),
        (
            "rwr",
            {"weighting": "sparse", "top": 0.5, "per_prompt": True},
            {"sampling": {"scheduler": "ddpm", "eta": None}},
        ),
        ("sft", {"regulariser": "kl_o", "gamma": 0.3, "gradient_accumulation_steps": 2}, {}),
        pytest.param("sft", {"regulariser": "kl_d", "gamma": 0.3, "beta": 0.8}, {}, marks=pytest.mark.slow),
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
        pytest.param("draft", {"batch_size": 3, "gradient_accumulation_steps": 3}, marks=pytest.mark.slow),
        ("draft_lv", {"batch_size": 3}),
        pytest.param("draft_plus", {"batch_size": 3}, marks=pytest.mark.slow),
        ("ddpo", {"batch_size": 3, "samples_per_epoch": 6, "per_prompt_statistics": False}),
        pytest.param(
            "ddpo", {"batch_size": 6, "samples_per_epoch": 6, "statistics_min_count": 2}, marks=pytest.mark.slow
        ),
        ("dpok", {"samples_per_epoch": 3, "batch_size": 4, "gradient_accumulation_steps": 2, "policy_steps": 1}),
        ("rwr", {"samples_per_epoch": 6, "inner_epochs": 1, "per_prompt": True}),
        pytest.param(
            "rwr",
            {"samples_per_epoch": 6, "inner_epochs": 1, "weighting": "sparse", "top": 0.5},
            marks=pytest.mark.slow,
        ),
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


def test_lanes_are_shuffled_by_themselves():
    lanes = shuffled_in_lanes(5, 4, 0, "lanes", 1, 1)
    samples = lanes * 4 + torch.arange(4)
    assert sorted(samples.flatten().tolist()) == list(range(20))
    assert (samples % 4 == torch.arange(4)).all()
    assert len({tuple(lane) for lane in lanes.T.tolist()}) > 1
