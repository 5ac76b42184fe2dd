"""Preprocessing gives what PIL and transformers' processors give, and its gradient reaches every pixel."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_rewards import as_images, as_pil, pil_clip_processor

from rftcore.rewards import preprocessing

# Down and up, square and not, odd.
SIZES = [(512, 512), (97, 131), (333, 250), (131, 640), (20, 31)]


def photo(height, width, seed=0):
    """Noise, hard edges and saturated areas, (height, width, 3) of 8 bits: what overshoots is among it."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3))
    image[: height // 3] = (image[: height // 3] > 127) * 255
    image[-height // 4 :, : width // 2] = 255
    return image.astype(np.uint8)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_resize_is_pils_within_one_grey_level(mode, size):
    array = photo(*size)
    side = 57
    ours = preprocessing.resize_shortest(as_images(array), side, mode=mode)
    height, width = ours.shape[-2:]
    filter_ = {"bicubic": Image.BICUBIC, "bilinear": Image.BILINEAR}[mode]
    theirs = np.asarray(Image.fromarray(array).resize((width, height), filter_))
    found = (ours[0].permute(1, 2, 0) * 255).round().numpy()
    assert np.abs(found - theirs).max() <= 1
    assert ours.min() >= 0 and ours.max() <= 1


def test_upscaling_and_one_side_alone():
    array = photo(40, 52)
    for height, width in ((224, 300), (40, 224), (91, 52)):
        ours = preprocessing.resize(as_images(array), height, width)
        theirs = np.asarray(Image.fromarray(array).resize((width, height), Image.BICUBIC))
        assert np.abs((ours[0].permute(1, 2, 0) * 255).round().numpy() - theirs).max() <= 1


@pytest.mark.parametrize("size", [*SIZES, (224, 224), (225, 224)], ids=str)
def test_clip_input_is_the_processors(size):
    array = photo(*size)
    processor = pil_clip_processor()
    theirs = processor(images=as_pil(as_images(array))[0], return_tensors="pt")["pixel_values"]
    ours = preprocessing.clip_input(as_images(array))
    assert ours.shape == theirs.shape
    grey = ((ours - theirs) * torch.tensor(preprocessing.CLIP_STD).view(3, 1, 1)).abs() * 255
    assert grey.mean() <= 0.5 and grey.max() <= 1.2


def test_a_batch_is_its_images():
    images = torch.cat([as_images(photo(97, 131, seed)) for seed in range(3)])
    one_by_one = [preprocessing.clip_input(image[None], 56) for image in images]
    assert torch.equal(preprocessing.clip_input(images, 56), torch.cat(one_by_one))


def test_gradient_reaches_every_pixel():
    images = torch.rand(2, 3, 61, 90, requires_grad=True)
    (preprocessing.resize_shortest(images, 24) * torch.rand(2, 3, 24, 35)).sum().backward()
    assert (images.grad != 0).all()


def test_white_and_black_images_have_a_gradient():
    """Rounding puts half of their resized pixels outside [0, 1], a clamp's gradient there would be none."""
    images = torch.cat([torch.ones(1, 3, 61, 61), torch.zeros(1, 3, 61, 61)]).requires_grad_()
    preprocessing.clip_input(images, 24).sum().backward()
    assert (images.grad != 0).all()


def test_gradcheck():
    images = (torch.rand(1, 2, 9, 7, dtype=torch.float64) * 0.6 + 0.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: preprocessing.clip_input(x, 5, mean=(0.1, 0.2), std=(2, 3)), images)
    assert torch.autograd.gradcheck(lambda x: preprocessing.resize(x, 11, 12, mode="bilinear"), images)


def test_what_overshoots_has_no_gradient():
    images = torch.zeros(1, 1, 1, 8, dtype=torch.float64)
    images[..., 4:] = 1
    images.requires_grad_()
    resized = preprocessing.resize(images, 1, 16)
    beyond = (resized == 1) & (torch.arange(16) > 7)
    assert beyond.any() and resized.max() == 1
    # The overshoot next to the edge.
    (gradient,) = torch.autograd.grad(resized[..., 9].sum(), images)
    assert not gradient.any()


def test_half_precision_is_widened():
    images = torch.rand(1, 3, 32, 32)
    for dtype in (torch.float16, torch.bfloat16):
        found = preprocessing.clip_input(images.to(dtype), 16)
        assert found.dtype is torch.float32
        assert torch.equal(found, preprocessing.clip_input(images.to(dtype).float(), 16))


def test_errors():
    images = torch.rand(1, 3, 8, 8)
    with pytest.raises(ValueError, match="'bicubic', 'bilinear'"):
        preprocessing.resize(images, 4, 4, mode="nearest")
    with pytest.raises(ValueError, match="at least 1"):
        preprocessing.resize(images, 0, 4)
    with pytest.raises(ValueError, match="hold no crop"):
        preprocessing.centre_crop(images, 9, 4)
