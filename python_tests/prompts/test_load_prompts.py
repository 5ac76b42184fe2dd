"""Reading prompts, and naming the file and line where they cannot be read."""

import pytest

from rftcore import prompts
from rftcore.prompts import PromptsError


def test_text_file_with_comments(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbf# animals\n a cat \n\na d\xc3\xb6g\r\n# the end\n")
    assert prompts.load(str(file)) == ["a cat", "a dög"]


def test_json_lines(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a cat", "id": 1}\n\n{"prompt": "a dog"}\n')
    assert prompts.load(str(file)) == ["a cat", "a dog"]


def test_function_and_list(tmp_path, monkeypatch):
    (tmp_path / "user_prompts.py").write_text("def animals(): return ['a cat']\nword = 'a cat'\nnone = []\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert prompts.load("user_prompts.animals") == ["a cat"]
    assert prompts.load(["a cat", "a dog"]) == ["a cat", "a dog"]
    with pytest.raises(PromptsError, match="a list of strings is expected, not a str"):
        prompts.load("user_prompts.word")
    with pytest.raises(PromptsError, match="empty"):
        prompts.load("user_prompts.none")
    with pytest.raises(PromptsError, match="has no 'animal'; did you mean 'animals'"):
        prompts.load("user_prompts.animal")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"# only a comment\n", "empty.txt' are empty; at least one is needed"),
        ("nothing.txt", b"", "nothing.txt' are empty"),
        ("nothing.jsonl", b"", "nothing.jsonl' are empty"),
        ("blank.jsonl", b"\n \n", "blank.jsonl' are empty"),
        ("wide.txt", "a cat".encode("utf-16"), r"wide.txt, line 1: not UTF-8 \(byte 0xff at column 1\); save the file"),
        ("latin.txt", b"a cat\na d\xf6g\n", r"latin.txt, line 2: not UTF-8 \(byte 0xf6 at column 4\)"),
        ("broken.jsonl", b'{"prompt": "a cat"}\n{"prompt"\n', "broken.jsonl, line 2: not JSON"),
        ("other.jsonl", b'{"text": "a cat"}\n', 'other.jsonl, line 1: an object with a string under "prompt"'),
    ],
)
def test_files_that_cannot_be_used(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PromptsError, match=message):
        prompts.load(str(tmp_path / name))


@pytest.mark.parametrize("name", ["folder.txt", "folder.jsonl"])
def test_folder_is_no_file(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(PromptsError, match=f"{name} cannot be read: Is a directory"):
        prompts.load(str(tmp_path / name))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.txt", "missing.txt cannot be read: No such file"),
        ("missing.jsonl", "missing.jsonl cannot be read: No such file"),
        ("/some/folder", "give a .txt, .jsonl, .json, .csv or .tsv file, module.function, or a list"),
        ("word", "give a .txt, .jsonl, .json, .csv or .tsv file, module.function, or a list"),
        ("no_such_module.prompts", "no module 'no_such_module'"),
        ([], "empty"),
        (["a cat", 3], "must be a string, not 3"),
    ],
)
def test_sources_that_cannot_be_used(source, message):
    with pytest.raises(PromptsError, match=message):
        prompts.load(source)
