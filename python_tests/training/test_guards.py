"""Guards against reward hacking: each raised where it must be, silent where it must be, and unmoved by a resume."""

import json

import pytest
import tiny
import tiny_models
import torch
from safetensors.torch import load_file

from rftcore.rewards import declare
from rftcore.training import RunError, Trainer, UsageError, report, weights
from rftcore.training.config import EvalConfig
from rftcore.training.evaluation import alarm, early_stop, reference, scale_sweep

FAST = {"learning_rate": 0.1, "backprop_steps": 3}


@declare(differentiable=False)
def darkness(images, prompts, metadata=None):
    """Falls where `tiny.brightness` rises."""
    return -tiny.brightness(images, prompts)


@declare(differentiable=False)
def agreeing(images, prompts, metadata=None):
    """Rises with it."""
    return 2 * tiny.brightness(images, prompts)


def config(model, folder, **groups):
    """A run that raises its reward on 2 x 2 held-out images, looked at after every step."""
    evaluation = {"num_validation_images": 2, "validation_steps": 1, "held_out_reward": None, "lora_scales": []}
    fixed = {
        "prompts": tiny.TRAIN_PROMPTS[:1],
        "train": {"max_train_steps": 4, **FAST, **groups.pop("train", {})},
        "eval": {**evaluation, **groups.pop("eval", {})},
    }
    return tiny.config(model, folder, **(fixed | groups))


