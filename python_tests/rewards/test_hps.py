"""HPSv2: open_clip's tensors in transformers' classes give what open_clip gives."""

import math

import numpy as np
import pytest
import torch
from tiny_rewards import SIZE, TOKENS, assert_same, eight_bit_images, pixel_gradient, save_tokenizer
from torch.nn import functional as F
from transformers import CLIPTokenizer

from rftcore import rewards
from rftcore.rewards import RewardSpecError
from rftcore.rewards.hps import HPSv2, HPSv21, from_open_clip
from rftcore.rewards.preprocessing import CLIP_MEAN, CLIP_STD

HEADS = 16
PROMPTS = ["a cat", "two dogs, running", "a very long prompt of more letters than fit!"]


def open_clip_tensors(vocabulary, *, seed=0, layers=(3, 2)):
    """A ViT-H-14's tensors in small, with its names: widths 48 and 32, of 16 heads each."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=0.1, around=0.0):
        return around + scale * torch.randn(*shape, generator=generator)

    def norm(name, width):
        return {f"{name}.weight": draw(width, around=1.0), f"{name}.bias": draw(width)}

    def blocks(prefix, width, count):
        found = {}
        for layer in range(count):
            name = f"{prefix}transformer.resblocks.{layer}."
            found |= norm(f"{name}ln_1", width) | norm(f"{name}ln_2", width)
            found |= {
                f"{name}attn.in_proj_weight": draw(3 * width, width, scale=0.3),
                f"{name}attn.in_proj_bias": draw(3 * width),
                f"{name}attn.out_proj.weight": draw(width, width),
                f"{name}attn.out_proj.bias": draw(width),
                f"{name}mlp.c_fc.weight": draw(4 * width, width, scale=0.3),
                f"{name}mlp.c_fc.bias": draw(4 * width),
                f"{name}mlp.c_proj.weight": draw(width, 4 * width),
                f"{name}mlp.c_proj.bias": draw(width),
            }
        return found

    patch = 7
    return {
        "logit_scale": torch.tensor(4.6),
        "text_projection": draw(32, 24, scale=0.3),
        "visual.proj": draw(48, 24, scale=0.3),
        "token_embedding.weight": draw(vocabulary, 32),
        "positional_embedding": draw(TOKENS, 32),
        "visual.class_embedding": draw(48),
        "visual.positional_embedding": draw((SIZE // patch) ** 2 + 1, 48),
        "visual.conv1.weight": draw(48, 3, patch, patch),
        **norm("ln_final", 32),
        **norm("visual.ln_pre", 48),
        **norm("visual.ln_post", 48),
        **blocks("visual.", 48, layers[0]),
        **blocks("", 32, layers[1]),
    }


def attention(w, name, x, causal):
    """Of one sequence (N, C), head by head."""
    q, k, v = (x @ w[f"{name}.in_proj_weight"].T + w[f"{name}.in_proj_bias"]).chunk(3, -1)
    width = x.shape[-1] // HEADS
    found = []
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        scores = q[:, part] @ k[:, part].T / math.sqrt(width)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        found.append(scores.softmax(-1) @ v[:, part])
    return torch.cat(found, -1) @ w[f"{name}.out_proj.weight"].T + w[f"{name}.out_proj.bias"]


def layer_norm(w, name, x):
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)


def transformer(w, prefix, x, causal):
    layer = 0
    while f"{prefix}transformer.resblocks.{layer}.ln_1.weight" in w:
        name = f"{prefix}transformer.resblocks.{layer}"
        x = x + attention(w, f"{name}.attn", layer_norm(w, f"{name}.ln_1", x), causal)
        hidden = layer_norm(w, f"{name}.ln_2", x) @ w[f"{name}.mlp.c_fc.weight"].T + w[f"{name}.mlp.c_fc.bias"]
        x = x + F.gelu(hidden) @ w[f"{name}.mlp.c_proj.weight"].T + w[f"{name}.mlp.c_proj.bias"]
        layer += 1
    return x


def prepared(image):
    """(3, SIZE, SIZE) of (3, H, W): what open_clip's evaluation does with a tensor, written out."""
    height, width = image.shape[-2:]
    scale = SIZE / max(height, width)
    small = F.interpolate(image[None], (round(height * scale), round(width * scale)), mode="bicubic", antialias=True)
    square = np.zeros((3, SIZE, SIZE))
    top, left = (SIZE - small.shape[2]) // 2, (SIZE - small.shape[3]) // 2
    square[:, top : top + small.shape[2], left : left + small.shape[3]] = small[0].numpy()
    mean, std = np.array(CLIP_MEAN)[:, None, None], np.array(CLIP_STD)[:, None, None]
    return torch.from_numpy((square - mean) / std)


