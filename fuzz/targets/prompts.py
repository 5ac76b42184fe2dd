"""Prompt files of every kind, sources by name, templates and splits."""

from __future__ import annotations

import json
from pathlib import Path

from atheris import FuzzedDataProvider

from fuzz import drawn
from fuzz.guard import demand, tried
from rftcore import prompts

_ERRORS = (prompts.PromptsError,)
_SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv")
_SOURCES = ("{}", "{}:prompt", "{}:Category", "{}:x", "drawbench:{}", "partiprompts:{}:Colors", "hpdv2:{}")


def check(data: bytes, folder: Path) -> None:
    kind, form, apart = data[:3].ljust(3, b"\0")
    if kind % 8 == 7:
        found = tried(_ERRORS, prompts.load, drawn.text(FuzzedDataProvider(data[4:])))
    else:
        file = folder / f"p{_SUFFIXES[kind % 5]}"
        file.write_bytes(data[4:])
        for style in ("anime", "concept-art", "paintings", "photo") if form % 7 == 6 else ():
            (folder / f"{style}.json").write_bytes(data[4:])
        place = folder if form % 7 == 6 else file
        found = tried(_ERRORS, prompts.load, _SOURCES[form % 7].format(place))
    demand(bool(found) and all(isinstance(prompt, str) for prompt in found), "no list of prompts")
    for prompt in found:
        prompt.encode("utf-8")
    # What was read can be written down, and is the same again.
    (folder / "again.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in found))
    demand(prompts.load(str(folder / "again.jsonl")) == found, "prompts do not read back")
    template = drawn.text(FuzzedDataProvider(data[:12])) if apart % 2 else "a photo of {a}"
    filled = tried(_ERRORS, prompts.fill, found, template)
    demand(len(filled) == len(found), "prompts were lost in the template")
    sides = tried(_ERRORS, prompts.split, filled, apart / 200)
    demand(sorted([*sides[0], *sides[1]]) == sorted(filled), "prompts were lost in the split")


def seeds() -> list[bytes]:
    texts = {
        0: "a cat\n# a comment\n\n a dog \r\na fox",
        1: '{"prompt": "a cat"}\n\n{"prompt": "a \\ud83d\\ude00", "id": 3}\n',
        2: '{"anime": ["a cat"], "photo": [{"prompt": "a dog", "x": [1.5e3, null, true]}]}',
        3: 'Prompts,Category\r\n"a cat, a dog",Colors\r\n"a ""big"" fish\nin a bowl",Text\r\n',
        4: 'Prompt\tCategory\n"HELLO" in red\tText\n',
    }
    rows = [bytes([kind, form, 100, 0]) + text.encode() for kind, text in texts.items() for form in range(7)]
    return [
        *rows,
        b"\x07\0\0\0" + b"hf:a/b:c:d",
        b"\x02\0\x64\0" + b"[" * 2000,
        b"\x02\0\x64\0" + b'["\\ud800"]',
        b"\x00\0\x64\0\xef\xbb\xbfa cat\n\xff",
    ]
