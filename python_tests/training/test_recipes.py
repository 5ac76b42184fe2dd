"""The shipped recipes: each loads, says what it is, has the published values; those for digits train."""

import json

import pytest

from benchmarks.tiers import tiers
from rftcore import prompts
from rftcore.rewards import registry
from rftcore.training import Trainer, load_config, recipes
from rftcore.training.algorithm_configs import ALGORITHMS, batch_shares

DIGITS = [name for name in recipes.names() if name.startswith("digits_")]
# Those for a GPU's memory are published ones in parts that fit.
PUBLISHED = [name for name in recipes.names() if name not in DIGITS and name not in tiers()]


def load(name, **overrides):
    return load_config(recipes.algorithm(name), name, *(f"--{key}={value}" for key, value in overrides.items()))


@pytest.mark.parametrize("name", recipes.names())
def test_loads_and_says_what_it_is(name):
    config = load(name)
    assert config.output_dir == f"runs/{name}"
    batch_shares(config, processes=1)
    description = recipes.description(name)
    assert 20 < len(description) <= 118
    assert "digits" in description or "Stable Diffusion" in description


def test_every_algorithm_has_both_kinds():
    assert {recipes.algorithm(name) for name in DIGITS} == set(ALGORITHMS)
    assert {recipes.algorithm(name) for name in PUBLISHED} == set(ALGORITHMS)
    assert {recipes.algorithm(name) for name in PUBLISHED if name.endswith("_sdxl")} == {"draft", "ddpo"}


# What each of them is known by; "model" ends the model's name.
VALUES = {
    "draft_sd15": {"learning_rate": 4e-4, "batch_size": 4, "max_train_steps": 2000, "rank": 8, "eta": 0.0},
    "draft_k_sd15": {
        "learning_rate": 2e-4,
        "batch_size": 16,
        "max_train_steps": 10000,
        "rank": 32,
        "backprop_steps": 1,
    },
    "draft_lv_sd15": {"learning_rate": 2e-4, "batch_size": 16, "max_train_steps": 10000, "rank": 32, "noise_draws": 2},
    "draft_plus_sd15": {"learning_rate": 1e-4, "max_grad_norm": 10, "rank": 32, "kl_coeff": 1.0, "backprop_steps": 1},
    "alignprop_sd15": {
        "learning_rate": 1e-3,
        "adam_weight_decay": 0.1,
        "max_grad_norm": 5,
        "eta": 0.0,
        "guidance_scale": 7.5,
        "batch_size": 128,
        "loss_scale": 0.01,
        "reward_target": 10,
        "truncation": "released",
        "truncation_high": 50,
    },
    "alignprop_trl_sd15": {"adam_weight_decay": 1e-4, "max_grad_norm": 1, "eta": 1.0, "guidance_scale": 5.0},
    "refl_sd15": {
        "learning_rate": 1e-5,
        "adam_weight_decay": 1e-2,
        "batch_size": 64,
        "max_train_steps": 100,
        "num_inference_steps": 40,
        "guidance_scale": 1.0,
        "first_step": 30,
        "last_step": 39,
        "margin": 2.0,
        "loss_scale": 1e-3,
    },
    "drtune_sd15": {"train_steps": 3, "earliest_stop": None},
    "ddpo_sd15": {
        "learning_rate": 3e-4,
        "adam_weight_decay": 1e-4,
        "samples_per_epoch": 256,
        "batch_size": 128,
        "clip_range": 1e-4,
        "advantage_clip": 5.0,
        "statistics_buffer_size": 32,
        "statistics_min_count": 16,
        "eta": 1.0,
        "guidance_scale": 5.0,
    },
    "ddpo_sdxl": {"eta": 1.0, "samples_per_epoch": 256, "clip_range": 1e-4},
    "dpok_sd15": {
        "learning_rate": 1e-5,
        "adam_weight_decay": 0.0,
        "max_grad_norm": 0.1,
        "policy_steps": 5,
        "samples_per_epoch": 10,
        "buffer_size": 1000,
        "gradient_accumulation_steps": 12,
        "reward_weight": 10,
        "kl_weight": 0.01,
        "kl": "exact",
        "rank": 4,
        "eta": 1.0,
        "guidance_scale": 7.5,
    },
    "dpok_many_sd15": {"reward_weight": 1000, "kl_weight": 0.1},
    "rwr_sd15": {
        "samples_per_epoch": 10240,
        "temperature": 0.2,
        "inner_epochs": 5,
        "learning_rate": 1e-5,
        "guidance_scale": 5.0,
        "weights": "full",
    },
    "rwr_sparse_sd15": {"weighting": "sparse", "top": 0.1, "inner_epochs": 50},
    "sft_sd15": {"regulariser": "kl_d"},
    "draft_sdxl": {"learning_rate": 4e-4, "batch_size": 4, "backprop_steps": 1},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name):
    config = load(name)
    groups = (config.train, config.sampling, config.lora)
    for key, value in VALUES[name].items():
        holder = next(group for group in groups if hasattr(group, key))
        assert getattr(holder, key) == value, key
    model = config.model.pretrained_model_name_or_path
    assert ("xl" in model) == name.endswith("_sdxl") and model != "rftcore.digits"
    assert config.sampling.num_inference_steps == (40 if name == "refl_sd15" else 50)


