"""The JPEG codec against PIL's, and its gradient against finite differences."""

import io

import numpy
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

from benchmarks.jpeg import real_files, synthetic_images
from rftcore.digits import data
from rftcore.rewards import RewardSpecError
from rftcore.rewards.jpeg_codec import coefficients, decode, decoded, quantised, tables
from rftcore.rewards.jpeg_size import size

QUALITIES = (25, 50, 75, 95)


@pytest.fixture(scope="module")
def images():
    return {"digits": data.load().images[::9], "synthetic": synthetic_images(200)}


@pytest.fixture(scope="module")
def files(images):
    return {(name, quality): real_files(images[name], quality) for name in images for quality in QUALITIES}


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 75, 95, 100])
def test_tables_are_those_of_a_file(quality):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, format="JPEG", quality=quality)
    written = Image.open(file).quantization
    for table, of_file in zip(tables(quality), written.values(), strict=True):
        assert table.flatten().tolist() == list(of_file)


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_decoded_and_size_are_those_of_real_files(images, files, name, quality):
    real, sizes = files[name, quality]
    error = (decoded(images[name], quality) * 255 - real).square().mean(dim=(1, 2, 3))
    assert error.mean().sqrt() < 1.0
    # Half of the images or more differ in next to nothing: no stage is another one.
    assert error.median().sqrt() < 0.75
    assert spearmanr(size(images[name], quality).numpy(), sizes).statistic > 0.97


def test_smooth_function_is_near_too(images, files):
    for name, bound in (("digits", 1.5), ("synthetic", 2.0)):
        error = (decoded(images[name], 95, exact=False) * 255 - files[name, 95][0]).square().mean()
        assert error.sqrt() < bound
    assert spearmanr(size(images["synthetic"], 95, exact=False).numpy(), files["synthetic", 95][1]).statistic > 0.97


@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 4), (8, 9), (16, 15), (33, 50), (31, 17)])
def test_sizes_that_blocks_do_not_fill(height, width):
    pictures = synthetic_images(8)[:, :, :height, :width]
    real, _ = real_files(pictures, 90)
    error = (decoded(pictures, 90) * 255 - real).square().mean(dim=(1, 2, 3)).sqrt()
    assert error.shape == (8,) and error.max() < 1.5


def test_batch_is_one_by_one(images):
    pictures = images["synthetic"][:5]
    one_by_one = torch.cat([decoded(picture[None], 50) for picture in pictures])
    torch.testing.assert_close(decoded(pictures, 50), one_by_one)
    torch.testing.assert_close(size(pictures, 50), torch.cat([size(picture[None], 50) for picture in pictures]))


def test_without_quantisation_only_colour_resolution_is_lost():
    """DCT and colours are inverted exactly, whatever the steps: grey images come back, as do plain colours."""
    pictures = synthetic_images(4, side=33).double()
    grey = pictures.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)
    plain = pictures[:, :, :1, :1].expand(-1, -1, 20, 20)
    for kept in (grey, plain):
        torch.testing.assert_close(decode(coefficients(kept, 50, exact=False), exact=False), kept, rtol=0, atol=1e-12)
    # Orthonormal: the squares of pixels are those of coefficients.
    coded = coefficients(grey[..., :32, :32], 50, exact=False)
    energy = (coded.luma * tables(50)[0]).square().sum()
    torch.testing.assert_close(energy, (grey[:, 0, :32, :32] * 255 - 128).square().sum())


def test_exact_coefficients_are_whole(images):
    coded = quantised(coefficients(images["synthetic"][:8], 75))
    for c in (coded.luma, coded.chroma):
        assert torch.equal(c, c.round())


def test_gradient_of_the_smooth_functions():
    """Within the cells of quantisation, which steps of 1e-6 hardly ever leave."""
    # Away from black and white, and of faint contrast, so that nothing is clamped.
    pictures = (0.3 + 0.4 * synthetic_images(4, side=18)).double().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(pictures.shape, generator=generator, dtype=torch.float64)
    direction = torch.randn(pictures.shape, generator=generator, dtype=torch.float64)
    functions = (
        lambda x: (decoded(x, 50, exact=False) * weight).sum(dim=(1, 2, 3)),
        lambda x: size(x, 50, exact=False),
    )
    for function in functions:
        (gradient,) = torch.autograd.grad(function(pictures).sum(), pictures)
        along = (gradient * direction).sum(dim=(1, 2, 3))
        with torch.no_grad():
            ahead, behind = function(pictures + 1e-7 * direction), function(pictures - 1e-7 * direction)
        torch.testing.assert_close((ahead - behind) / 2e-7, along, rtol=1e-5, atol=1e-6)
        assert along.abs().min() > 0


def test_exact_values_have_the_smooth_gradient():
    """Of pixels that are whole grey levels of one colour each block, where libjpeg rounds nothing else."""
    levels = torch.randint(60, 200, (2, 1, 1, 1), generator=torch.Generator().manual_seed(0))
    pictures = (levels / 255).double().expand(2, 3, 16, 16).clone().requires_grad_()
    gradients = [
        torch.autograd.grad(decoded(pictures, 50, exact=exact)[:, :, ::3, ::5].sum(), pictures)[0]
        for exact in (True, False)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    assert gradients[0].abs().max() > 0


def test_size_counts_what_costs_bits():
    """Nothing for one grey of level 128; more for a coarser change than for none, and for a fine one than for that."""
    plain = torch.full((1, 3, 32, 32), 128 / 255)
    step = plain.clone()
    step[..., 12:] = 1.0
    noise = synthetic_images(3, side=32)[2:]
    bits = [float(size(picture, 75) * 8000) for picture in (plain, step, noise)]
    assert bits[0] == 0 and 0 < bits[1] < bits[2]
    # Kilobytes: within a quarter of the real file without its headers.
    file, header = (int(numpy.squeeze(real_files(picture, 75)[1])) for picture in (noise, plain))
    assert abs(bits[2] / 8 - (file - header)) < 0.25 * (file - header)


@pytest.mark.parametrize(
    ("shape", "quality", "message"),
    [
        ((1, 3, 8, 8), 0, "quality=0.*from 1 to 100"),
        ((1, 3, 8, 8), 101, "quality=101"),
        ((1, 3, 8, 8), 75.0, "quality=75.0.*whole number"),
        ((3, 8, 8), 75, r"\(B, 3, H, W\), got \(3, 8, 8\)"),
        ((1, 1, 8, 8), 75, r"got \(1, 1, 8, 8\)"),
        ((1, 3, 0, 8), 75, r"got \(1, 3, 0, 8\)"),
    ],
)
def test_errors(shape, quality, message):
    with pytest.raises(RewardSpecError, match=message):
        decoded(torch.zeros(shape), quality)


def test_no_images_and_half_precision():
    assert decoded(torch.zeros(0, 3, 16, 16), 75).shape == (0, 3, 16, 16)
    assert size(torch.zeros(0, 3, 16, 16), 75).shape == (0,)
    picture = synthetic_images(1).bfloat16()
    assert torch.equal(decoded(picture, 75), decoded(picture.float(), 75))
