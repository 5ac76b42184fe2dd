"""The held-out side of prompts, and prompts put into a template."""

import hashlib
import random

import pytest

from rftcore import prompts
from rftcore.prompts import PromptsError

ANIMALS = prompts.load("imagenet_animals")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_split_is_a_rule_of_the_text(share):
    train, held_out = prompts.split(ANIMALS, share)
    # Every hexadecimal digit of the hash, against the share: the first 16 decide.
    expected = [text for text in ANIMALS if int(hashlib.sha256(text.encode()).hexdigest(), 16) < share * 2**256]
    assert held_out == expected
    assert train == [text for text in ANIMALS if text not in set(expected)]
    # A binomial's spread: 4 standard deviations of 398 tosses.
    assert abs(len(held_out) - share * 398) < 4 * (398 * share * (1 - share)) ** 0.5


def test_side_depends_neither_on_order_nor_on_other_prompts():
    _, held_out = prompts.split(ANIMALS, 0.3)
    shuffled = random.Random(1).sample(ANIMALS, 200)
    assert set(prompts.split(shuffled, 0.3)[1]) == set(held_out) & set(shuffled)
    assert set(prompts.split(ANIMALS, 0.2)[1]) < set(held_out)
    doubled = prompts.split([*ANIMALS, *ANIMALS], 0.3)
    assert not set(doubled[0]) & set(doubled[1])


@pytest.mark.parametrize(
    ("given", "share", "message"),
    [
        (["a cat"], 0.01, "held_out_share=0.01 of 1 prompts leaves no held-out prompt"),
        (["a cat"], 0.999, "leaves no training prompt"),
        (["a cat"], 1.0, "must be greater than 0 and below 1"),
        (["a cat"], 0.0, "must be greater than 0 and below 1"),
    ],
)
def test_a_side_without_prompts(given, share, message):
    with pytest.raises(PromptsError, match=message):
        prompts.split(given, share)


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ("a photo of a {}", ["a photo of a cat", "a photo of a ant {x}"]),
        ("{a}, {oil} painting", ["a cat, {oil} painting", "an ant {x}, {oil} painting"]),
    ],
)
def test_fill(template, filled):
    assert prompts.fill(["cat", "ant {x}"], template) == filled


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "{} and {a}", "{name}", ""])
def test_template_without_one_place(template):
    with pytest.raises(PromptsError, match='places for the prompt; write exactly one "{}"'):
        prompts.fill(["cat"], template)