def slow_score(tensors, tokenizer, image, prompt):
    """An open_clip model's cosine in fp64, of one image and one prompt padded with zeros."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    patches = F.conv2d(prepared(image.double())[None], w["visual.conv1.weight"], stride=7)[0].flatten(1).T
    x = torch.cat([w["visual.class_embedding"][None], patches]) + w["visual.positional_embedding"]
    x = transformer(w, "visual.", layer_norm(w, "visual.ln_pre", x), causal=False)
    seen = layer_norm(w, "visual.ln_post", x[0]) @ w["visual.proj"]
    ids = tokenizer(prompt)["input_ids"]
    if len(ids) > TOKENS:
        ids = [*ids[: TOKENS - 1], ids[-1]]
    ids = torch.tensor(ids + [0] * (TOKENS - len(ids)))
    x = transformer(w, "", w["token_embedding.weight"][ids] + w["positional_embedding"], causal=True)
    read = layer_norm(w, "ln_final", x)[ids.argmax()] @ w["text_projection"]
    return (seen / seen.norm()) @ (read / read.norm())


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hps")
    tensors = open_clip_tensors(save_tokenizer(folder))
    torch.save({"state_dict": tensors, "epoch": 1, "name": "hps"}, folder / "HPS_v2_compressed.pt")
    torch.save({"state_dict": open_clip_tensors(82, seed=1)}, folder / "HPS_v2.1_compressed.pt")
    return folder, tensors


@pytest.mark.parametrize("size", [(64, 64), (45, 71), (SIZE, SIZE)], ids=str)
def test_scores_are_open_clips(places, size):
    folder, tensors = places
    images = eight_bit_images(3, *size)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    wanted = torch.stack([slow_score(tensors, tokenizer, *pair) for pair in zip(images, PROMPTS, strict=True)])
    found = HPSv2(str(folder), tokenizer=None)(images, PROMPTS)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-6)
    assert wanted.std() > 0.01


def test_a_folder_of_transformers_and_the_file_itself(places, tmp_path):
    folder, tensors = places
    from_open_clip(tensors).save_pretrained(tmp_path)
    CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    images = eight_bit_images(2, 40, 50)
    wanted = HPSv2(str(folder), tokenizer=str(folder))(images, PROMPTS[:2])
    by_file = HPSv2(str(folder / "HPS_v2_compressed.pt"), tokenizer=None)
    assert_same(by_file(images, PROMPTS[:2]), wanted)
    assert_same(HPSv2(str(tmp_path), tokenizer=None)(images, PROMPTS[:2]), wanted)


def test_the_versions_are_two(places):
    folder = str(places[0])
    images = eight_bit_images(2, 40, 40)
    options = {"model": folder, "tokenizer": folder}
    found = [rewards.load(name, options=options)(images, PROMPTS[:2]) for name in ("hpsv2", "hpsv2_1")]
    assert (found[0] - found[1]).abs().min() > 1e-3
    assert HPSv2.differentiable and HPSv21.differentiable and HPSv2.downloads != HPSv21.downloads


def test_gradient_reaches_every_pixel(places):
    folder = str(places[0])
    images = eight_bit_images(2, 40, 52)
    ours = HPSv2(folder, tokenizer=folder)
    plain = HPSv2(folder, tokenizer=folder, checkpointing=False)
    gradient = pixel_gradient(ours, images, PROMPTS[:2])
    assert (gradient != 0).all()
    assert_same(gradient, pixel_gradient(plain, images, PROMPTS[:2]))
    assert not any(p.requires_grad for p in ours.parameters())


def test_half_precision(places):
    folder = str(places[0])
    images = eight_bit_images(2, 40, 40)
    low = HPSv2(folder, tokenizer=folder, dtype="bf16")
    assert low.clip.model.dtype is torch.bfloat16
    wanted = HPSv2(folder, tokenizer=folder)(images, PROMPTS[:2])
    torch.testing.assert_close(low(images, PROMPTS[:2]), wanted, rtol=0, atol=0.02)


def test_errors(places, tmp_path):
    folder, tensors = places
    for name, change, message in (
        ("few", {k: v for k, v in tensors.items() if k != "visual.proj"}, "visual.proj"),
        (
            "deep",
            {k: v for k, v in tensors.items() if "resblocks.1.mlp.c_fc.bias" not in k},
            "resblocks.1.mlp.c_fc.bias",
        ),
        ("torn", tensors | {"visual.ln_pre.bias": torch.ones(7)}, "size mismatch"),
    ):
        torch.save(change, tmp_path / f"{name}.pt")
        with pytest.raises(
            RewardSpecError, match=f"'hpsv2' cannot load model='.*{name}.pt': .*ViT-H-14: [^$]*{message}"
        ):
            HPSv2(str(tmp_path / f"{name}.pt"), tokenizer=str(folder))
    with pytest.raises(
        RewardSpecError, match="'hpsv2_1' cannot load model=.*holds no HPS_v2.1_compressed.safetensors or"
    ):
        HPSv21(str(tmp_path))
