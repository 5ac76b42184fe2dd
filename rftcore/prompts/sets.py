"""The prompt sets of the papers, by name."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources

from rftcore.prompts.templates import with_article

# DDPO's common animals (Black et al. 2023, section 5.2).
SIMPLE_ANIMALS = (
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle "
    "ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly "
    "llama camel bat gorilla hedgehog kangaroo"
).split()
ACTIVITIES = ("washing the dishes", "riding a bike", "playing chess")


def simple_animals() -> list[str]:
    """45 common animals, a bare noun each: DDPO's prompts for the aesthetic reward."""
    return list(SIMPLE_ANIMALS)


def imagenet_animals() -> list[str]:
    """398 animals, the names of ImageNet's classes 0 to 397: DDPO's prompts for compressibility.

    A class's name is its whole list of synonyms ("tench, Tinca tinca"), as the released code gives it to the model.
    """
    return (resources.files("rftcore.prompts") / "imagenet_animals.txt").read_text(encoding="utf-8").splitlines()


def animal_activities() -> list[str]:
    """135 prompts "a(n) [animal] [activity]", 45 animals with 3 activities: DDPO's prompts for alignment."""
    return [f"{with_article(animal)} {activity}" for animal in SIMPLE_ANIMALS for activity in ACTIVITIES]


KNOWN: dict[str, Callable[[], list[str]]] = {
    "animal_activities": animal_activities,
    "imagenet_animals": imagenet_animals,
    "simple_animals": simple_animals,
}
