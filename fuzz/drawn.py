"""Values that are drawn from an input's bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from atheris import FuzzedDataProvider

# What parsers are known to stumble over.
NUMBERS = (
    0, 1, -1, 2, 3, 8, 255, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400,
    0.0, -0.0, 0.5, 1.5, 1e-300, 1e300, 5e-324, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
TEXTS = (
    "", " ", "a", "a cat", "null", "true", "nan", ".nan", "-.inf", "1e400", "\0", "a\0b", "\ud800", "é" * 3, "\u2028",
    "x" * 300, "../..", "/", "~", "a/b", "a.b", "a:b", ".a", "a..b", "{", "[", "{}", "{a}", "[[[[", "!!", "&a [*a]",
    "latest", "hf:a/b:c:d", "hpdv2:.", "drawbench:a.csv", "1.5GiB", "9" * 400 + "GiB", "٣GiB",
)  # fmt: skip


def one_of(source: FuzzedDataProvider, choices: Sequence[Any]) -> Any:
    return choices[source.ConsumeIntInRange(0, len(choices) - 1)]


def text(source: FuzzedDataProvider) -> str:
    if source.ConsumeIntInRange(0, 3):
        return one_of(source, TEXTS)
    return source.ConsumeUnicode(source.ConsumeIntInRange(0, 40))


def value(source: FuzzedDataProvider, depth: int = 3) -> Any:
    """Anything that YAML or JSON can hold."""
    kind = source.ConsumeIntInRange(0, 7 if depth else 4)
    if kind == 0:
        return one_of(source, NUMBERS)
    if kind == 1:
        return text(source)
    if kind == 2:
        return one_of(source, (None, True, False))
    if kind == 3:
        return source.ConsumeIntInRange(-5, 70)
    if kind == 4:
        return source.ConsumeRegularFloat()
    if kind == 5:
        return [value(source, depth - 1) for _ in range(source.ConsumeIntInRange(0, 3))]
    if kind == 6:
        return {text(source): value(source, depth - 1) for _ in range(source.ConsumeIntInRange(0, 3))}
    return nested(source.ConsumeIntInRange(0, 1), source.ConsumeIntInRange(1, 2000))


def nested(kind: int, depth: int) -> Any:
    """Lists in lists, or mappings in mappings."""
    inner: Any = 1
    for _ in range(depth):
        inner = [inner] if kind else {"a": inner}
    return inner


def mutated(source: FuzzedDataProvider, document: Any) -> Any:
    """A JSON document with a few of its values taken out, replaced or put elsewhere."""
    document = json.loads(json.dumps(document))
    for _ in range(source.ConsumeIntInRange(1, 3)):
        places = list(_places(document))
        if not places:
            return value(source)
        holder, key = one_of(source, places)
        if source.ConsumeIntInRange(0, 3) == 0:
            del holder[key]
        elif isinstance(holder, dict) and source.ConsumeIntInRange(0, 7) == 0:
            holder[text(source)] = holder.pop(key)
        else:
            holder[key] = value(source)
    return value(source) if source.ConsumeIntInRange(0, 30) == 0 else document


def _places(document: Any, depth: int = 8):
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, item in list(inner):
        yield document, key
        if depth:
            yield from _places(item, depth - 1)


def dumped(document: Any) -> str:
    """As JSON, however deep it is."""
    try:
        return json.dumps(document)
    except RecursionError:
        return "[" * 5000
