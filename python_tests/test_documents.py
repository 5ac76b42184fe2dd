"""JSON and YAML of others: what no later code could walk is a ValueError, whatever the parser makes of it."""

import pytest

from rftcore import documents


@pytest.mark.parametrize("text", ["[" * 200 + "]" * 200, "[" * 100_000, "{", "9" * 5000, "1" + "0" * 30, ""])
def test_json_that_is_refused(text):
    with pytest.raises(ValueError):
        documents.from_json(text)


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "a: &a [*a]",
        "[" * 3000,
        "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40)),
        "seed: 2001-99-99",
        "seed: !!timestamp x",
        "seed: !!int 0b",
        "seed: !!float x",
        "seed: !!python/object/apply:os.system [id]",
        f"seed: 1{'0' * 400}",
        "a: \0",
    ],
)
def test_yaml_that_is_refused(text):
    with pytest.raises(ValueError, match="."):
        documents.from_yaml(text)


def test_what_is_read_is_what_the_parsers_read():
    assert documents.from_json('{"a": [1, 2.5, null, true, "x"]}') == {"a": [1, 2.5, None, True, "x"]}
    assert documents.from_yaml("a: &b [1, x]\nc: *b\n") == {"a": [1, "x"], "c": [1, "x"]}
    assert documents.from_json("[" * 100 + "]" * 100)
