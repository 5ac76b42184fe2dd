"""The algorithms' pages say what the code does: options and defaults, recipes, and the metrics of a run, both ways."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from rftcore.training import Callback, Trainer, load_config, recipes
from rftcore.training.algorithm_configs import ALGORITHMS
from rftcore.training.config import TrainConfig

DOCS = Path(__file__).parents[2] / "docs"
FOLDER = DOCS / "algorithms"
# Pages that are no algorithm of their own -> whose options they name.
VARIANTS = {"draft_k": "draft", "best_of_n": None}
GENERAL = {"index", "metrics"}
SECTIONS = [
    "What it is",
    "Usage",
    "Options",
    "Logged metrics",
    "Implementation details",
    "Results beside the reference's",
    "Cost",
]
GROUPS = ("model", "sampling", "train", "lora", "memory", "reward", "eval")


def page(name):
    return (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def section(text, title):
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table(text):
    """A table's rows as lists of cells, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:] if not line.startswith("| -")]


def code(cell):
    return re.match(r"`([^`]+)`", cell)[1]


def value_of(config, option):
    for name in option.split("."):
        config = getattr(config, name)
    return config


def options_in(text):
    """Dotted options in its code spans."""
    spans = re.findall(r"`([^`\n]+)`", text)
    return {name for span in spans for name in re.findall(rf"(?<![\w.])(?:{'|'.join(GROUPS)})\.[a-z_0-9]+", span)}


def recipes_in(text):
    return set(re.findall(r"\b(?:digits_(?!held_out)[a-z]\w*|[a-z]\w*_(?:sd15|sdxl)(?:_\d+gb)?)\b", text))


def algorithm_pages():
    return [name for name in (*ALGORITHMS, *VARIANTS) if VARIANTS.get(name, name)]


def test_every_algorithm_has_a_page_and_the_index_leads_to_it():
    pages = {path.stem for path in FOLDER.glob("*.md")}
    assert pages == {*ALGORITHMS, *VARIANTS, *GENERAL}
    index = page("index")
    linked = set(re.findall(r"\]\((\w+)\.md\)", index))
    assert pages - {"index"} <= linked
    assert set(re.search(r"\{toctree\}\n:hidden:\n\n(.*?)```", index, re.DOTALL)[1].split()) == pages - {"index"}


@pytest.mark.parametrize("name", [*ALGORITHMS, *VARIANTS])
def test_every_page_has_every_section(name):
    assert re.findall(r"^## (.+)$", page(name), re.MULTILINE) == SECTIONS
    details = [line for line in section(page(name), "Implementation details").splitlines() if re.match(r"\d+\. ", line)]
    assert [int(line.split(".")[0]) for line in details] == list(range(1, len(details) + 1)) and len(details) >= 3


@pytest.mark.parametrize("name", algorithm_pages())
def test_options_exist_and_have_the_defaults_that_are_given(name):
    kind = ALGORITHMS[VARIANTS.get(name, name)]
    config, text = kind(), page(name)
    for option in options_in(text):
        value_of(config, option)
    named = {}
    for option, default, *_ in table(section(text, "Options")):
        named[code(option)] = yaml.safe_load(code(default))
    for option, default in named.items():
        assert value_of(config, option) == default, option
    if name in ALGORITHMS:
        general = {field.name for field in dataclasses.fields(TrainConfig)}
        own = {f"train.{field}" for field in vars(type(config.train))["__annotations__"] if field not in general}
        assert own <= named.keys()


@pytest.mark.parametrize("path", [FOLDER / "index.md", FOLDER / "metrics.md", DOCS / "which_method.md"])
def test_options_of_general_pages_exist(path):
    known = set()
    for kind in ALGORITHMS.values():
        config = kind()
        known |= {f"{group}.{field.name}" for group in GROUPS for field in dataclasses.fields(getattr(config, group))}
    assert options_in(path.read_text(encoding="utf-8")) <= known


def test_recipes_that_are_named_exist_and_every_recipe_is_on_its_algorithms_page():
    known = set(recipes.names())
    for path in [*FOLDER.glob("*.md"), DOCS / "which_method.md"]:
        assert recipes_in(path.read_text(encoding="utf-8")) <= known, path.name
    for name in known:
        algorithm = recipes.algorithm(name)
        homes = [algorithm, *(variant for variant, of in VARIANTS.items() if of == algorithm)]
        assert any(f"`{name}`" in section(page(home), "Usage") for home in homes), name


class Seen(Callback):
    """Remembers the metrics of the first evaluation and the first epoch, and leaves."""

    class Enough(Exception):
        pass

    def __init__(self):
        self.names = set()

    def on_evaluate(self, trainer, metrics):
        self.names |= metrics.keys()

    def on_epoch_end(self, trainer, metrics):
        self.names |= metrics.keys()
        raise self.Enough


TINY = {
    "sampling.num_inference_steps": 3,
    "train.max_train_steps": 1,
    "train.batch_size": 2,
    "eval.validation_prompts": "[a handwritten one]",
    "eval.num_validation_images": 2,
}
OF_AN_ALGORITHM = {
    "draft_plus": {"train.backprop_steps": 1},
    "refl": {"train.first_step": 1, "train.last_step": 1},
    "drtune": {"train.train_steps": 1},
    "ddpo": {"train.samples_per_epoch": 2},
    "dpok": {"train.samples_per_epoch": 2, "train.rollout_batch_size": 2},
    "rwr": {"train.samples_per_epoch": 2, "train.inner_epochs": 1},
    "sft": {"train.samples_per_epoch": 2, "train.inner_epochs": 1},
}


def documented(name, config):
    """The metrics that a run of this config has to log, and those that it may, by the algorithm's page and the general."""
    text = page("metrics")
    rows = table(section(text, "After an epoch")) + table(section(text, "After an evaluation"))
    rows += table(section(page(name), "Logged metrics"))
    must, may = set(), set()
    for metric, _, when in rows:
        names = {
            code(metric).replace("<reward>", "digits").replace("<judge>", judge)
            for judge in ("digits", "digits_held_out")
        }
        if when == "always":
            must |= names
            continue
        option, compared, value = re.match(r"`([\w.]+)([=>])([^`]+)`", when).groups()
        actual = value_of(config, option)
        if str(actual) == value if compared == "=" else actual > float(value):
            (may if "," in when else must).update(names)
    return must, may


# Planning the chain is most of these runs, and what they log is made where DRaFT's is.
LIKE_DRAFT = ("alignprop", "refl", "drtune")
RUNS = [
    *(pytest.param(name, {}, marks=[pytest.mark.slow] * (name in LIKE_DRAFT), id=name) for name in ALGORITHMS),
    pytest.param("ddpo", {"train.loss": "sf"}, marks=pytest.mark.slow, id="ddpo, sf"),
    pytest.param("sft", {"train.regulariser": "kl_o"}, marks=pytest.mark.slow, id="sft, kl_o"),
]


@pytest.mark.parametrize(("name", "options"), RUNS)
def test_a_run_logs_what_its_page_says_and_nothing_else(name, options, tmp_path):
    given = {**TINY, **OF_AN_ALGORITHM.get(name, {}), **options, "output_dir": tmp_path / "run"}
    config = load_config(name, f"digits_{name}", *(f"--{option}={value}" for option, value in given.items()))
    seen = Seen()
    with pytest.raises(Seen.Enough):
        Trainer(config, callbacks=[seen]).train()
    must, may = documented(name, config)
    assert must - seen.names == set(), "documented, and not logged"
    assert seen.names - must - may == set(), "logged, and not documented"
