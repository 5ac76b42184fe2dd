"""Prompts from tables, JSON, benchmarks' own files and hub datasets."""

import json
import sys
import types

import pytest

from rftcore import prompts
from rftcore.prompts import PromptsError


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
        return str(tmp_path / name)

    return write


def test_comma_separated(write):
    file = write(
        "draw.csv", 'Prompts,Category\r\n"a cat, a dog",Colors\r\n\r\n"a ""big"" fish\nin a bowl",Text\r\n,\r\n'
    )
    assert prompts.load(file) == ["a cat, a dog", 'a "big" fish\nin a bowl']
    assert prompts.load(f"{file}:Category") == ["Colors", "Text"]


def test_tab_separated_text_keeps_its_quotes(write):
    file = write("p.tsv", 'Prompt\tCategory\n"HELLO" in red\tText\na "new" boat\tVehicles\n')
    assert prompts.load(file) == ['"HELLO" in red', 'a "new" boat']


@pytest.mark.parametrize(
    ("document", "column", "expected"),
    [
        (["a cat", "a dog"], "", ["a cat", "a dog"]),
        ([{"prompt": "a cat", "id": 3}], "", ["a cat"]),
        ([{"prompt": "a cat", "text": "a dog"}], ":text", ["a dog"]),
        ({"anime": ["a cat"], "photo": ["a dog"]}, "", ["a cat", "a dog"]),
        ({"anime": ["a cat"], "photo": ["a dog"]}, ":photo", ["a dog"]),
    ],
)
def test_json(write, document, column, expected):
    assert prompts.load(write("p.json", json.dumps(document)) + column) == expected


def test_a_file_in_the_home_folder(write, tmp_path, monkeypatch):
    write("a.txt", "a cat\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert prompts.load("~/a.txt") == ["a cat"]


def test_json_lines_of_another_key(write):
    file = write("p.jsonl", '{"prompt": "a cat", "caption": "a dog"}\n')
    assert prompts.load(f"{file}:caption") == ["a dog"]


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        (
            "a.csv",
            "text,id\na cat,1\n",
            "",
            r"no column of the name prompt or prompts .* text, id. Name one: .*a.csv:COL",
        ),
        ("a.csv", "prompt,Prompts\na,b\n", "", "several columns of the name"),
        (
            "a.csv",
            "prompt,caption\na,b\n",
            ":captoin",
            "no columns 'captoin'; did you mean 'caption'.*it has prompt, cap",
        ),
        (
            "a.csv",
            "prompt\na cat, a dog\n",
            "",
            "line 2: 2 fields, .* 1 columns; a prompt with a comma must be in double",
        ),
        ("a.csv", 'prompt\n"a cat\n', "", "line 2: not a table"),
        ("a.csv", "prompt,id\na cat,1\n,2\n", "", "line 3: the prompt is empty"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": " "}\n', "", "line 2: the prompt is empty"),
        ("a.json", '["a", ""]', "", "entry 2: the prompt is empty"),
        ("a.csv", "", "", "is empty; its first line must name the columns"),
        ("a.csv", "prompt,id\n", "", "are empty; at least one"),
        ("a.tsv", "Prompt\tId\na cat\n", "", "line 2: 1 fields, .* names 2 columns$"),
        ("a.json", '["a cat",\n"a dog', "", "a.json, line 2: not JSON"),
        ("a.json", '"a cat"', "", 'a list of prompts is expected, not "a cat"'),
        ("a.json", '{"anime": "a cat"}', "", "a list of prompts, or an object of such lists"),
        ("a.json", '{"anime": ["a cat"]}', ":photo", "no key 'photo'; it has anime"),
        ("a.json", '["a cat", 3]', "", 'entry 2: an object with a string under "prompt"'),
        ("a.txt", "a cat\n", ":prompt", "a .txt file has no columns"),
        ("a.csv", "prompt\na cat\n", ":", "no columns ''"),
        ("a.json", "[" * 3000, "", "a.json: JSON that is not read .it is nested more than 100 deep"),
        ("a.jsonl", f'{{"prompt": "a"}}\n{{"prompt": {"9" * 5000}}}', "", "a.jsonl, line 2: JSON that is not read"),
        ("a.json", '["\\ud800"]', "", "half of a surrogate pair"),
    ],
)
def test_what_cannot_be_used(write, name, content, column, message):
    with pytest.raises(PromptsError, match=message):
        prompts.load(write(name, content) + column)


@pytest.mark.parametrize(
    "source",
    ["a\0.txt", "~no_such_user/a.txt", f"{'a' * 400}.txt", f"drawbench:{'a' * 400}:b", ".:a", "..a.b", "\ud800.a"],
)
def test_names_that_no_file_and_no_module_can_have(source):
    with pytest.raises(PromptsError, match="prompts "):
        prompts.load(source)


def test_benchmark_of_a_table_by_category(write):
    file = write("parti.tsv", "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\na cat\tAnimals\tBasic\t\n")
    assert prompts.load(f"partiprompts:{file}") == ["bond", "a cat"]
    assert prompts.load(f"drawbench:{file}:Animals") == ["a cat"]
    with pytest.raises(PromptsError, match="no category 'Animal'; did you mean 'Animals'.*known: Abstract, Animals"):
        prompts.load(f"partiprompts:{file}:Animal")


def test_benchmark_of_styles(tmp_path):
    for style in ("photo", "anime", "paintings", "concept-art"):
        (tmp_path / f"{style}.json").write_text(json.dumps([f"a cat, {style}"]))
    every = ["a cat, anime", "a cat, concept-art", "a cat, paintings", "a cat, photo"]
    assert prompts.load(f"hpdv2:{tmp_path}") == every
    assert prompts.load(f"hpdv2:{tmp_path}:photo") == ["a cat, photo"]
    with pytest.raises(PromptsError, match="no category 'drawing'.*anime, concept-art, paintings, photo"):
        prompts.load(f"hpdv2:{tmp_path}:drawing")
    (tmp_path / "photo.json").unlink()
    with pytest.raises(PromptsError, match="photo.json cannot be read: No such file"):
        prompts.load(f"hpdv2:{tmp_path}")


class Dataset(dict):
    column_names = ("prompt", "number")


def test_column_of_a_hub_dataset(monkeypatch):
    asked = []

    def load_dataset(*name, split):
        asked.append((*name, split))
        if split == "none":
            raise ValueError("Unknown split\nand more")
        return Dataset(prompt=["a cat"], number=[3])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert prompts.load("hf:owner/name:train:prompt") == ["a cat"]
    assert prompts.load("hf:owner/name:v2:train:prompt") == ["a cat"]
    assert asked == [("owner/name", "train"), ("owner/name", "v2", "train")]
    with pytest.raises(PromptsError, match="no column 'text'; it has prompt, number"):
        prompts.load("hf:owner/name:train:text")
    with pytest.raises(PromptsError, match="every prompt must be a string, not 3"):
        prompts.load("hf:owner/name:train:number")
    with pytest.raises(PromptsError, match="cannot be loaded: ValueError: Unknown split$"):
        prompts.load("hf:owner/name:none:prompt")
    with pytest.raises(PromptsError, match="write hf:owner/name:split:column"):
        prompts.load("hf:owner/name:train")


def test_hub_dataset_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(PromptsError, match=r"pip install rftcore\[datasets\]"):
        prompts.load("hf:owner/name:train:prompt")
