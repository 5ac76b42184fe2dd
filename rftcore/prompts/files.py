"""Prompt files: text, JSON lines, JSON, and tables with a column of prompts."""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rftcore import documents
from rftcore.prompts.errors import PromptsError

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv")
_KEY = "prompt"
# What datasets call their column of prompts, in any case; DrawBench has "Prompts", PartiPrompts "Prompt".
_COLUMNS = ("prompt", "prompts")


def read(path: Path, column: str | None = None) -> list[str]:
    """The prompts of a file of one of SUFFIXES.

    Args:
        column: of a table, or the key in a JSON object; None: "prompt", or in a table "prompts" too, in any case.

    Raises: PromptsError, with the file and line where there is one.
    """
    text = _text(path)
    if path.suffix == ".txt":
        if column is not None:
            raise PromptsError(f"{path}:{column}: a .txt file has no columns; give {path}")
        return [line for line in _lines(text) if line and not line.startswith("#")]
    if path.suffix == ".jsonl":
        numbered = [(f"line {number}", line) for number, line in enumerate(_lines(text), start=1) if line]
        return [_of_record(path, where, _parsed(path, line, where), column or _KEY) for where, line in numbered]
    if path.suffix == ".json":
        return _of_document(path, _parsed(path, text), column)
    header, rows = table(path)
    index = _column(path, header, column)
    return [prompt for _, prompt in filled(path, rows, index)]


def table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header of a .csv or .tsv file, and its rows, each with the number of its last line; blank rows are left out.

    A .tsv file has no quotes: they are part of the text, as in PartiPrompts.

    Raises: PromptsError.
    """
    text = _text(path)
    quoting = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {"strict": True}
    reader = csv.reader(io.StringIO(text, newline=""), **quoting)
    rows = []
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append((reader.line_num, [cell.strip() for cell in row]))
    except csv.Error as error:
        raise PromptsError(f"{path}, line {reader.line_num}: not a table ({error})") from error
    if not rows:
        raise PromptsError(f"prompts file {path} is empty; its first line must name the columns")
    (_, header), *rows = rows
    for number, row in rows:
        if len(row) != len(header):
            raise PromptsError(
                f"{path}, line {number}: {len(row)} fields, and the first line names {len(header)} columns"
                + ("; a prompt with a comma must be in double quotes" if path.suffix == ".csv" else "")
            )
    return header, rows


def column_like(path: Path, header: Sequence[str], names: Sequence[str]) -> int:
    """The place of the one column that has one of the names, in any case. Raises: PromptsError."""
    found = [index for index, name in enumerate(header) if name.lower() in names]
    if len(found) != 1:
        which = "no column" if not found else "several columns"
        raise PromptsError(
            f"{path}: {which} of the name {' or '.join(names)} (in any case); it has {', '.join(header)}. Name one: "
            f"{path}:COLUMN"
        )
    return found[0]


def filled(path: Path, rows: Sequence[tuple[int, list[str]]], index: int) -> list[tuple[list[str], str]]:
    """Rows with their prompt. Raises: PromptsError for an empty one."""
    for number, row in rows:
        _not_empty(path, f"line {number}", row[index])
    return [(row, row[index]) for _, row in rows]


def _column(path: Path, header: Sequence[str], column: str | None) -> int:
    if column is None:
        return column_like(path, header, _COLUMNS)
    if header.count(column) != 1:
        close = difflib.get_close_matches(column, header, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close and close[0] != column else ""
        raise PromptsError(
            f"{path}: {header.count(column) or 'no'} columns {column!r}; {hint}it has {', '.join(header)}"
        )
    return list(header).index(column)


def _of_document(path: Path, document: Any, column: str | None) -> list[str]:
    """A list of strings or of objects, or an object of such lists: prompts by style, of which `column` chooses one."""
    if isinstance(document, dict):
        if column is not None and column not in document:
            raise PromptsError(f"{path}: no key {column!r}; it has {', '.join(document)}")
        chosen = list(document.values()) if column is None else [document[column]]
        if not all(isinstance(part, list) for part in chosen):
            raise PromptsError(f"{path}: a list of prompts, or an object of such lists, is expected")
        return [prompt for part in chosen for prompt in _of_document(path, part, None)]
    if not isinstance(document, list):
        raise PromptsError(f"{path}: a list of prompts is expected, not {json.dumps(document)[:80]}")
    return [
        _not_empty(path, f"entry {number}", record)
        if isinstance(record, str)
        else _of_record(path, f"entry {number}", record, column or _KEY)
        for number, record in enumerate(document, start=1)
    ]


def _of_record(path: Path, where: str, record: Any, key: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        raise PromptsError(
            f'{path}, {where}: an object with a string under "{key}" is expected, not {json.dumps(record)[:80]}'
        )
    return _not_empty(path, where, record[key])


def _not_empty(path: Path, where: str, prompt: str) -> str:
    if not prompt.strip():
        raise PromptsError(f"{path}, {where}: the prompt is empty; fill it in, or take it out")
    return prompt


def _parsed(path: Path, text: str, where: str | None = None) -> Any:
    try:
        return documents.from_json(text)
    except json.JSONDecodeError as error:
        raise PromptsError(
            f"{path}, {where or f'line {error.lineno}'}: not JSON ({error.msg} at column {error.colno})"
        ) from error
    # Of numbers of thousands of digits, and of lists in lists in lists.
    except ValueError as error:
        raise PromptsError(f"{path}{f', {where}' if where else ''}: JSON that is not read ({error})") from error


def _text(path: Path) -> str:
    try:
        content = path.expanduser().read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise PromptsError(f"prompts file {path} cannot be read: {error.strerror}") from error
    # Of names that no file can have, and of the home of nobody.
    except (ValueError, RuntimeError) as error:
        raise PromptsError(f"prompts file {str(path)!r} cannot be read: {error}") from error
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        before = (content[: error.start] + b"|").splitlines()
        raise PromptsError(
            f"{path}, line {len(before)}: not UTF-8 (byte {content[error.start]:#04x} at column {len(before[-1])}); "
            "save the file as UTF-8"
        ) from error


def _lines(text: str) -> list[str]:
    # str.splitlines would part a prompt at a form feed or at U+2028 too.
    return [line.strip() for line in re.split(r"\r\n|\r|\n", text)]