def lines(folder):
    """Every line of metrics.jsonl, without what the clock and the machine decide."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if not key.startswith(("time/", "mem/"))} for line in found]


def evaluations(folder):
    return [line for line in lines(folder) if "eval/alarm" in line]


@pytest.mark.parametrize(
    ("trained", "held_out", "sentences"),
    [
        # Four images; a change of 1 +- 0.1 or 1 +- 1.2 each.
        ([1.1, 0.9, 1.1, 0.9], [-1.1, -0.9, -1.1, -0.9], 1),
        ([1.1, 0.9, 1.1, 0.9], [1.1, 0.9, 1.1, 0.9], 0),
        ([-1.1, -0.9, -1.1, -0.9], [-1.1, -0.9, -1.1, -0.9], 0),
        ([1.1, 0.9, 1.1, 0.9], [-3.0, 1.0, -3.0, 1.0], 0),
        ([3.0, -1.0, 3.0, -1.0], [-1.1, -0.9, -1.1, -0.9], 0),
        ([0.0] * 4, [0.0] * 4, 0),
        # Of one image no error is known.
        ([1.0], [-1.0], 0),
    ],
)
def test_alarm_where_rewards_part_by_more_than_two_standard_errors(trained, held_out, sentences):
    # Images differ far more from each other than they change: the comparison is paired.
    first = {"a": [10.0 * n for n in range(len(trained))], "b": [-7.0 * n for n in range(len(trained))]}
    now = {
        "a": [old + new for old, new in zip(first["a"], trained, strict=True)],
        "b": [old + new for old, new in zip(first["b"], held_out, strict=True)],
    }
    found = alarm.alarms("a", ["b"], now, first)
    assert len(found) == sentences
    if found:
        assert "reward a rose by 1 ± 0.058" in found[0] and "held-out b fell by 1 ± 0.058" in found[0]


def test_each_judge_that_fell_is_named():
    first = {"a": [0.0, 0.0], "b": [0.0, 0.0], "c": [0.0, 0.0], "d": [0.0, 0.0]}
    now = {"a": [1.0, 1.1], "b": [-1.0, -1.1], "c": [1.0, 1.1], "d": [-2.0, -2.1]}
    found = alarm.alarms("a", ["b", "c", "d"], now, first)
    assert [name in text for name, text in zip("bd", found, strict=True)] == [True, True]


@pytest.mark.parametrize(("left", "raised"), [(0.49, True), (0.51, False), (1.5, False)])
def test_alarm_where_diversity_falls_below_half(left, raised):
    first = {"a": [0.0, 0.0], "diversity/pixels": [0.1, 0.3]}
    now = {"a": [0.0, 0.0], "diversity/pixels": [0.1 * left, 0.3 * left]}
    found = alarm.alarms("a", [], now, first)
    assert bool(found) == raised
    if raised:
        assert "differ by 49%" in found[0]


def test_alarm_without_a_first_diversity_is_silent():
    assert alarm.alarms("a", [], {"a": [0.0], "diversity/pixels": [0.0]}, {"a": [0.0], "diversity/pixels": [0.0]}) == []


@pytest.mark.parametrize(
    ("means", "best", "since"),
    [([0, 1, 2, 3], 3, 0), ([0, 2, 1, 1], 1, 2), ([3, 2, 2, 2], 0, 3), ([1, 1, 1], 0, 2), ([0, 5, 1, 6, 2], 3, 1)],
)
def test_patience_counts_evaluations_since_the_best(means, best, since):
    remembered = {10 * number: {"b": [mean - 1.0, mean + 1.0]} for number, mean in enumerate(means)}
    assert early_stop.best_step(remembered, "b") == 10 * best
    for patience in range(1, 5):
        reason = early_stop.reason_to_stop(remembered, "b", patience)
        assert bool(reason) == (since >= patience)
        assert reason is None or f"best at step {10 * best}" in reason
    assert early_stop.reason_to_stop(remembered, "b", None) is None


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"early_stop_patience": 2}, "early_stop_patience=2 watches a held-out judge.*set eval.held_out_reward"),
        (
            {"early_stop_patience": 2, "held_out_reward": "tiny.contrast", "validation_steps": None},
            "early_stop_patience=2 counts evaluations.*set eval.validation_steps",
        ),
        ({"lora_scales": [0.5, 1.5]}, r"eval.lora_scales=\[0.5, 1.5\] must lie between 0"),
        ({"held_out_reward": ["tiny.contrast", "tiny.contrast"]}, "two held-out rewards are both named 'contrast'"),
        ({"held_out_reward": ["tiny.contrast", "tiny.brightness"]}, "the trained and a held-out.*'brightness'"),
    ],
)
def test_what_cannot_be_watched_is_refused(model, tmp_path, evaluation, message):
    with pytest.raises(UsageError, match=message):
        Trainer(config(model, tmp_path / "run", eval=evaluation))
    assert not (tmp_path / "run").exists()


def test_full_config_with_a_judge_may_stop_early():
    early_stop.check(EvalConfig(early_stop_patience=1, validation_steps=5), ["a judge"])
    early_stop.check(EvalConfig(), [])


@pytest.fixture(scope="module")
def hacked(model, tmp_path_factory):
    """A run whose second judge falls as its reward rises, with its trainer: 4 steps, an evaluation after each."""
    folder = tmp_path_factory.mktemp("hacked") / "output"
    sweep = {"lora_scales": [0.0, 0.5, 1.0], "held_out_reward": ["test_guards.agreeing", "test_guards.darkness"]}
    trainer = Trainer(config(model, folder, eval=sweep, checkpointing_steps=2))
    return folder, trainer, trainer.train()


def test_every_judge_scores_and_the_alarm_names_the_one_that_fell(hacked, capsys):
    folder, trainer, results = hacked
    before, *_, after = evaluations(folder)
    assert before["eval/alarm"] == 0 and after["eval/alarm"] == 1
    for line in (before, after):
        assert line["eval/reward/darkness"] == pytest.approx(-line["eval/reward/brightness"])
        assert line["eval/reward/agreeing"] == pytest.approx(2 * line["eval/reward/brightness"])
    (sentence,) = results["alarms"]
    assert "brightness rose" in sentence and "held-out darkness fell" in sentence
    assert [row["role"] for row in results["rewards"].values()] == ["trained", "held out", "held out"]
    card = (folder / "README.md").read_text()
    assert sentence in card and "| darkness | held out |" in card


@pytest.mark.slow
def test_no_alarm_where_the_judge_agrees(model, tmp_path):
    run = config(model, tmp_path / "run", eval={"held_out_reward": "test_guards.agreeing"})
    results = Trainer(run).train()
    assert results["rewards"]["brightness"]["change"]["mean"] > 0
    assert results["alarms"] == []
    assert {line["eval/alarm"] for line in evaluations(tmp_path / "run")} == {0}


def test_drift_and_diversity_grow_from_step_0(hacked):
    folder, _, results = hacked
    before, *between, after = evaluations(folder)
    assert before["eval/drift/pixels"] == 0 and before["eval/diversity"] == 1
    # Accelerated blocks with the adapter at B = 0 and without it: rounding alone.
    assert before["eval/drift/eps"] < 1e-12
    assert after["eval/drift/pixels"] > 1e-3 and after["eval/drift/eps"] > 1e-6
    assert results["drift"]["pixels"]["mean"] == after["eval/drift/pixels"]
    assert results["drift"]["eps"]["mean"] == after["eval/drift/eps"]
    assert results["diversity"]["pixels"]["left"] == after["eval/diversity"] != 1


def test_eps_drift_is_that_of_stock_diffusers_with_peft_switched_off(hacked):
    """Guided by hand, one image and one step at a time, on the states of the validation's own chains."""
    folder, trainer, _ = hacked
    engine, sampler, unet = trainer.engine, trainer.method.sampler, trainer.engine.model
    from rftcore.training.batches import generator
    from rftcore.training.engine import Samples

    expected = []
    unet.eval()
    with torch.no_grad():
        for index, prompt in enumerate(trainer.validation.prompts):
            noise = generator(engine.config.eval.seed, "validation", index)
            trajectory = engine.sample(sampler, Samples([index], [prompt], [noise]))
            given = engine.inputs.batch([prompt])

            def guided(x_t, t, given=given):
                negative, positive = (
                    unet(x_t, t, given[name]).sample for name in ("negative_prompt_embeds", "prompt_embeds")
                )
                return negative + 2.0 * (positive - negative)

            steps = []
            for x_t, t in zip(trajectory.states[:-1], trajectory.timesteps, strict=True):
                adapted = guided(x_t, t)
                unet.disable_adapters()
                steps.append((adapted - guided(x_t, t)).double().square().mean())
                unet.enable_adapters()
            expected.append(float(sum(steps) / len(steps)))
    measured = trainer.progress.evaluations[4]["drift/eps"]
    assert measured == pytest.approx(expected, rel=1e-3)


