"""Code blocks of the pages: Python runs, commands parse, configs are configs.

A block is left out by a line above it that says why: `<!-- skip: next "needs SD1.5's weights" -->`.
"""

import contextlib
import itertools
import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from unittest import SkipTest

import pytest
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from pages import ROOT, label, names, pages
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.myst import CodeBlockParser, SkipParser

import rftcore
from rftcore import cli
from rftcore.errors import UsageError
from rftcore.training import load_config
from rftcore.training.algorithm_configs import ALGORITHMS

# What a block may call that is not ours; nothing is looked at in it.
FOREIGN = {"cd", "cp", "docker", "git", "pip", "pre-commit", "ruff", "mypy", "tensorboard", "torchrun"}
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def run_shell(example):
    text = example.parsed.replace("\\\n", " ")
    for line in re.split(r"\n|&&", text):
        if words := shlex.split(line, comments=True):
            check_command(words)


def check_command(words):
    """Raises for a command that would be refused, or whose target is not there."""
    while re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    command, *arguments = words
    if command == "accelerate" and arguments[0] == "launch":
        ours = next(i for i, word in enumerate(arguments) if word == "-m" or word.endswith(".py"))
        check_command(["python", *arguments[ours:]])
        return
    if command == "rftcore" or words[:3] == ["python", "-m", "rftcore"]:
        check_rftcore(arguments[2:] if command == "python" else arguments)
    elif words[:2] == ["python", "-m"]:
        assert find_spec(arguments[1]), f"python -m {arguments[1]}: there is no such module"
    elif command == "python" and arguments[0].startswith("examples/"):
        assert (ROOT / arguments[0]).is_file(), f"{arguments[0]}: there is no such file"
        if arguments[0] != "examples/trl_trainer.py" or find_spec("trl"):
            import_module(arguments[0].removesuffix(".py").replace("/", ".")).options(arguments[1:])
    elif command == "make":
        assert TARGETS.issuperset(arguments), f"make {' '.join(arguments)}: the Makefile has {sorted(TARGETS)}"
    elif command in ("bash", "python"):
        assert (ROOT / arguments[0]).is_file(), f"{command} {arguments[0]}: there is no such file"
    else:
        assert command in FOREIGN, f"{command}: is it one of {sorted(FOREIGN)}?"


def check_rftcore(arguments):
    # A file of the user's own is taken to be there, with nothing in it that matters here.
    for flag, value in itertools.pairwise(arguments):
        path = Path(value)
        if flag == "--config" and path.suffix == ".yaml" and not path.exists():
            path.write_text("seed: 0\n")
    namespace = cli._parse(arguments)
    if namespace.command in ("train", "check"):
        cli._run_config(namespace[namespace.command])
    elif arguments[:2] == ["configs", "cp"]:
        assert cli.main(arguments) == 0


def read_config(example):
    """Of any algorithm: a block may be a part of a config."""
    path = Path("block.yaml")
    path.write_text(example.parsed)
    errors = []
    for algorithm in ALGORITHMS:
        try:
            load_config(algorithm, path)
            return
        except Exception as error:  # noqa: BLE001  Whatever it is, it is told.
            errors.append(f"{algorithm}: {' '.join(str(error).split())[:300]}")
    raise UsageError("no algorithm's config: " + "\n".join(errors))


SYBIL = Sybil(
    parsers=[
        SkipParser(),
        CodeBlockParser("python", PythonEvaluator()),
        CodeBlockParser("sh", run_shell),
        CodeBlockParser("yaml", read_config),
    ]
)
PAGES = [page for page in pages() if page.exists() and re.search(r"^ *```(python|sh|yaml)$", page.read_text(), re.M)]


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """What the quickstart's first run leaves for diffusers, untrained."""
    folder = tmp_path_factory.mktemp("runs")
    unet = UNet2DConditionModel.from_pretrained(rftcore.digits.path(), subfolder="unet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    lora = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder / "first", unet_lora_layers=lora)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_blocks(page, tmp_path, monkeypatch, first_run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(first_run)
    document = SYBIL.parse(page)
    if "```python" in document.text:
        document.namespace.update(names())
    for example in document.examples():
        with contextlib.suppress(SkipTest):
            example.evaluate()


@pytest.mark.parametrize(
    "block, message",
    [
        ("```python\nrftcore.accelerated\n```", "no attribute 'accelerated'"),
        ("```sh\nrftcore train draft --learning_rate 1\n```", "unknown flag"),
        ("```sh\nrftcore train draft --config digits_ddpo\n```", "recipe of ddpo"),
        ("```sh\naccelerate launch -m rftcore trian draft\n```", "trian"),
        ("```sh\npython -m benchmarks.speed\n```", "no such module"),
        ("```sh\nmake demo mess\n```", "the Makefile has"),
        ("```sh\nbash benchmarks/cpu.sh\n```", "no such file"),
        ("```sh\nrtfcore info\n```", "is it one of"),
        ("```yaml\ntrain: {learning_rat: 1}\n```", "learning_rate"),
        ("```yaml\ntrain: {learning_rate: fast}\n```", "learning_rate"),
    ],
)
def test_a_wrong_block_is_seen(block, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.md").write_text(f"# Page\n\n{block}\n")
    document = SYBIL.parse(tmp_path / "page.md")
    document.namespace.update(names())
    with pytest.raises((AssertionError, AttributeError, UsageError), match=re.escape(message)):
        for example in document.examples():
            example.evaluate()


def test_a_block_is_skipped_with_a_reason_only(tmp_path):
    page = tmp_path / "page.md"
    page.write_text('<!-- skip: next "no weights" -->\n```python\n1 / 0\n```\n')
    with pytest.raises(SkipTest, match="no weights"):
        for example in SYBIL.parse(page).examples():
            example.evaluate()
    unreasoned = [label(page) for page in PAGES if re.search(r'<!-- skip:(?! next "[^"]+" -->)', page.read_text())]
    assert not unreasoned
