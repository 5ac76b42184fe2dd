"""`rftcore rewards`: what is said of the rewards that ship."""

from rftcore.commands.rewards import describe
from rftcore.rewards import KNOWN


def test_every_reward_is_described():
    paragraphs = dict(paragraph.split(": ", 1) for paragraph in describe().split("\n\n"))
    assert list(paragraphs) == sorted(KNOWN)
    for name, paragraph in paragraphs.items():
        first, *facts = paragraph.split("\n")
        assert first.endswith(".") and len(f"{name}: {first}") <= 120, name
        assert all(len(line) <= 120 for line in facts)
        said = {line.split()[0] for line in facts}
        assert {"gradient", "unit"} <= said, name
        # What is downloaded has a size and a licence.
        if "loads" in said:
            assert "licence" in said and "GB" in paragraph, name


def test_facts_are_those_of_the_reward():
    paragraphs = dict(paragraph.split(": ", 1) for paragraph in describe().split("\n\n"))
    assert "gradient  yes" in paragraphs["symmetry"] and "options   kind='left_right'" in paragraphs["symmetry"]
    assert "unit      mean squared error, -1 to 0" in paragraphs["symmetry"]
    assert "gradient  no (DDPO, DPOK, RWR, SFT)" in paragraphs["file_size_compressibility"]
    # An argument that must be given has no default.
    assert "options   target, model='microsoft/resnet-50'" in paragraphs["adversarial"]
    assert "options" not in paragraphs["brightness"]
