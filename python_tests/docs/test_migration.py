"""docs/migration.md: every option of theirs is there with its default, and every name and value of ours is real."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import pytest

from rftcore.training import load_config
from rftcore.training.algorithm_configs import ALGORITHMS

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "migration.md").read_text(encoding="utf-8")
# Read in TRL 0.23.1, ddpo-pytorch 1958463 and AlignProp b22918a.
THEIRS = json.loads((HERE / "their_configs.json").read_text())
# Heading of a section -> whose options its table lists, and the algorithm of its recipe.
SECTIONS = {
    "TRL's DDPOConfig": ("DDPOConfig", "ddpo"),
    "TRL's AlignPropConfig": ("AlignPropConfig", "alignprop"),
    "ddpo-pytorch's config": ("ddpo-pytorch", "ddpo"),
    "AlignProp's config": ("AlignProp", "alignprop"),
}


def rows(heading):
    """The recipe that a section's table names in its head, and its rows: (theirs, default, ours, in the recipe)."""
    section = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return lines[0][3].removeprefix("in ").strip("`"), [line[:4] for line in lines[2:]]


def names(cell):
    return re.findall(r"`([^`]+)`", cell)


def shown(value):
    if isinstance(value, float):
        return f"{value:g}"
    return "empty" if value == "" else value if isinstance(value, str) else json.dumps(value)


def flat(config, prefix=""):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from flat(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_option_of_theirs_has_one_row_with_its_default(heading):
    theirs, listed = THEIRS[SECTIONS[heading][0]], rows(heading)[1]
    assert [names(row[0]) for row in listed] == [[name] for name in theirs]
    for (name, default), row in zip(theirs.items(), listed, strict=True):
        assert row[1] in (shown(default), "..."), name


@pytest.mark.parametrize("heading", SECTIONS)
def test_what_is_named_of_ours_exists_and_the_recipe_has_that_value(heading):
    recipe, listed = rows(heading)
    config = dict(flat(load_config(SECTIONS[heading][1], recipe)))
    known = {name for kind in ALGORITHMS.values() for name, _ in flat(kind())}
    for theirs, _, ours, values in listed:
        assert ours == "none" or names(ours), theirs
        assert set(names(ours)) <= known, theirs
        assert values == ", ".join(shown(config[name]) for name in names(ours) if name in config), theirs


def test_options_named_in_the_text_exist():
    known = {name for kind in ALGORITHMS.values() for name, _ in flat(kind())}
    of_ours = re.compile(r"(?<![\w.])(?:train|sampling|eval|lora|model|reward|memory)\.[a-z_0-9]+")
    found = set(of_ours.findall(PAGE)) - set(THEIRS["ddpo-pytorch"])
    assert len(found) > 20 and found <= known, found - known


@pytest.mark.parametrize(("module", "kind"), [("ddpo_config", "DDPOConfig"), ("alignprop_config", "AlignPropConfig")])
def test_the_list_of_theirs_is_trls(module, kind):
    pytest.importorskip("trl", reason="TRL is not installed (pip install trl==0.23.1)")
    try:
        found = getattr(importlib.import_module(f"trl.trainer.{module}"), kind)()
    except ImportError:
        pytest.skip(f"this TRL has no {kind}; 0.23 is the last that has")
    values = json.loads(json.dumps({field.name: getattr(found, field.name) for field in dataclasses.fields(found)}))
    assert {**values, "exp_name": ""} == {**THEIRS[kind], "exp_name": ""}
