"""DDPO's file sizes against a file on disk."""

import pytest
import torch
from PIL import Image

from rftcore import rewards
from rftcore.rewards import RewardSpecError


@pytest.fixture
def images():
    return torch.rand(3, 3, 20, 33, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("quality", [None, 40])
def test_is_the_size_of_the_file(images, tmp_path, quality):
    options = {} if quality is None else {"quality": quality}
    large, small = (
        rewards.load(name, options=options) for name in ("file_size_incompressibility", "file_size_compressibility")
    )
    assert not large.differentiable and not small.differentiable and large.unit == "kilobytes"
    for number, image in enumerate(images):
        pixels = (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(tmp_path / f"{number}.jpg", quality=95 if quality is None else quality)
    expected = torch.tensor([(tmp_path / f"{number}.jpg").stat().st_size / 1000 for number in range(3)])
    assert torch.equal(large(images, [""] * 3), expected) and torch.equal(small(images, [""] * 3), -expected)


def test_images_of_the_decoder(images):
    """Half precision, beyond [0, 1], with a gradient, without images."""
    reward = rewards.load("file_size_incompressibility")
    beyond = (3 * images - 1).requires_grad_()
    assert torch.equal(reward(beyond, [""] * 3), reward(beyond.detach().clamp(0, 1), [""] * 3))
    assert torch.equal(reward(images.bfloat16(), [""] * 3), reward(images.bfloat16().float(), [""] * 3))
    assert reward(images[:0], []).shape == (0,)


def test_an_image_of_nan_has_no_size(images):
    """It would be a black one, the smallest file, and an overflow would be what is rewarded most."""
    images[1, 0, 0, 0], images[2, 0, 0, 0] = torch.nan, torch.inf
    for name in ("file_size_incompressibility", "file_size_compressibility"):
        assert rewards.load(name)(images, [""] * 3).isfinite().tolist() == [True, False, False]


def test_error():
    reward = rewards.load("file_size_compressibility", options={"quality": 0})
    with pytest.raises(RewardSpecError, match="quality=0"):
        reward(torch.zeros(1, 3, 8, 8), [""])
