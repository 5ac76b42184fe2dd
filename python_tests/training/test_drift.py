"""Drift and diversity against loops in fp64, and the grids that are looked at."""

import itertools
import math

import pytest
import torch
from PIL import Image

from rftcore.training.evaluation import grids, validation
from rftcore.training.evaluation.drift import distance, diversity, thumbnails
from rftcore.training.evaluation.validation import Evaluation, metrics


def rms(a, b):
    return math.sqrt((a.double() - b.double()).square().mean())


def test_distance_and_diversity_are_root_mean_squares():
    torch.manual_seed(0)
    prompts, images = 3, 4
    a, b = torch.rand(2, prompts * images, 3, 5, 7)
    assert distance(a, b).tolist() == pytest.approx([rms(x, y) for x, y in zip(a, b, strict=True)], rel=1e-6)
    expected = []
    for prompt in range(prompts):
        pairs = list(itertools.combinations(a[prompt::prompts], 2))
        expected.append(sum(rms(x, y) for x, y in pairs) / len(pairs))
    assert diversity(a, prompts).tolist() == pytest.approx(expected, rel=1e-5)
    assert diversity(a[:1].expand(6, -1, -1, -1), prompts).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("size", "expected"), [((16, 16), (16, 16)), ((512, 512), (64, 64)), ((256, 384), (43, 64))])
def test_thumbnails_are_area_means(size, expected):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    small = thumbnails(images)
    assert small.shape == (2, 3, *expected) and small.dtype == torch.float32
    if size == (512, 512):
        torch.testing.assert_close(small[0, 0, 0, 0], images[0, 0, :8, :8].mean())
    if size == (16, 16):
        assert torch.equal(small, images)


def evaluation(features, prompts=2):
    return Evaluation({"judge": [0.0] * len(features)}, [], {"pixels": features}, prompts, Image.new("RGB", (1, 1)))


def test_metrics_are_relative_to_step_0():
    torch.manual_seed(2)
    begun = torch.rand(6, 3, 4, 4)
    reference = {"pixels": begun}
    first = evaluation(begun).measures(reference)
    assert metrics(first, first)["eval/drift/pixels"] == 0
    assert metrics(first, first)["eval/diversity"] == 1
    # Halved about the mean of each prompt's images: half as far from each other, and moved by half their distance to it.
    means = torch.stack([begun[0::2].mean(0), begun[1::2].mean(0)]).repeat(3, 1, 1, 1)
    now = evaluation((begun + means) / 2).measures(reference)
    logged = metrics(now, first)
    assert logged["eval/diversity"] == pytest.approx(0.5)
    assert logged["eval/drift/pixels"] == pytest.approx(sum(map(rms, begun, means)) / 6 / 2, rel=1e-6)


def test_one_image_a_prompt_has_no_diversity_and_no_reference_no_drift():
    assert evaluation(torch.rand(2, 3, 4, 4)).measures(None).keys() == {"judge"}


def test_further_spaces_are_measured_beside_pixels():
    look = evaluation(torch.rand(4, 3, 4, 4))
    look.features["brightness"] = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    measures = look.measures({**look.features, "brightness": torch.zeros(4, 1)})
    assert measures["drift/brightness"] == [0, 1, 2, 3]
    assert measures["diversity/brightness"] == [2, 2]
    assert {"eval/drift/brightness", "eval/diversity/brightness"} <= metrics(measures, measures).keys()


def solid(value, size=(28, 28)):
    return Image.new("RGB", size, (value, value, value))


def test_grid_of_several_hundred_prompts_shows_the_first():
    prompts = [f"prompt {number} " + "of many words " * 30 for number in range(300)]
    shown = [index for index in range(1200) if grids.place(index, 300) is not None]
    assert len(shown) == grids.ROWS * grids.COLUMNS
    grid = grids.prompt_grid(prompts, {index: solid(index % 256) for index in shown})
    # Enlarged by a whole number to at least 96 pixels.
    assert grid.size == (132 + 4 * 112, 8 * 112)
    assert grid.getpixel((132 + 112 * 1 + 5, 112 * 2 + 5)) == ((300 + 2) % 256,) * 3


def test_grid_without_prompts_is_a_row():
    grid = grids.prompt_grid([""], {index: solid(10 * index, (256, 256)) for index in range(4)})
    assert grid.size == (132 + 4 * 256, 256)
    assert [grid.getpixel((132 + 256 * column + 9, 9))[0] for column in range(4)] == [0, 10, 20, 30]


def test_grid_keeps_the_images_shape():
    assert grids.prompt_grid(["a"], {0: solid(0, (1024, 1536))}).size == (132 + 512, 768)
    assert grids.prompt_grid(["a"], {0: solid(0, (32, 16))}).size == (132 + 96, 48)


def test_first_columns_are_cut_from_grids_of_any_scale():
    drawn = {
        f"LoRA x {scale:g}": grids.prompt_grid(
            ["a", "b"], {index: solid(int(100 * scale) + index) for index in range(6)}
        )
        for scale in (0.0, 0.5, 1.0)
    }
    joined = grids.first_columns(drawn, grids.columns(3))
    assert joined.size == (132 + 3 * 112, 24 + 2 * 112)
    for column, scale in enumerate((0.0, 0.5, 1.0)):
        for row in range(2):
            assert joined.getpixel((132 + 112 * column + 3, 24 + 112 * row + 3))[0] == int(100 * scale) + row


@pytest.mark.parametrize(
    ("count", "most", "expected"),
    [(1, 3, [0]), (3, 3, [0, 1, 2]), (10, 3, [0, 4, 9]), (50, 5, [0, 12, 24, 37, 49]), (2, 5, [0, 1])],
)
def test_steps_that_are_compared_reach_from_the_first_to_the_last(count, most, expected):
    assert validation._spread(count, most) == expected
