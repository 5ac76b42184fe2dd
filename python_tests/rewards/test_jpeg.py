"""DRaFT's JPEG rewards: values, options, gradients that move real files; and the benchmark's rows."""

import pytest
import torch

from benchmarks import jpeg as benchmark
from rftcore import rewards
from rftcore.rewards import RewardSpecError
from rftcore.rewards.file_size import incompressibility as file_size
from rftcore.rewards.jpeg import Compressibility
from rftcore.training import Trainer, load_config, recipes

PROMPTS = [""] * 4
MEASURES = [{}, {"exact": False}, {"measure": "size"}, {"measure": "size", "exact": False, "quality": 95}]


@pytest.fixture(scope="module")
def pictures():
    return benchmark.synthetic_images(4, side=32)


def test_value_is_the_squared_error_of_the_real_file(pictures):
    pictures = (pictures * 255).round() / 255
    decoded, _ = benchmark.real_files(pictures, 50)
    expected = (pictures - decoded / 255).square().sum(dim=(1, 2, 3))
    given = rewards.load("jpeg_incompressibility")(pictures, PROMPTS)
    assert given.shape == (4,)
    torch.testing.assert_close(given, expected, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("options", MEASURES, ids=str)
def test_the_two_are_opposites_and_reach_every_image(pictures, options):
    pictures = pictures.clone().requires_grad_()
    more = rewards.load("jpeg_incompressibility", options=options)
    less = rewards.load("jpeg_compressibility", options=options)
    assert more.differentiable and less.differentiable
    assert more.unit == ("kilobytes" if "measure" in options else "squared error")
    value = more(pictures, PROMPTS)
    assert torch.equal(value, -less(pictures, PROMPTS)) and (value > 0).all()
    (gradient,) = torch.autograd.grad(value.sum(), pictures)
    assert gradient.isfinite().all() and (gradient.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("options", MEASURES, ids=str)
def test_following_the_gradient_moves_real_files(options):
    # Noise that is faint beside the steps of quality 50, on a smooth image.
    start = 0.15 + 0.7 * benchmark.synthetic_images(9, side=32)[[0, 4, 2, 6]]
    real = {}
    for name in ("jpeg_compressibility", "jpeg_incompressibility"):
        reward, pictures = rewards.load(name, options=options), start.clone().requires_grad_()
        optimizer = torch.optim.Adam([pictures], lr=4e-3, maximize=True)
        for _ in range(25):
            optimizer.zero_grad()
            reward(pictures, PROMPTS).sum().backward()
            optimizer.step()
        real[name] = file_size(pictures, PROMPTS)
    before = file_size(start, PROMPTS)
    assert real["jpeg_compressibility"].mean() < before.mean() < real["jpeg_incompressibility"].mean()


def test_errors():
    with pytest.raises(RewardSpecError, match="measure='bytes'; it must be 'reconstruction' or 'size'"):
        rewards.load("jpeg_compressibility", options={"measure": "bytes"})
    with pytest.raises(RewardSpecError, match="measure='bytes'.*reconstruction or size"):
        Compressibility(measure="bytes")
    with pytest.raises(RewardSpecError, match="quality=0"):
        rewards.load("jpeg_compressibility", options={"quality": 0})
    with pytest.raises(RewardSpecError, match="no option 'qualty'; did you mean 'quality'"):
        rewards.load("jpeg_compressibility", options={"qualty": 50})


def test_recipes_train_one_measure_and_hold_out_the_other():
    assert set(benchmark.WAYS) == {name for name in recipes.names() if "_jpeg_" in name}
    for name, way in benchmark.WAYS.items():
        algorithm = recipes.algorithm(name)
        config = load_config(algorithm, name)
        direction = "compressibility" if way < 0 else "incompressibility"
        measures = [f"jpeg_{direction}", f"file_size_{direction}"]
        trained, held_out = measures if algorithm == "draft" else measures[::-1]
        assert config.reward.function == trained and config.eval.held_out_reward == [held_out, "digits_held_out"]


@pytest.mark.parametrize("name", ["digits_draft_jpeg_larger", "digits_ddpo_jpeg_smaller"])
def test_recipe_trains(name, tmp_path):
    """One epoch of few samples; both measures are reported, and the benchmark reads them."""
    small = {"train.batch_size": 4, "train.max_train_steps": 1, "sampling.num_inference_steps": 5}
    if recipes.algorithm(name) == "ddpo":
        small |= {"train.samples_per_epoch": 4, "train.rollout_batch_size": 4}
    small |= {"eval.num_validation_images": 1, "eval.validation_prompts": "[a thin zero, the digit one]"}
    flags = [f"--{key}={value}" for key, value in small.items()]
    figures = Trainer(load_config(recipes.algorithm(name), name, f"--output_dir={tmp_path}", *flags)).train()
    row = benchmark.run_row(name, 0, figures)
    # A file of 32 by 32 pixels at quality 95: its headers take 0.62 kB.
    assert 0.7 < row["kB before"] < 1.5 and 0.7 < row["kB after"] < 1.5
    assert row["differentiable measure before"] != row["differentiable measure after"]


@pytest.mark.parametrize(("change", "beyond"), [(-0.2, "yes"), (-0.02, "no"), (0.2, "no")])
def test_row_tells_whether_files_moved_the_right_way(change, beyond):
    # As rewards, so that a change below zero of the size is one above zero of them.
    judged = {
        "jpeg_compressibility": {"before": {"mean": -2.0}, "after": {"mean": -1.0}},
        "file_size_compressibility": {
            "before": {"mean": -1.1},
            "after": {"mean": -1.1 - change},
            "change": {"mean": -change, "standard_error": 0.01},
        },
        "digits_held_out": {"before": {"mean": 0.5}, "after": {"mean": 0.4}},
    }
    figures = {"rewards": judged, "reward_queries": 8, "wall_clock_s": 1.0}
    row = benchmark.run_row("digits_draft_jpeg_smaller", 3, figures)
    assert row["kB before"] == 1.1 and row["change"] == change and row["right way beyond noise"] == beyond
