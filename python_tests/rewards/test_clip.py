"""CLIP's towers and the rewards that are cosines: CLIPScore and PickScore."""

import copy

import pytest
import torch
from tiny_rewards import (
    EOS,
    SIZE,
    assert_same,
    clip_config,
    cosines,
    eight_bit_images,
    pixel_gradient,
    save_clip,
    save_tokenizer,
)

from rftcore import rewards
from rftcore.counting import saved_bytes
from rftcore.rewards import RewardSpecError
from rftcore.rewards.clip_score import ClipScore
from rftcore.rewards.pickscore import PickScore

PROMPTS = ["a cat", "two dogs, running", "a very long prompt of more letters than fit!"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_clip(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reward(folder):
    return ClipScore(folder)


@pytest.mark.parametrize("size", [(64, 64), (45, 71)], ids=str)
def test_scores_are_the_slow_ones(folder, reward, size):
    images = eight_bit_images(3, *size)
    wanted, scale = cosines(folder, images, PROMPTS)
    found = reward(images, PROMPTS)
    assert found.shape == (3,) and found.dtype is torch.float32
    torch.testing.assert_close(found.double(), 100 * wanted, rtol=1e-3, atol=0)
    pick = PickScore(folder, tokenizer=None)
    torch.testing.assert_close(pick(images, PROMPTS).double(), scale * wanted, rtol=1e-3, atol=0)
    # Each with its own prompt, and prompts and images matter.
    assert wanted.std() > 0.02
    shuffled = reward(images, PROMPTS[::-1])
    assert (shuffled - found).abs()[[0, 2]].min() > 0.02


def test_old_configs_whose_end_token_is_wrong(tmp_path):
    """Those of the first conversions say 2; the end token is the highest id there."""
    save_clip(tmp_path, eos=2)
    images = eight_bit_images(3, SIZE, SIZE)
    wanted, _ = cosines(tmp_path, images, PROMPTS)
    torch.testing.assert_close(ClipScore(str(tmp_path))(images, PROMPTS).double(), 100 * wanted, rtol=1e-5, atol=0)


def test_gradient_reaches_every_pixel_and_is_that_of_the_whole_graph(folder, reward):
    images = eight_bit_images(2, 61, 50)
    gradient = pixel_gradient(reward, images, PROMPTS[:2])
    plain = ClipScore(folder, checkpointing=False)
    assert_same(gradient, pixel_gradient(plain, images, PROMPTS[:2]))
    # A centre crop of 50 x 50 is seen, by 28 / 50 of its resolution; what lies beyond its rim is not.
    assert (gradient[:, :, 8:-8] != 0).all()
    step = images + 1e-3 * gradient / gradient.abs().max()
    assert (reward(step.clamp(0, 1), PROMPTS[:2]) > reward(images, PROMPTS[:2])).all()


def test_gradient_is_the_derivative(folder):
    wide = ClipScore(folder).clip.double()
    weights = torch.randn(1, 24, dtype=torch.float64)

    def score(images):
        return (wide.image_features(images) * weights).sum()

    images = (eight_bit_images(1, 30, 30).double() * 0.8 + 0.1).requires_grad_()
    (gradient,) = torch.autograd.grad(score(images), images)
    direction, h = torch.randn_like(images), 1e-6
    with torch.no_grad():
        slope = (score(images + h * direction) - score(images - h * direction)) / (2 * h)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


def test_the_tower_keeps_its_layers_inputs_alone(folder, reward):
    images = eight_bit_images(2, SIZE, SIZE).requires_grad_()
    kept = {}
    for checkpointing in (False, True):
        model = ClipScore(folder, checkpointing=checkpointing)
        model(images, PROMPTS[:2])
        with saved_bytes(model.parameters()) as count:
            model(images, PROMPTS[:2])
        kept[checkpointing] = count["bytes"]
    assert kept[True] < kept[False] / 3


def test_a_prompt_is_encoded_once(folder, monkeypatch):
    reward = ClipScore(folder)
    model, calls = reward.clip.model, []
    encode = model.get_text_features
    monkeypatch.setattr(model, "get_text_features", lambda **k: calls.append(1) or encode(**k))
    images = eight_bit_images(3, 40, 40)
    first = reward(images, ["a", "b", "a"])
    assert len(calls) == 2
    assert torch.equal(reward(images, ["a", "b", "a"]), first) and len(calls) == 2
    # Moved or cast, it is encoded again.
    reward.to(torch.bfloat16)
    reward(images, ["a", "b", "a"])
    assert len(calls) == 4


def test_the_cache_is_bounded(folder, monkeypatch):
    monkeypatch.setattr("rftcore.rewards.clip._KEPT_PROMPTS", 2)
    clip = ClipScore(folder).clip
    first = clip.text_features(["a", "b", "a", "c"])
    assert list(clip._texts) == ["a", "c"]
    assert torch.equal(clip.text_features(["a", "b", "a", "c"]), first)


def test_features_of_inference_mode_serve_a_gradient_later(folder):
    reward = ClipScore(folder)
    images = eight_bit_images(1, 40, 40)
    with torch.inference_mode():
        reward(images, PROMPTS[:1])
    assert pixel_gradient(reward, images, PROMPTS[:1]).any()


def test_values_depend_on_neither_batch_nor_autocast_nor_grad_mode(reward):
    images = eight_bit_images(3, 50, 40)
    together = reward(images, PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(reward(images, PROMPTS), together)
    apart = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_other_dtypes_are_near(folder, reward, dtype):
    images = eight_bit_images(3, 50, 40)
    low = ClipScore(folder, dtype=dtype)
    assert low.clip.model.dtype is {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    found = low(images, PROMPTS)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, reward(images, PROMPTS), rtol=0, atol=1.0 if dtype == "bf16" else 0.1)
    assert pixel_gradient(low, images, PROMPTS).abs().sum() > 0


@pytest.mark.parametrize("factor", [1e4, 1.0, 1e-6])
def test_fp16_has_a_gradient_of_any_size(folder, reward, factor):
    """Without scaling, 1e4 of it overflows, and of 1e-6 nothing is left."""
    images = eight_bit_images(2, 50, 40)
    low = ClipScore(folder, dtype="fp16")
    wanted = pixel_gradient(reward, images, PROMPTS[:2])
    found = pixel_gradient(lambda *given: factor * low(*given), images, PROMPTS[:2]) / factor
    assert (found - wanted).norm() < 0.01 * wanted.norm()
    # A row without a gradient, beside one with it.
    alone = pixel_gradient(lambda *given: low(*given)[:1], images, PROMPTS[:2])
    assert torch.equal(alone[1], torch.zeros_like(alone[1])) and alone[0].any()


def test_it_is_frozen_copied_and_declared(folder, reward):
    assert not any(p.requires_grad for p in reward.parameters()) and not reward.clip.model.training
    images = eight_bit_images(1, 40, 40)
    copied = copy.deepcopy(reward)
    assert_same(pixel_gradient(copied, images, ["a"]), pixel_gradient(reward, images, ["a"]))
    for name in ("clip_score", "pickscore"):
        options = {"model": folder} | ({"tokenizer": folder} if name == "pickscore" else {})
        found = rewards.load(name, options=options)
        assert found.differentiable and found.licence and found.downloads and found.range[0] < found.range[1]
        assert found.to("cpu")(images, ["a"]).shape == (1,)


def test_one_prompt_is_not_every_images(folder, reward):
    images = eight_bit_images(2, 40, 40)
    for prompts, message in {("a cat",): "2 images and 1 prompts", "ab": "2 images and the text 'ab'"}.items():
        with pytest.raises(RewardSpecError, match=message):
            reward(images, prompts)


def test_errors(folder, tmp_path):
    with pytest.raises(RewardSpecError, match="'clip_score' has dtype='int8'; allowed are 'fp32', 'fp16', 'bf16'"):
        ClipScore(folder, dtype="int8")
    with pytest.raises(RewardSpecError, match="'pickscore' cannot load tokenizer='.*holds no tokenizer.json"):
        PickScore(folder, tokenizer=str(tmp_path))
    with pytest.raises(RewardSpecError, match="'pickscore' cannot load model='.*reward.options: {pickscore: {model: F"):
        PickScore(str(tmp_path))


def test_the_tokenizer_is_clips(tmp_path):
    """What the other tests stand on: the end token has the highest id, as in CLIP's vocabulary."""
    vocabulary = save_tokenizer(tmp_path)
    from transformers import CLIPTokenizer

    ids = CLIPTokenizer.from_pretrained(tmp_path)("ab c")["input_ids"]
    assert ids[-1] == max(ids) == vocabulary - 1 == CLIPTokenizer.from_pretrained(tmp_path).eos_token_id
    assert clip_config(vocabulary).text_config.eos_token_id == vocabulary - 1 and EOS
