"""The papers' prompt sets, and what is said of a name that is none."""

import collections

import pytest

from rftcore import prompts
from rftcore.prompts import PromptsError
from rftcore.prompts.templates import with_article


def test_simple_animals_are_45_nouns():
    animals = prompts.load("simple_animals")
    assert len(animals) == len(set(animals)) == 45
    assert (animals[0], animals[20], animals[-1]) == ("cat", "ant", "kangaroo")


def test_imagenet_animals_are_classes_0_to_397():
    animals = prompts.load("imagenet_animals")
    assert len(animals) == len(set(animals)) == 398
    # ImageNet's own numbers of some classes.
    known = {0: "tench, Tinca tinca", 151: "Chihuahua", 281: "tabby, tabby cat", 388: "giant panda, panda, panda bear"}
    assert all(animals[index].startswith(name) for index, name in known.items())
    assert animals[-1].startswith("puffer")


def test_animals_with_activities_and_their_articles():
    found = prompts.load("animal_activities")
    assert len(found) == len(set(found)) == 135
    assert found[0] == "a cat washing the dishes"
    counts = collections.Counter(prompt.split()[0] for prompt in found)
    assert counts == {"a": 132, "an": 3}
    assert "an ant playing chess" in found


@pytest.mark.parametrize(
    ("noun", "article"),
    [
        ("ox", "an"),
        ("hedgehog", "a"),
        ("hour glass", "an"),
        ("European fire salamander", "a"),
        ("one-eyed owl", "a"),
        ("unicorn", "a"),
        ("umbrella", "an"),
        ("unimportant detail", "an"),
        ("UK flag", "a"),
        ("F1 race car", "an"),
        ("Fox", "a"),
    ],
)
def test_article(noun, article):
    assert with_article(noun) == f"{article} {noun}"


def test_a_set_is_given_anew_every_time():
    prompts.load("simple_animals").clear()
    assert len(prompts.load("simple_animals")) == 45


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("simple_animal", "did you mean 'simple_animals'"),
        ("nothing_alike", "known set: animal_activities, imagenet_animals, simple_animals"),
    ],
)
def test_unknown_name(name, message):
    with pytest.raises(PromptsError, match=message):
        prompts.load(name)
