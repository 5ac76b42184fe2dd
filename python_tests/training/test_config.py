"""Configs: recipes load, values are checked, what is written is read back."""

import subprocess
import sys
import typing

import pytest

from rftcore.errors import UsageError
from rftcore.training import recipes, schedulers
from rftcore.training.algorithm_configs import (
    AlignpropConfig,
    DdpoConfig,
    DpokConfig,
    DraftConfig,
    DraftPlusConfig,
    DrtuneConfig,
    ReflConfig,
    SftConfig,
    batch_shares,
)
from rftcore.training.config import SamplingConfig
from rftcore.training.parsing import build, load_config, to_yaml


def test_resolved_config_reads_back_equal(tmp_path):
    config = load_config(
        "draft", "digits_draft", "--train.adam_epsilon=1e-7", "--eval.validation_prompts=[a cat, a dog]"
    )
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert config.train.adam_epsilon == 1e-7
    assert config.eval.validation_prompts == ["a cat", "a dog"]
    assert load_config("draft", tmp_path / "config.yaml") == config


def test_paper_recipe_has_the_papers_values():
    config = load_config("draft", "draft_sd15")
    train, sampling = config.train, config.sampling
    assert (train.learning_rate, train.batch_size, train.max_train_steps, config.lora.rank) == (4e-4, 4, 2000, 8)
    assert (train.adam_beta1, train.adam_beta2, train.adam_weight_decay) == (0.9, 0.999, 0.1)
    assert (sampling.num_inference_steps, sampling.guidance_scale) == (50, 7.5)


@pytest.mark.parametrize(
    ("group", "key", "value", "message"),
    [
        ("train", "backprop_steps", 51, r"train.backprop_steps=51 must lie in \[1, sampling.num_inference_steps=50\]"),
        ("train", "backprop_steps", 0, "train.backprop_steps=0 must lie in"),
        ("train", "backprop_steps", -1, "train.backprop_steps=-1 must lie in"),
        ("train", "batch_size", 0, "train.batch_size=0 must be at least 1"),
        ("train", "learning_rate", float("nan"), "train.learning_rate=nan must be greater than 0"),
        ("train", "adam_beta2", 1.0, "train.adam_beta2=1.0 must be at least 0 and less than 1"),
        ("train", "lr_warmup_steps", 5, "no effect with train.lr_scheduler=constant"),
        ("sampling", "eta", 1.5, "sampling.eta=1.5 must be at least 0 and at most 1"),
        ("lora", "target_modules", [], "lora.target_modules is empty"),
        ("eval", "validation_steps", 0, "eval.validation_steps=0 must be at least 1"),
        ("eval", "lora_scales", [0.0, float("nan")], "eval.lora_scales=.* must be finite"),
        ("train", "learning_rate", float("inf"), "train.learning_rate=inf must be finite"),
        ("train", "max_train_steps", 10**400, "below 2.63"),
        ("train", "batch_size", None, "train.batch_size=None must be a whole number"),
        ("model", "fuse_lora", [3], "model.fuse_lora=.3. must be a list of text"),
        ("reward", "options", None, "reward.options=None must be a mapping"),
    ],
)
def test_values_out_of_range_are_named(group, key, value, message):
    with pytest.raises(UsageError, match=message):
        build(DraftConfig, {group: {key: value}})


def test_all_problems_are_told_at_once():
    with pytest.raises(UsageError, match="train.batch_size.*lora.rank"):
        build(DraftConfig, {"train": {"batch_size": 0}, "lora": {"rank": 0}})


