"""ImageReward from a small checkpoint of the original's names, against the original's arithmetic written out."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_rewards import as_pil, assert_same, pixel_gradient
from torch.nn.functional import gelu, interpolate, layer_norm, linear

from rftcore import rewards
from rftcore.rewards import RewardSpecError

SIDE, PATCH, LAYERS, WIDTH, TEXT_WIDTH, HEAD = 32, 8, 2, 192, 128, 64
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "dog", "red", "##s", "and", "of")
PROMPTS = ["a red cat", "dogs and a zebra", " ".join(["cats of"] * 30)]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def original_tensors():
    """The names and the order of axes of ImageReward.pt, in small, with the keys that nothing reads."""
    torch.manual_seed(0)
    tensors = {}

    def add(name, *shape, scale=0.1):
        tensors[name] = torch.randn(shape) * scale

    def add_linear(name, rows, columns):
        add(f"{name}.weight", rows, columns, scale=1.2 / math.sqrt(columns))
        add(f"{name}.bias", rows)

    def add_norm(name, width):
        add(f"{name}.weight", width)
        tensors[f"{name}.weight"] += 1
        add(f"{name}.bias", width)

    # As small as the square roots of the towers' two epsilons, for these to be seen in the result.
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    add(f"{vision}cls_token", 1, 1, WIDTH, scale=1e-3)
    add(f"{vision}pos_embed", 1, (SIDE // PATCH) ** 2 + 1, WIDTH, scale=1e-3)
    # Nearly constant over a patch: PIL's rounding to 8 bits, which the reward does not do, then averages out.
    add(f"{vision}patch_embed.proj.weight", WIDTH, 3, PATCH, PATCH, scale=1e-6)
    tensors[f"{vision}patch_embed.proj.weight"] += torch.randn(WIDTH, 3, 1, 1) * 2e-5
    add(f"{vision}patch_embed.proj.bias", WIDTH, scale=1e-3)
    for layer in range(LAYERS):
        block = f"{vision}blocks.{layer}."
        add_norm(f"{block}norm1", WIDTH)
        add_linear(f"{block}attn.qkv", 3 * WIDTH, WIDTH)
        add_linear(f"{block}attn.proj", WIDTH, WIDTH)
        add_norm(f"{block}norm2", WIDTH)
        add_linear(f"{block}mlp.fc1", 80, WIDTH)
        add_linear(f"{block}mlp.fc2", WIDTH, 80)
    add_norm(f"{vision}norm", WIDTH)
    tensors[f"{text}embeddings.position_ids"] = torch.arange(40)[None]
    add(f"{text}embeddings.word_embeddings.weight", len(WORDS), TEXT_WIDTH, scale=1e-6)
    add(f"{text}embeddings.position_embeddings.weight", 40, TEXT_WIDTH, scale=1e-6)
    add_norm(f"{text}embeddings.LayerNorm", TEXT_WIDTH)
    for layer in range(LAYERS):
        block = f"{text}encoder.layer.{layer}."
        for attention, columns in (("attention", TEXT_WIDTH), ("crossattention", WIDTH)):
            add_linear(f"{block}{attention}.self.query", TEXT_WIDTH, TEXT_WIDTH)
            add_linear(f"{block}{attention}.self.key", TEXT_WIDTH, columns)
            add_linear(f"{block}{attention}.self.value", TEXT_WIDTH, columns)
            add_linear(f"{block}{attention}.output.dense", TEXT_WIDTH, TEXT_WIDTH)
            add_norm(f"{block}{attention}.output.LayerNorm", TEXT_WIDTH)
        add_linear(f"{block}intermediate.dense", 72, TEXT_WIDTH)
        add_linear(f"{block}output.dense", TEXT_WIDTH, 72)
        add_norm(f"{block}output.LayerNorm", TEXT_WIDTH)
    add_linear("blip.vision_proj", 4, WIDTH)
    add_linear("blip.text_proj", 4, TEXT_WIDTH)
    for index, rows, columns in ((0, 20, TEXT_WIDTH), (2, 16, 20), (4, 12, 16), (6, 8, 12), (7, 1, 8)):
        add_linear(f"mlp.layers.{index}", rows, columns)
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(original_tensors(), folder / "ImageReward.pt")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def made(folder, **options):
    return rewards.load(
        "imagereward", options={"model": str(folder), "tokenizer": str(folder / "tokenizer"), **options}
    )


def pictures(height=48, width=83):
    """(3, 3, H, W) in [0, 1], of 8 bits."""
    coarse = torch.rand((3, 3, 7, 7), generator=torch.Generator().manual_seed(1))
    return (interpolate(coarse, (height, width), mode="bilinear") * 255).round() / 255


def attention(tensors, queries, keys, values, hidden=None):
    """softmax(q k' / sqrt(64)) v over heads of 64; `hidden` (T,) are keys that are not seen."""
    q, k, v = (part.unflatten(-1, (-1, HEAD)).transpose(0, 1) for part in (queries, keys, values))
    scores = q @ k.transpose(-1, -2) / math.sqrt(HEAD)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def by_hand(tensors, image, ids):
    """One image (3, H, W) of 8 bits and one text's ids, padded: the original's arithmetic in fp64."""
    tensors = {name: value.double() for name, value in tensors.items()}

    def apply(name, x):
        return linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(name, x, eps):
        return layer_norm(x, x.shape[-1:], tensors[f"{name}.weight"], tensors[f"{name}.bias"], eps)

    (picture,) = as_pil(image[None])
    short = min(picture.size)
    size = [SIDE * side // short for side in picture.size]
    left, top = (round((side - SIDE) / 2) for side in size)
    picture = picture.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + SIDE, top + SIDE))
    pixels = (np.asarray(picture, dtype=np.float64) / 255 - MEAN) / STD
    grid = SIDE // PATCH
    patches = torch.from_numpy(pixels).view(grid, PATCH, grid, PATCH, 3).permute(0, 2, 4, 1, 3).reshape(grid**2, -1)
    name = "blip.visual_encoder."
    x = linear(patches, tensors[f"{name}patch_embed.proj.weight"].flatten(1), tensors[f"{name}patch_embed.proj.bias"])
    x = torch.cat([tensors[f"{name}cls_token"][0], x]) + tensors[f"{name}pos_embed"][0]
    for layer in range(LAYERS):
        block = f"{name}blocks.{layer}."
        q, k, v = apply(f"{block}attn.qkv", norm(f"{block}norm1", x, 1e-6)).chunk(3, -1)
        x = x + apply(f"{block}attn.proj", attention(tensors, q, k, v))
        x = x + apply(f"{block}mlp.fc2", gelu(apply(f"{block}mlp.fc1", norm(f"{block}norm2", x, 1e-6))))
    seen = norm(f"{name}norm", x, 1e-6)

    name = "blip.text_encoder."
    x = tensors[f"{name}embeddings.word_embeddings.weight"][ids]
    x = x + tensors[f"{name}embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(f"{name}embeddings.LayerNorm", x, 1e-12)
    for layer in range(LAYERS):
        block = f"{name}encoder.layer.{layer}."
        for kind, looked_at, hidden in (("attention", None, ids == 0), ("crossattention", seen, None)):
            source = x if looked_at is None else looked_at
            q = apply(f"{block}{kind}.self.query", x)
            k, v = (apply(f"{block}{kind}.self.{part}", source) for part in ("key", "value"))
            mixed = apply(f"{block}{kind}.output.dense", attention(tensors, q, k, v, hidden))
            x = norm(f"{block}{kind}.output.LayerNorm", x + mixed, 1e-12)
        grown = apply(f"{block}output.dense", gelu(apply(f"{block}intermediate.dense", x)))
        x = norm(f"{block}output.LayerNorm", x + grown, 1e-12)
    x = x[0]
    for index in (0, 2, 4, 6, 7):
        x = apply(f"mlp.layers.{index}", x)
    return (x.item() - 0.16717362830052426) / 1.0333394966054072


def ids_of(prompt):
    """Of WORDS, with the plural's "s" apart, between [CLS] and [SEP], cut at and padded to 35."""
    words = [part for word in prompt.split() for part in ([word[:-1], "##s"] if word.endswith("s") else [word])]
    ids = [WORDS.index(word) if word in WORDS else 1 for word in words][:33]
    return torch.tensor([2, *ids, 3] + [0] * (33 - len(ids)))


# Without a resize nothing is rounded. 83 becomes 55, whose middle lies between two pixels.
@pytest.mark.parametrize(
    ("size", "tolerance"), [((SIDE, SIDE), 1e-5), ((48, 83), 1e-3), ((70, 24), 1e-3)], ids=["same", "wide", "tall"]
)
def test_equals_the_original_one_image_at_a_time(folder, size, tolerance):
    images, tensors = pictures(*size), original_tensors()
    with torch.no_grad():
        scores = made(folder)(images, PROMPTS)
    expected = [by_hand(tensors, image, ids_of(prompt)) for image, prompt in zip(images, PROMPTS, strict=True)]
    torch.testing.assert_close(scores.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=0)
    # The three prompts and images are told apart by far more than the tolerance.
    assert scores.std() > 0.1


def test_a_safetensors_file_is_the_same(folder, tmp_path):
    save_file(original_tensors(), tmp_path / "any.safetensors")
    images = pictures(40, 40)
    with torch.no_grad():
        found = made(folder, model=str(tmp_path / "any.safetensors"))(images, PROMPTS)
        assert_same(found, made(folder)(images, PROMPTS))


def test_text_matters(folder):
    images = pictures()[:1].expand(2, -1, -1, -1)
    with torch.no_grad():
        one, other = made(folder)(images, ["a red cat", "a red dog"])
    assert abs(one - other) > 0.01


def test_gradient_reaches_every_pixel_and_recomputing_changes_nothing(folder):
    recomputed, kept = (made(folder, checkpointing=checkpointing) for checkpointing in (True, False))
    gradient = pixel_gradient(recomputed, pictures(40, 40), PROMPTS)
    assert (gradient != 0).all()
    assert_same(gradient, pixel_gradient(kept, pictures(40, 40), PROMPTS))
    assert not any(parameter.requires_grad for parameter in recomputed.function.parameters())


@pytest.mark.parametrize("factor", [1e4, 1e-6])
def test_fp16_has_a_gradient_of_any_size(folder, factor):
    images, low = pictures(40, 40), made(folder, dtype="fp16")
    wanted = pixel_gradient(made(folder), images, PROMPTS)
    found = pixel_gradient(lambda *given: factor * low(*given), images, PROMPTS) / factor
    assert (found - wanted).norm() < 0.03 * wanted.norm()


def test_autocast_changes_nothing_and_a_lower_dtype_little(folder):
    images = pictures(40, 40)
    with torch.no_grad():
        expected = made(folder)(images, PROMPTS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_same(made(folder)(images, PROMPTS), expected)
        lower = made(folder, dtype="bf16")(images, PROMPTS)
    assert lower.dtype == torch.float32
    torch.testing.assert_close(lower, expected, rtol=0.1, atol=0)


def test_gradient_is_the_slope(folder):
    """Against a finite difference along a random direction, in fp64."""
    reward = made(folder, checkpointing=False).function.double()
    images = pictures(40, 40)[:1].double() * 0.8 + 0.1
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    images.requires_grad_()
    reward(images, PROMPTS[:1]).sum().backward()
    slope = (images.grad * direction).sum()
    with torch.no_grad():
        ahead, behind = (reward(images + step * direction, PROMPTS[:1]) for step in (1e-5, -1e-5))
    torch.testing.assert_close(((ahead - behind) / 2e-5)[0], slope, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("blip.visual_encoder.norm.bias"),
            "no 'blip.visual_encoder.norm.bias'; it must be",
        ),
        (
            lambda tensors: tensors.pop("mlp.layers.4.weight"),
            "'mlp.', is another: 'layers.4.weight is missing'",
        ),
        (
            lambda tensors: tensors.update({"blip.text_encoder.embeddings.LayerNorm.bias": torch.zeros(3)}),
            r"LayerNorm.bias' is \(3,\).*\(128,\)",
        ),
        (
            lambda tensors: tensors.update({"mlp.layers.0.weight": torch.zeros(20, 5)}),
            "head takes 5 numbers, and its text tower gives 128",
        ),
    ],
    ids=["vision", "head", "shape", "width"],
)
def test_another_checkpoint(folder, tmp_path, change, message):
    tensors = original_tensors()
    change(tensors)
    torch.save(tensors, tmp_path / "ImageReward.pt")
    with pytest.raises(RewardSpecError, match=message):
        made(folder, model=str(tmp_path))
