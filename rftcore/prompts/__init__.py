"""Prompts: a list of strings from a text file, a JSON-lines file, a function, or a list."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rftcore.dotted import DottedPathError, resolve


class PromptsError(ValueError):
    """Prompts that cannot be found or read, or that are empty."""


def load(source: str | Sequence[str]) -> list[str]:
    """The prompts of a .txt file (one a line, # comments), a .jsonl file (key "prompt"), module.function, or a list.

    Raises: PromptsError, with the file and line where there is one.
    """
    if not isinstance(source, str):
        prompts = list(source)
    elif source.endswith((".txt", ".jsonl")):
        prompts = _from_file(Path(source))
    else:
        prompts = _from_function(source)
    wrong = next((prompt for prompt in prompts if not isinstance(prompt, str)), None)
    if wrong is not None:
        raise PromptsError(f"prompts {source!r}: every prompt must be a string, not {wrong!r}")
    if not prompts:
        raise PromptsError(f"prompts {source!r} are empty; at least one is needed")
    return prompts


def _from_file(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise PromptsError(f"prompts file {path} cannot be read: {error.strerror}") from error
    # Line by line, so that a wrong byte is named with its line.
    lines = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        try:
            lines.append((number, line.decode("utf-8").strip()))
        except UnicodeDecodeError as error:
            raise PromptsError(
                f"{path}, line {number}: not UTF-8 (byte {error.object[error.start]:#04x} at column "
                f"{error.start + 1}); save the file as UTF-8"
            ) from error
    if path.suffix == ".txt":
        return [line for _, line in lines if line and not line.startswith("#")]
    return [_from_json(path, number, line) for number, line in lines if line]


def _from_json(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptsError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise PromptsError(
            f'{path}, line {number}: an object with a string under "prompt" is expected, not {line[:80]}'
        )
    return record["prompt"]


def _from_function(dotted: str) -> list[str]:
    if "." not in dotted and ":" not in dotted:
        raise PromptsError(f"prompts {dotted!r}: give a .txt or .jsonl file, module.function, or a list of prompts")
    try:
        function = resolve(dotted)
    except DottedPathError as error:
        raise PromptsError(f"prompts {dotted!r}: no .txt or .jsonl file, and {error}") from error
    prompts = function() if callable(function) else function
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise PromptsError(f"prompts {dotted!r}: a list of strings is expected, not a {type(prompts).__name__}")
    return list(prompts)