def test_sweep_ends_are_the_evaluations_before_and_after(hacked):
    folder, trainer, results = hacked
    none, half, all_ = results["lora_scales"]
    assert [row["scale"] for row in (none, half, all_)] == [0.0, 0.5, 1.0]
    for row, key in ((none, "before"), (all_, "after")):
        for name in ("brightness", "agreeing", "darkness"):
            assert row["rewards"][name] == results["rewards"][name][key]
    assert none["drift"]["pixels"]["mean"] == 0 < half["drift"]["pixels"]["mean"] < all_["drift"]["pixels"]["mean"]
    assert 0 < half["drift"]["eps"]["mean"] < all_["drift"]["eps"]["mean"]
    assert results["time/sweep_s"] > 0
    assert (folder / "lora_scales.png").exists()
    assert "| LoRA x | brightness |" in (folder / "README.md").read_text()


def test_sweep_by_itself_equals_them_and_undoes_itself(hacked):
    """Evaluated anew: all of the adapter bit for bit, none of it to rounding; then the scales are as they were."""
    _, trainer, _ = hacked
    model = trainer.engine.model
    scaling = [dict(layer.scaling) for layer in model.modules() if hasattr(layer, "lora_A")]
    trained = {name: value.clone() for name, value in weights.trainable(model).items()}
    made = scale_sweep.sweep(model, [1.0, 0.0], {}, trainer.validation, trainer._measures)
    before, after = trainer.progress.evaluations[0], trainer.progress.evaluations[4]
    assert made.measures[1.0] == after
    for name in ("brightness", "darkness", "diversity/pixels"):
        assert made.measures[0.0][name] == pytest.approx(before[name], rel=1e-5)
    assert max(made.measures[0.0]["drift/pixels"]) < 1e-6
    assert [dict(layer.scaling) for layer in model.modules() if hasattr(layer, "lora_A")] == scaling
    assert all(torch.equal(value, trained[name]) for name, value in weights.trainable(model).items())


def test_scales_are_put_back_where_evaluating_fails(hacked):
    model = hacked[1].engine.model
    scaling = [dict(layer.scaling) for layer in model.modules() if hasattr(layer, "lora_A")]
    with pytest.raises(ZeroDivisionError), scale_sweep.lora_scale(model, 0.25):
        assert all(layer.scaling["default"] == 0.25 for layer in model.modules() if hasattr(layer, "lora_A"))
        raise ZeroDivisionError
    assert [dict(layer.scaling) for layer in model.modules() if hasattr(layer, "lora_A")] == scaling