@pytest.mark.parametrize("name", tiers())
def test_a_tiers_recipe_is_the_published_one_in_other_parts(name):
    tier, published = load(name), load(name.rpartition("_")[0])
    parts = {"gradient_accumulation_steps", "rollout_batch_size", "backprop_steps"}
    # SDXL's states of 256 samples are too many for 16 GB.
    parts |= {"samples_per_epoch", "batch_size"} if name == "ddpo_sdxl_16gb" else set()
    values, expected = vars(tier.train), vars(published.train)
    assert {key for key in values if values[key] != expected[key]} <= parts
    assert tier.sampling == published.sampling and tier.lora == published.lora and tier.model == published.model
    assert tier.prompts in prompts.KNOWN and tier.held_out_share and tier.reward.function in registry.KNOWN


def test_images_of_the_papers_budgets():
    """DPOK's 20,000 images, 10 a round; DDPO's 100 epochs of 256; as many updates of sparse RWR as of dense."""
    dpok, ddpo = load("dpok_sd15").train, load("ddpo_sd15").train
    assert dpok.max_train_steps // dpok.policy_steps * dpok.samples_per_epoch == 20_000
    assert ddpo.max_train_steps // ddpo.updates_per_epoch * ddpo.samples_per_epoch == 25_600
    assert load("rwr_sd15").train.updates_per_epoch == load("rwr_sparse_sd15").train.updates_per_epoch


SMALL = {
    "reward.images_per_call": 4,
    "eval.num_validation_images": 1,
    "eval.validation_prompts": "[a thin zero, the digit one]",
    "eval.lora_scales": "[]",
    "cpu_threads": 1,
}


def _one_of_each_kind():
    """By a gradient, by the policy's, by regression. Those with other rewards than the judge are test_jpeg's."""
    unseen = {"draft", "ddpo", "rwr"}
    for name in (name for name in DIGITS if "_jpeg_" not in name):
        algorithm = recipes.algorithm(name)
        yield name if algorithm in unseen else pytest.param(name, marks=pytest.mark.slow)
        unseen.discard(algorithm)


@pytest.mark.parametrize("name", _one_of_each_kind())
def test_digits_recipe_trains(name, tmp_path, capsys):
    """One epoch of few samples."""
    train = load(name).train
    small = {"train.batch_size": 4, "train.gradient_accumulation_steps": 1}
    if hasattr(train, "samples_per_epoch"):
        small |= {"train.samples_per_epoch": 4, "train.rollout_batch_size": 4}
    if hasattr(train, "inner_epochs"):
        small |= {"train.inner_epochs": 1}
    if hasattr(train, "policy_steps"):
        small |= {"train.policy_steps": 1}
    if getattr(train, "weighting", None) == "sparse":
        small |= {"train.top": 1.0}
    results = Trainer(load(name, output_dir=tmp_path / "run", **SMALL, **small, **{"train.max_train_steps": 1})).train()
    assert results["steps"] == 1 and results["algorithm"] == recipes.algorithm(name)
    trained, held_out = results["rewards"].items()
    assert trained[0] == "digits" and held_out[0] == "digits_held_out"
    # Something was learnt: the images of the same noise are judged otherwise.
    assert trained[1]["before"] != trained[1]["after"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(line.get("train/skipped_updates", 0) for line in lines) == 0
