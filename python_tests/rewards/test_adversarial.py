"""The adversarial reward with a small ResNet, against PIL and one image at a time."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_rewards import as_pil, assert_same, pixel_gradient
from torch.nn.functional import interpolate
from transformers import ResNetConfig, ResNetForImageClassification

from rftcore import rewards
from rftcore.rewards import RewardSpecError

LABELS = ("tench, Tinca tinca", "crane", "maillot", "maillot, tank suit", "house finch, linnet", "crane")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnet")
    torch.manual_seed(0)
    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 2],
            num_labels=len(LABELS),
            id2label=dict(enumerate(LABELS)),
            label2id={label: index for index, label in enumerate(LABELS)},
        )
    )
    # Statistics that a batch of its own does not have: a model in training mode would give other scores.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.3, 2.0)
    model.save_pretrained(folder)
    return folder


def made(folder, target=4, **options):
    return rewards.load("adversarial", options={"model": str(folder), "target": target, **options})


def pictures(height=120, width=181):
    """(3, 3, H, W) in [0, 1], of 8 bits."""
    generator = torch.Generator().manual_seed(1)
    coarse, fine = (torch.rand(3, 3, *size, generator=generator) for size in ((7, 7), (height, width)))
    return (interpolate(coarse, (height, width), mode="bilinear") * 200 + fine * 55).round() / 255


def by_hand(folder, image, target):
    """One image, resized by PIL, by a model in fp64."""
    (picture,) = as_pil(image[None])
    short = min(picture.size)
    size = [256 * side // short for side in picture.size]
    left, top = ((side - 224) // 2 for side in size)
    picture = picture.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
    pixels = torch.from_numpy((np.asarray(picture, dtype=np.float64) / 255 - MEAN) / STD).permute(2, 0, 1)[None]
    with torch.no_grad():
        logits = ResNetForImageClassification.from_pretrained(folder).double().eval()(pixels).logits[0]
    return (logits[target] - logits.logsumexp(0)).item()


def test_equals_pil_one_image_at_a_time(folder):
    images = pictures()
    with torch.no_grad():
        scores = made(folder)(images, ["a"] * 3)
    expected = torch.tensor([by_hand(folder, image, 4) for image in images], dtype=torch.float64)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-3, atol=0)
    assert scores.std() > 1e-2


def test_gradient_reaches_pixels_and_recomputing_changes_nothing(folder):
    recomputed, kept = (made(folder, checkpointing=checkpointing) for checkpointing in (True, False))
    gradient = pixel_gradient(recomputed, pictures(64, 64), ["a"] * 3)
    assert (gradient.abs().amax(dim=(2, 3)) > 0).all()
    assert_same(gradient, pixel_gradient(kept, pictures(64, 64), ["a"] * 3))
    assert not any(parameter.requires_grad for parameter in recomputed.function.parameters())


@pytest.mark.parametrize("factor", [1e4, 1e-6])
def test_fp16_has_a_gradient_of_any_size(folder, factor):
    images, low = pictures(64, 64), made(folder, dtype="fp16")
    wanted = pixel_gradient(made(folder), images, ["a"] * 3)
    found = pixel_gradient(lambda *given: factor * low(*given), images, ["a"] * 3) / factor
    # A few ReLUs near 0 switch.
    assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_autocast_changes_nothing_and_a_lower_dtype_little(folder):
    images = pictures(64, 64)
    with torch.no_grad():
        expected = made(folder)(images, ["a"] * 3)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(made(folder)(images, ["a"] * 3), expected)
        lower = made(folder, dtype="bf16")(images, ["a"] * 3)
    assert lower.dtype == torch.float32
    torch.testing.assert_close(lower, expected, rtol=0.1, atol=0)


def test_a_step_along_the_gradient_makes_the_target_likelier(folder):
    images = pictures(64, 64).requires_grad_()
    reward = made(folder)
    before = reward(images, ["a"] * 3)
    (gradient,) = torch.autograd.grad(before.sum(), images)
    with torch.no_grad():
        after = reward((images + 0.02 * gradient.sign()).clamp(0, 1), ["a"] * 3)
    assert (after > before).all()


@pytest.mark.parametrize(
    ("target", "index"), [(0, 0), ("Tinca tinca", 0), ("linnet", 4), ("maillot", 2), ("maillot, tank suit", 3)]
)
def test_target_by_index_label_or_synonym(folder, target, index):
    assert made(folder, target).function.target == index


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("linet", "no class is named 'linet'; did you mean 'linnet'"),
        ("crane", "names the classes 1 .*, 5 .*; give the index"),
        (6, "classes 0 to 5"),
        (True, "target=True; it must be a whole number or text"),
    ],
)
def test_wrong_targets(folder, target, message):
    with pytest.raises(RewardSpecError, match=message):
        made(folder, target)


def test_target_must_be_given(folder):
    with pytest.raises(RewardSpecError, match="needs target; set reward.options"):
        rewards.load("adversarial", options={"model": str(folder)})