@pytest.mark.slow
def test_resumed_run_measures_drift_from_the_same_images(model, tmp_path, hacked):
    """Same lines, alarms among them, and the same sweep: bit for bit."""
    folder, trainer, results = hacked
    sweep = {"lora_scales": [0.0, 0.5, 1.0], "held_out_reward": ["test_guards.agreeing", "test_guards.darkness"]}
    run = config(model, tmp_path / "run", eval=sweep, checkpointing_steps=2, train={"max_train_steps": 2})
    Trainer(run).train()
    run = config(model, tmp_path / "run", eval=sweep, checkpointing_steps=2, resume_from_checkpoint="latest")
    again = Trainer(run).train()
    assert lines(tmp_path / "run") == lines(folder)
    for key in ("rewards", "drift", "diversity", "alarms", "best", "lora_scales"):
        assert again[key] == results[key]


@pytest.mark.slow
def test_lost_reference_is_said_and_drift_is_left_out(model, tmp_path, capfd):
    Trainer(config(model, tmp_path / "run", train={"max_train_steps": 1})).train()
    (tmp_path / "run" / reference.NAME).unlink()
    Trainer(config(model, tmp_path / "run", train={"max_train_steps": 2}, resume_from_checkpoint="latest")).train()
    assert "samples/step-000000.safetensors is gone" in capfd.readouterr().err
    before, *_, after = evaluations(tmp_path / "run")
    assert "eval/drift/pixels" in before and "eval/drift/pixels" not in after
    assert "eval/drift/eps" in after


def stopping(model, folder, **more):
    """The held-out judge falls from the first step on: two evaluations without a new best are steps 1 and 2."""
    evaluation = {"held_out_reward": "test_guards.darkness", "early_stop_patience": 2}
    return config(model, folder, eval=evaluation, checkpointing_steps=1, **more)