def test_numbers_out_of_bounds_are_told_before_anything_is_counted_with_them():
    for wrong in ({"batch_size": 0}, {"timestep_fraction": float("nan")}, {"inner_epochs": 10**400}):
        with pytest.raises(UsageError, match=f"train.{next(iter(wrong))}"):
            build(DdpoConfig, {"train": wrong})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompts: &a [*a]", "nested more than 100 deep"),
        ("seed: 2001-99-99", "is not valid YAML"),
        ("output_dir: null", "output_dir=None must be text"),
        ("seed: [1]", "seed"),
        ("train: {learning_rate: x}", "learning_rate"),
    ],
)
def test_recipes_that_are_refused(text, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_config("draft", path)


def test_an_empty_recipe_says_nothing(tmp_path):
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert load_config("draft", tmp_path / "c.yaml") == DraftConfig()


def test_recipes_of_names_that_no_file_can_have(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="neither a file nor a recipe"):
        load_config("draft", "a" * 400)
    for target in (tmp_path / "file" / "c.yaml", f"{tmp_path}/{'a' * 400}.yaml"):
        with pytest.raises(UsageError, match="cannot be written"):
            recipes.copy("digits_draft", str(target))


def test_batch_that_does_not_divide_names_the_nearest_that_does():
    config = build(DraftConfig, {"train": {"batch_size": 7, "gradient_accumulation_steps": 2}})
    with pytest.raises(UsageError, match="train.batch_size=7 does not divide into 2 process.*nearest.* 8"):
        batch_shares(config, processes=2)
    config.train.batch_size = 8
    assert batch_shares(config, processes=2) == (4, 2)


def test_unknown_keys_name_the_nearest():
    with pytest.raises(UsageError, match="unknown key 'train.learning_rat'; did you mean 'train.learning_rate'"):
        build(DraftConfig, {"train": {"learning_rat": 1e-3}})
    with pytest.raises(UsageError, match="unknown key 'trian'; did you mean 'train'"):
        build(DraftConfig, {"trian": {}})
    with pytest.raises(UsageError, match="there is no algorithm 'draftt'; did you mean 'draft'"):
        load_config("draftt", "digits_draft")


def test_configs_and_the_command_line_import_no_torch():
    code = "import sys, rftcore.cli, rftcore.training.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("kind", "train", "message"),
    [
        (AlignpropConfig, {"truncation": "gaussian"}, r"train.truncation_mean=42.0 must lie in \[1, .*steps=10\)"),
        (AlignpropConfig, {"truncation": "released", "truncation_low": 20}, "no step would keep a gradient"),
        (AlignpropConfig, {"truncation_low": 60}, "truncation_low=60 must be less than train.truncation_high=50"),
        (ReflConfig, {}, "train.first_step=30 and train.last_step=39 .* less than sampling.num_inference_steps=10"),
        (DrtuneConfig, {"train_steps": 8}, "train.train_steps=8, train.earliest_stop=7 .* must not fall in this order"),
        (DraftPlusConfig, {"weights": "full"}, "train.weights=full leaves no pretrained model .* train.kl_coeff needs"),
        (SftConfig, {"weights": "full"}, "train.weights=full leaves no pretrained model"),
        (DpokConfig, {"weights": "full"}, "train.weights=full leaves no pretrained model .* DPOK's KL needs"),
        (
            DdpoConfig,
            {"samples_per_epoch": 200},
            "samples_per_epoch=200 does not divide.* the nearest that does is 256",
        ),
        (DdpoConfig, {"loss": "sf"}, "train.loss=sf takes one update .* make 2; set train.batch_size=256"),
        (DdpoConfig, {"max_train_steps": 7}, "max_train_steps=7 is no whole number of epochs of 2 .* nearest .* 8"),
    ],
)
def test_what_an_algorithm_cannot_do_is_told(kind, train, message):
    with pytest.raises(UsageError, match=message):
        build(kind, {"train": train, "sampling": {"num_inference_steps": 10}})


def test_a_policy_gradient_needs_noise():
    with pytest.raises(UsageError, match="sampling.eta=0.0 takes steps without noise.*sampling.eta=1.0"):
        build(DdpoConfig, {"sampling": {"eta": 0.0}})


def test_an_algorithms_own_defaults_stand_where_nothing_is_said():
    assert build(DdpoConfig, {"sampling": {"num_inference_steps": 20}}).sampling.eta == 1.0
    assert build(DdpoConfig, {}).sampling.guidance_scale == 5.0
    assert load_config("ddpo", "ddpo_sd15").sampling.eta == 1.0


def test_a_recipe_of_another_algorithm_is_told():
    with pytest.raises(
        UsageError, match="digits_ddpo_sf is a recipe of ddpo; rftcore train ddpo --config digits_ddpo_sf"
    ):
        load_config("draft", "digits_ddpo_sf")


def test_schedulers_of_a_run_are_those_with_a_gradient():
    assert typing.get_args(typing.get_type_hints(SamplingConfig)["scheduler"]) == tuple(schedulers.WITH_GRADIENT)
