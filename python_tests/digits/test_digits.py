"""The embedded default: what ships, what the judges see in it, and that pretraining can be repeated."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

from rftcore import digits
from rftcore.digits import data, judges, prompts
from rftcore.digits.evaluation import agreement, sample

PACKAGE = Path(digits.__file__).parent


@pytest.fixture(scope="module")
def scans() -> data.Digits:
    return data.load()


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return StableDiffusionPipeline.from_pretrained(digits.path(), local_files_only=True)


# The package


def test_importing_it_needs_neither_torch_nor_scikit_learn():
    code = "import sys, rftcore.digits as d; d.train_prompts(); print({'torch', 'sklearn'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr


def test_judging_needs_no_scikit_learn():
    code = (
        "import sys, torch; sys.modules['sklearn'] = None; from rftcore import digits;"
        "images = torch.rand(1, 3, 32, 32); digits.reward(images, ['a two']); digits.held_out(images, ['a two'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_unknown_attribute_is_named():
    with pytest.raises(AttributeError, match="'rewards'.*it has path, reward"):
        _ = digits.rewards


def test_missing_pipeline_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(digits, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="python -m rftcore.digits.pretrain"):
        digits.path()


def test_missing_judges_name_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr(judges, "WEIGHTS", tmp_path / "judges.safetensors")
    judges._judges.cache_clear()
    with pytest.raises(FileNotFoundError, match="python -m rftcore.digits.pretrain"):
        digits.reward(torch.rand(1, 3, 32, 32), ["a two"])


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'pip install "rftcore\[digits\]"'):
        data.load()


def test_ships_in_8_megabytes_of_safetensors():
    shipped = [*Path(digits.path()).rglob("*"), judges.WEIGHTS]
    assert sum(file.stat().st_size for file in shipped) <= 8e6
    assert not [file for file in shipped if file.suffix in {".bin", ".pt", ".ckpt", ".pkl"}]


# The prompts


def test_prompts_are_disjoint_labelled_and_balanced():
    train, held_out = digits.train_prompts(), digits.held_out_prompts()
    assert (len(train), len(held_out)) == (80, 20)
    assert len({*train, *held_out}) == 100
    assert Counter(map(digits.label, train)) == dict.fromkeys(range(10), 8)
    assert Counter(map(digits.label, held_out)) == dict.fromkeys(range(10), 2)


def test_held_out_prompts_hold_only_words_that_train_prompts_teach():
    lists = (digits.train_prompts(), digits.held_out_prompts())
    taught, asked = ({word for prompt in part for word in prompt.split()} for part in lists)
    assert asked <= taught


def test_label_reads_words_and_numerals_in_any_case():
    assert digits.label("A Thin handwritten SEVEN.") == 7
    assert digits.label("number 0") == 0
    assert digits.label("the digit 4, four") == 4


@pytest.mark.parametrize("prompt", ["", "a cat", "someone", "12", "a two or a three"])
def test_label_refuses_none_or_several(prompt):
    with pytest.raises(ValueError, match="exactly one of zero, one, two"):
        digits.label(prompt)


def test_label_refuses_what_is_no_string():
    with pytest.raises(TypeError, match="got 7"):
        digits.label(7)


def test_every_word_is_one_token(pipeline):
    for prompt in digits.train_prompts():
        assert len(pipeline.tokenizer(prompt).input_ids) == 2 + len(prompt.split())


def test_other_words_fall_apart_into_bytes_and_come_back(pipeline):
    ids = pipeline.tokenizer("a zebra, 7 naïve").input_ids
    assert pipeline.tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "azebra,7naïve"


# The data


def test_images_are_black_on_white(scans):
    assert scans.images.shape == (1797, 3, 32, 32)
    assert scans.images.min() >= 0 and scans.images.max() <= 1
    assert scans.images[:, :, 0].min() > 0.9  # the frame is paper
    assert scans.images.amin(dim=(1, 2, 3)).max() < 0.1  # every scan has ink


def test_stroke_weight_sorts_by_ink_within_each_digit(scans):
    ink = 1 - scans.images.mean(dim=(1, 2, 3))
    for digit in range(10):
        masses = [ink[(scans.labels == digit) & (scans.weight == weight)] for weight in (-1, 0, 1)]
        assert masses[0].mean() < masses[1].mean() < masses[2].mean()
        assert all(0.25 < len(mass) / sum(map(len, masses)) < 0.4 for mass in masses)


def test_halves_are_disjoint_and_stratified(scans):
    first, second = data.halves(scans)
    assert len(first) + len(second) == len(scans)
    seen, unseen = ({image.numpy().tobytes() for image in half.images} for half in (first, second))
    assert not seen & unseen
    assert (first.labels.bincount() - second.labels.bincount()).abs().max() <= 1


# The judges


def _asked(labels: torch.Tensor) -> list[str]:
    return [prompts.phrase("the digit {word}", digit) for digit in labels.tolist()]


def test_each_judge_reads_the_other_half(scans):
    first, second = data.halves(scans)
    assert digits.held_out(first.images, _asked(first.labels)).mean() >= 0.95
    reader, _ = judges._judges(second.images.device, torch.float32)
    assert agreement(reader, second.images, second.labels) >= 0.95


def test_reward_prefers_the_right_prompt(scans):
    images, labels = scans.images[-200:], scans.labels[-200:]
    right, wrong = digits.reward(images, _asked(labels)), digits.reward(images, _asked((labels + 1) % 10))
    assert right.mean() > -0.5 and wrong.mean() < -2.5
    assert digits.held_out(images, _asked((labels + 1) % 10)).mean() < 0.05


def test_declared_kinds():
    assert digits.reward.differentiable is True and digits.held_out.differentiable is False
    assert (digits.reward.unit, digits.held_out.unit) == ("nats", "share")
    assert digits.reward.range[1] == 0 and digits.held_out.range == (0, 1)


def test_reward_gradient_is_exact():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 40, 32, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(images)

    def value(step):
        return digits.reward(images + step * direction, ["a two", "the number 7"]).sum()

    (gradient,) = torch.autograd.grad(value(0), images)
    numeric = (value(1e-5) - value(-1e-5)) / 2e-5
    assert torch.allclose((gradient * direction).sum(), numeric, rtol=1e-7)
    assert gradient.flatten(1).norm(dim=1).min() > 0


def test_pixel_ascent_on_the_reward_convinces_the_held_out_judge(scans):
    """The reward's gradient means something: it turns blurred eights and threes into what it is asked for."""
    images = scans.images[(scans.labels == 8) | (scans.labels == 3)][:40].clone().requires_grad_()
    target = ["a drawing of the number 9"] * 40
    before = digits.held_out(images, target).mean()
    optimizer = torch.optim.Adam([images], lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        (-digits.reward(images, target).sum()).backward()
        optimizer.step()
        with torch.no_grad():
            images.clamp_(0, 1)
    assert digits.held_out(images, target).mean() > before + 0.2


def test_held_out_gives_zeros_and_ones_without_gradient():
    images = torch.rand(4, 3, 32, 32, requires_grad=True)
    verdict = digits.held_out(images, ["a two"] * 4)
    assert not verdict.requires_grad and set(verdict.tolist()) <= {0.0, 1.0}


def test_judges_first_used_in_inference_mode_stay_differentiable():
    judges._judges.cache_clear()
    with torch.inference_mode():
        digits.reward(torch.rand(1, 3, 32, 32), ["a two"])
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    digits.reward(images, ["a two"]).sum().backward()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("judge", ["reward", "held_out"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_judges_take_any_float(judge, dtype, scans):
    images, asked = scans.images[:50], _asked(scans.labels[:50])
    expected = getattr(digits, judge)(images.to(dtype).double(), asked)
    with torch.autocast("cpu", torch.bfloat16):
        verdict = getattr(digits, judge)(images.to(dtype), asked)
    assert verdict.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.allclose(verdict.double(), expected, atol=1e-5)


def test_an_empty_batch_is_judged():
    nothing = torch.rand(0, 3, 32, 32)
    assert digits.reward(nothing, []).shape == digits.held_out(nothing, []).shape == (0,)


@pytest.mark.parametrize("judge", ["reward", "held_out"])
@pytest.mark.parametrize(
    ("images", "asked", "error", "message"),
    [
        (torch.rand(3, 32, 32), ["a two"], ValueError, r"\(B, 3, H, W\).*\(3, 32, 32\)"),
        (torch.rand(1, 1, 32, 32), ["a two"], ValueError, r"\(B, 3, H, W\).*\(1, 1, 32, 32\)"),
        (torch.rand(2, 3, 32, 32), ["a two"], ValueError, "one prompt per image, 2 in all, got 1 prompts"),
        (torch.rand(1, 3, 32, 32), "a two", ValueError, "a list with one prompt per image.*a single string"),
        (torch.rand(1, 3, 32, 32), ["a cat"], ValueError, "'a cat' names no digit"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["a two"], TypeError, "floating-point.*uint8"),
        ([0.5], ["a two"], TypeError, "floating-point.*list"),
    ],
)
def test_judges_explain_wrong_input(judge, images, asked, error, message):
    with pytest.raises(error, match=message):
        getattr(digits, judge)(images, asked)


# The pipeline


def test_loads_as_an_ordinary_fp32_pipeline(pipeline):
    modules = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert {parameter.dtype for module in modules for parameter in module.parameters()} == {torch.float32}
    assert pipeline.safety_checker is None
    assert pipeline.tokenizer.model_max_length == pipeline.text_encoder.config.max_position_embeddings


def test_has_the_layers_that_lora_targets(pipeline):
    names = [name for name, _ in pipeline.unet.named_modules()]
    for target in ("to_q", "to_k", "to_v", "to_out.0"):
        assert sum(name.endswith(target) for name in names) == 10


def test_samples_read_as_the_digits_asked_for(pipeline):
    asked = digits.held_out_prompts() * 2
    images = sample(pipeline, asked, guidance_scale=2.0, steps=10, seed=0)
    assert images.shape == (40, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    share = digits.held_out(images, asked).mean()
    assert share > 0.35


def test_bold_samples_have_more_ink_than_thin_ones(pipeline):
    words = prompts.WORDS
    ink = [
        1 - sample(pipeline, [f"a {kind} {word}" for word in words], guidance_scale=2.0, steps=10, seed=0).mean()
        for kind in ("thin", "bold")
    ]
    assert ink[1] > 1.15 * ink[0]


# The pretraining


def test_captions_are_true_of_the_weight_and_mostly_of_the_digit():
    from rftcore.digits.diffusion_training import caption

    torch.manual_seed(0)
    captions = [caption(3, 1) for _ in range(2000)]
    named = Counter(digits.label(text) for text in captions if text)
    assert named.keys() == {3, 8} and 0.6 < named[3] / named.total() < 0.7
    assert 0.08 < captions.count("") / 2000 < 0.12
    assert not any("thin" in text for text in captions)
    assert {*captions} - {""} <= {*digits.train_prompts(), *digits.held_out_prompts()}


@pytest.mark.slow
def test_pretraining_repeats_bit_for_bit_and_loads(scans, tmp_path):
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    from rftcore.digits import pretrain

    budget = pretrain.Budget(autoencoder=2, denoiser=3, reward=2)
    tokenizer = CLIPTokenizer.from_pretrained(f"{digits.path()}/tokenizer")
    for name in ("first", "second"):
        torch.rand(3)
        state = torch.get_rng_state()
        trained = pretrain.train(scans[torch.arange(0, 1797, 9)], tokenizer, budget, seed=0)
        assert torch.equal(torch.get_rng_state(), state)
        pretrain.save(trained, tmp_path / name)
    files = sorted(file.relative_to(tmp_path / "first") for file in (tmp_path / "first").rglob("*.*") if file.is_file())
    assert Path("judges.safetensors") in files and Path("pipeline/unet/diffusion_pytorch_model.safetensors") in files
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file
    StableDiffusionPipeline.from_pretrained(tmp_path / "first" / "pipeline")