@pytest.fixture(scope="module")
def stopped(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped") / "output"
    return folder, Trainer(stopping(model, folder)).train()


def test_early_stop_ends_the_run_as_its_last_step_would(stopped, capfd):
    folder, results = stopped
    assert results["steps"] == 2 and lines(folder)[-1]["step"] == 2
    assert results["best"]["step"] == 0
    assert "darkness was best at step 0" in results["stopped"]
    for name in ("checkpoint-2/COMPLETE", "pytorch_lora_weights.safetensors", "results.json", "README.md"):
        assert (folder / name).exists()
    assert not (folder / "best").exists()
    assert "stopped early: the held-out darkness" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_early_stop_is_the_same_after_a_resume(model, tmp_path, stopped):
    """From before the decision, and from the checkpoint that it led to, which takes no further step."""
    folder, results = stopped
    ours = tmp_path / "run"
    Trainer(stopping(model, ours, train={"max_train_steps": 1})).train()
    for checkpoint in ("checkpoint-1", "latest"):
        resume = checkpoint if checkpoint == "latest" else str(ours / checkpoint)
        again = Trainer(stopping(model, ours, resume_from_checkpoint=resume)).train()
        assert lines(ours) == lines(folder)
        assert (again["steps"], again["stopped"], again["best"]) == (2, results["stopped"], results["best"])
        ours_lora, theirs = (load_file(path / "pytorch_lora_weights.safetensors") for path in (ours, folder))
        assert all(torch.equal(ours_lora[name], value) for name, value in theirs.items())


def test_best_evaluations_lora_is_kept(model, tmp_path):
    """The judge likes its first steps and then no others: what is kept is not the last LoRA."""
    best = 2
    calls = []

    def moody(images, prompts, metadata):
        calls.append(1)
        return -abs(len(calls) - 1 - best) * torch.ones(len(images))

    run = config(
        model, tmp_path / "run", train={"max_train_steps": 4}, eval={"early_stop_patience": 3}, checkpointing_steps=1
    )
    results = Trainer(run, held_out_reward=moody).train()
    assert (results["steps"], results["stopped"], results["best"]["step"]) == (4, None, best)
    kept = load_file(tmp_path / "run" / "best" / "pytorch_lora_weights.safetensors")
    then, last = (
        load_file(tmp_path / "run" / f"checkpoint-{step}" / "pytorch_lora_weights.safetensors") for step in (best, 4)
    )
    assert all(torch.equal(kept[name], value) for name, value in then.items())
    assert not all(torch.equal(kept[name], value) for name, value in last.items())
    assert json.loads((tmp_path / "run" / "best" / "best.json").read_text()) == {"step": best, "moody": 0.0}


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pixels")
    tiny_models.save("pixels", folder)
    return folder


@pytest.mark.slow
def test_unconditional_model_is_watched_too(pixels, tmp_path):
    groups = {
        "sampling": {"guidance_scale": 1.0, "num_inference_steps": 3},
        "lora": {"rank": 2, "target_modules": ["to_q", "to_v", "conv1"]},
        "eval": {"num_validation_images": 3, "held_out_reward": "tiny.contrast", "lora_scales": [0.0, 0.5, 1.0]},
    }
    trainer = Trainer(config(pixels, tmp_path / "run", **groups, train={"max_train_steps": 2}))
    results = trainer.train()
    assert results["evaluation"]["images"] == 3
    none, half, all_ = results["lora_scales"]
    assert none["drift"]["pixels"]["mean"] == 0 < half["drift"]["pixels"]["mean"] < all_["drift"]["pixels"]["mean"]
    assert results["drift"]["eps"]["mean"] > 0 and results["diversity"]["pixels"]["before"] > 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert "unconditional-image-generation" in card and "PeftModel.from_pretrained" in card


def full(model, folder, **more):
    return config(model, folder, train={"weights": "full", "learning_rate": 1e-3, "max_train_steps": 1}, **more)


def test_whole_unet_has_drift_of_images_alone_and_no_sweep(model, tmp_path):
    run = full(model, tmp_path / "run", eval={"lora_scales": [0.0, 0.5, 1.0], "held_out_reward": "tiny.contrast"})
    results = Trainer(run).train()
    assert results["drift"].keys() == {"pixels"} and results["drift"]["pixels"]["mean"] > 0
    assert results["lora_scales"] is None and results["time/sweep_s"] is None
    assert "subfolder='unet'" in (tmp_path / "run" / "README.md").read_text()


def test_silent_weights_of_a_whole_unet_are_named_on_step_1(model, tmp_path):
    trainer = Trainer(full(model, tmp_path / "run"))
    broken = trainer.engine.model.down_blocks[0].resnets[0].conv2
    broken.register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(RunError, match=r"of \d+ trained modules ran but received no gradient on any.*resnets.0.conv2"):
        trainer.train()


def test_images_without_a_score_are_left_out_where_samples_may_be_dropped(model, tmp_path):
    """One of four held-out images has no score after the first evaluation: pairs are those that have both."""
    calls = []

    @declare(differentiable=False)
    def partial(images, prompts, metadata):
        calls.append(1)
        scores = torch.arange(4.0) + len(calls) * torch.tensor([1.0, 1.1, 0.9, 1.0])
        return scores if len(calls) == 1 else scores.masked_fill(scores == scores.max(), float("nan"))

    run = config(model, tmp_path / "run", reward={"on_nan": "drop"}, train={"max_train_steps": 1})
    results = Trainer(run, held_out_reward=partial).train()
    before, after = evaluations(tmp_path / "run")
    assert "eval/dropped_scores" not in before and after["eval/dropped_scores"] == 1
    assert after["eval/reward/partial"] == pytest.approx((2.0 + 3.2 + 3.8) / 3)
    assert results["rewards"]["partial"]["change"]["mean"] == pytest.approx(1.0)
    assert results["best"]["step"] == 1


def test_a_judge_that_scores_nothing_is_never_best():
    assert early_stop.best_step({0: {"b": [1.0]}, 1: {"b": [float("nan")]}}, "b") == 0
    assert alarm.alarms("a", ["b"], {"a": [1, 1.1], "b": [float("nan")] * 2}, {"a": [0, 0], "b": [0, 0]}) == []
    nothing = {"role": "held out", "unit": "points", **dict.fromkeys(("before", "after", "change"), report._mean([]))}
    assert nothing["after"] == {"mean": None, "standard_error": None}
    assert report._plus_minus(nothing["after"], sign=True) == "none scored"
