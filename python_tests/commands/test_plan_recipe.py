"""`rftcore plan --recipe`: a run's own numbers, and the recipes that are made for a GPU's memory."""

import json

import pytest
import yaml
from models import save_configs, text_unet

from benchmarks.harness import RESULTS
from benchmarks.tiers import TAKEN, tiers
from rftcore.cli import _parse
from rftcore.commands.plan import describe, predict
from rftcore.commands.plan_options import PlanOptions
from rftcore.commands.plan_recipe import options_of
from rftcore.commands.plan_reward import REWARDS, reward_bytes
from rftcore.errors import UsageError
from rftcore.training import recipes

MIB, LATENT = 2**20, 4 * 8 * 8 * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a tiny pipeline, configs only."""
    return save_configs(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def recipe(tmp_path, model):
    """Writes one, and gives its path."""

    def write(name="draft", **groups):
        groups = {"sampling": {"num_inference_steps": 6, "eta": 1.0}, "memory": {"budget": "8MiB"}, **groups}
        content = {"model": {"pretrained_model_name_or_path": str(model)}, "mixed_precision": "bf16", **groups}
        path = tmp_path / f"{name}_tiny.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return write


def asked(*flags):
    """The options of a command line."""
    return PlanOptions(**_parse(["plan", *flags]).plan.as_dict())


def test_a_recipe_says_what_flags_would(recipe, model):
    path = recipe(train={"batch_size": 6, "gradient_accumulation_steps": 3, "backprop_steps": 2}, lora={"rank": 3})
    options = asked("--recipe", path, "--device-memory", "1GiB", "--reward_memory", "1MiB")
    by_hand = PlanOptions(
        model=str(model), device_memory="1GiB", memory_budget="8MiB", steps=6, batch=2, backprop_steps=2, rank=3,
        reward_memory="1MiB", context_memory="0.7GiB", evaluated_at_once=8,
    )  # fmt: skip
    ours, theirs = predict(options), predict(by_hand)
    for part in ("plan", "held", "taken", "peak_bytes", "flops"):
        assert getattr(ours, part) == getattr(theirs, part)
    assert ours.plan.batch == 2 and ours.plan.differentiated == 2
    assert ours.held["context"] == int(0.7 * 2**30) and ours.taken["or, at another time, evaluating"] > 0
    assert path in describe(options, ours) and "the CUDA context, and" not in describe(options, ours)
    # What comes after the recipe overrides it.
    later = asked("--batch", "5", "--recipe", path, "--steps", "4", "--rank", "2")
    assert (later.batch, later.steps, later.rank) == (2, 4, 2)


def test_a_policy_gradients_parts(recipe):
    train = {"samples_per_epoch": 64, "batch_size": 32, "gradient_accumulation_steps": 8, "rollout_batch_size": 2}
    options = asked("--recipe", recipe("ddpo", train=train), "--device-memory", "1GiB", "--reward_memory", "0")
    made = predict(options)
    assert (options.batch, options.trained_at_once, options.samples, made.plan.differentiated) == (2, 4, 64, 0)
    texts = 2 * 2 * 5 * 12
    assert made.taken["states of an epoch"] == 64 * (7 * LATENT + texts)
    step = made.taken["or, a step that is scored again"]
    assert made.peak_bytes == sum(made.held.values()) + max(2 * made.taken["states of an epoch"], made.taken[
        "states of an epoch"] + max(step, made.plan.peak_bytes))  # fmt: skip
    assert "to sample and decode 2 images" in describe(options, made)


@pytest.mark.parametrize("given", [None, pytest.param("3MiB", marks=pytest.mark.slow)])
def test_without_a_budget_it_is_what_a_run_would_take(recipe, given):
    flags = ("--device-memory", "1GiB", "--reward_memory", "1MiB")
    made = predict(asked("--recipe", recipe(memory={"reserve": given} if given else {}), *flags))
    free = 2**30 - sum(made.held.values())
    assert made.plan.budget == free and made.plan.reserve == (3 * MIB if given else free // 2)


def test_a_unet_that_is_told_its_scale_has_one_branch(recipe, model, tmp_path):
    distilled = tmp_path / "distilled"
    text_unet(time_cond_proj_dim=8).save_config(distilled / "unet")
    for part in ("vae", "text_encoder"):
        (distilled / part).symlink_to(model / part)
    options = {"device_memory": "20MiB", "steps": 4, "batch": 2, "backprop_steps": 0}
    told, guided = (predict(PlanOptions(model=str(folder), **options)) for folder in (distilled, model))
    assert 0.4 * guided.plan.forward_flops < told.plan.forward_flops < 0.6 * guided.plan.forward_flops


@pytest.mark.parametrize(("name", "groups", "flags", "message"), [
    ("draft", {}, ("--device-memory", "0.701GiB", "--reward_memory", "0"), "--device-memory 0.701GiB is too small"),
    ("draft", {}, ("--device-memory", "1GiB"), "of digits nothing is known"),
    ("draft", {"train": {"weights": "full"}}, (), "train.weights=full is not predicted; LoRA is"),
    ("draft", {"model": {"pretrained_model_name_or_path": "a/flux"}}, (), "of .*'a/flux' the shapes are not known"),
    ("ddpo", {"train": {"merged_rollouts": True}}, (), "merged_rollouts=true is not predicted"),
    ("refl", {}, (), "is refl's; those of draft and ddpo are predicted"),
    ("mine", {}, (), "does not say by its name whose it is"),
])  # fmt: skip
def test_mistakes(recipe, name, groups, flags, message):
    with pytest.raises(UsageError, match=message):
        predict(asked("--recipe", recipe(name, **groups), *flags))


def test_what_validation_says(recipe):
    with pytest.raises(UsageError, match="give --device-memory"):
        asked("--recipe", recipe()).validate()
    with pytest.raises(UsageError, match="--samples are of policy gradients; give --backprop_steps 0"):
        PlanOptions(model="sd15", device_memory="8GiB", samples=3).validate()


def test_hub_names_are_known():
    sizes = {"CompVis/stable-diffusion-v1-4": ("sd15", None), "stabilityai/stable-diffusion-2-1": ("sd21", None),
             "stabilityai/stable-diffusion-2-1-base": ("sd21", 512), "stabilityai/sdxl-turbo": ("sdxl", None)}  # fmt: skip
    from rftcore.commands import plan_recipe

    assert {name: plan_recipe._model(name) for name in sizes} == sizes


@pytest.mark.slow
def test_a_rewards_bytes_are_its_checkpoints():
    """Parameters of the published towers, in fp32: ViT-L/14's 303.97 M and its projection, ViT-H/14 whole 986.1 M."""
    without = {name: reward_bytes(name, 512, gradient=False) for name in REWARDS if name in ("aesthetic", "pickscore")}
    for name, millions in (("aesthetic", 303.18 + 0.786), ("pickscore", 986.11)):
        assert 0 < without[name] - 4e6 * millions < 40 * MIB
    # With a gradient: the input, 1 MiB, of each of 24 layers, and one layer's graph.
    assert 24 * MIB < reward_bytes("aesthetic", 512) - without["aesthetic"] < 150 * MIB


def test_every_tier_is_there_and_recorded():
    """`python -m benchmarks.tiers` has been run with the recipes as they are."""
    assert set(tiers().values()) == {8, 12, 16, 24, 80}
    rows = {row["recipe"]: row for row in json.loads((RESULTS / "tiers.json").read_text())["rows"]}
    assert rows.keys() == tiers().keys()
    for name, row in rows.items():
        assert row["peak_gib"] <= TAKEN * row["device_gib"] == TAKEN * tiers()[name]
        assert row["options"] == options_of(name), f"{name} was changed: python -m benchmarks.tiers"
        assert f"GPU of {tiers()[name]} GB" in recipes.description(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", tiers())
def test_every_tier_fits(name):
    gib = TAKEN * tiers()[name]
    made = predict(PlanOptions(recipe=name, device_memory=f"{gib:g}GiB", **options_of(name)))
    assert made.peak_bytes <= gib * 2**30
