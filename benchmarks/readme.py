"""Writes the tables of README.md and docs/ from `benchmarks/results/*.json`, and from nothing else.

python -m benchmarks.readme

A table stands between two comments. Columns and rows may be chosen; without, all are shown:

    <!-- table: NAME: COLUMN, COLUMN: where COLUMN=VALUE "COLUMN=OTHER VALUE" -->
    <!-- end -->

A row is shown where each column that is named has one of the values given for it, as the file has it.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, table

ROOT = RESULTS.parent.parent
_MARKER = re.compile(r"^<!-- table: (?P<content>[^\n]+?) -->\n(?P<body>.*?)^<!-- end -->$", re.DOTALL | re.MULTILINE)
_OPENING = re.compile(r"^<!-- table:", re.MULTILINE)
_CONTENT = re.compile(r"(?P<name>\w+)(: (?!where )(?P<columns>.+?))?(: where (?P<where>.+))?")


class TableError(ValueError):
    """A marker that cannot be filled."""


def pages() -> list[Path]:
    """Every file that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rendered(text: str) -> str:
    """The text with every table filled in.

    Raises: TableError for a marker without end, results that are not there, and columns or rows they do not have.
    """

    def filled(match: re.Match[str]) -> str:
        if _OPENING.search(match["body"]):
            raise TableError(f"<!-- table: {match['content']} -->: another table begins before its <!-- end -->")
        return f"<!-- table: {match['content']} -->\n{_section(match['content'])}\n<!-- end -->"

    filled_in, count = _MARKER.subn(filled, text)
    if count != len(_OPENING.findall(text)):
        raise TableError("a <!-- table: ... --> has no <!-- end --> on a line of its own below it")
    return filled_in


def _section(content: str) -> str:
    match = _CONTENT.fullmatch(content)
    if not match:
        raise TableError(f"<!-- table: {content} -->: write NAME, NAME: COLUMN, COLUMN or NAME: where COLUMN=VALUE")
    path = RESULTS / f"{match['name']}.json"
    if not path.is_file():
        raise TableError(
            f"<!-- table: {content} -->: there is no {path.name}; there are "
            f"{', '.join(sorted(file.stem for file in RESULTS.glob('*.json')))}"
        )
    results = json.loads(path.read_text())
    rows = chosen = _where(results["rows"], shlex.split(match["where"] or ""), content)
    if match["columns"]:
        columns = match["columns"].split(", ")
        _check_columns(columns, results["rows"], content)
        rows = [{column: row.get(column, "") for column in columns} for row in rows]
    environment = _environment(results, chosen)
    versions, threads = environment["versions"], environment["threads"]
    return (
        f"{table(rows)}\n\n"
        f"`{environment['command']}`, {environment['device']}, {threads} thread{'s' * (threads > 1)}, "
        f"torch {versions['torch']}, diffusers {versions['diffusers']}, {environment['date']}."
    )


def _environment(results: Mapping[str, Any], chosen: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of the part that the rows are of, where parts were run one by one."""
    parts = {row.get("part") for row in chosen}
    if len(parts) == 1 and (part := results.get("parts", {}).get(*parts)):
        return part["environment"]
    return results["environment"]


def _where(rows: Sequence[Mapping[str, Any]], conditions: Sequence[str], content: str) -> Sequence[Mapping[str, Any]]:
    wanted: dict[str, list[str]] = {}
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if not equals:
            raise TableError(f'<!-- table: {content} -->: {condition!r} is no COLUMN=VALUE; quote spaces, "a b=c d"')
        wanted.setdefault(column, []).append(value)
    _check_columns(wanted, rows, content)
    for column, values in wanted.items():
        seen = list(dict.fromkeys(str(row.get(column, "")) for row in rows))
        if missing := [value for value in values if value not in seen]:
            raise TableError(f"<!-- table: {content} -->: no row has {column}={missing[0]!r}; there are {seen}")
    chosen = [row for row in rows if all(str(row.get(column, "")) in values for column, values in wanted.items())]
    if not chosen:
        raise TableError(f"<!-- table: {content} -->: no row has all of it")
    return chosen


def _check_columns(columns: Sequence[str] | Mapping[str, Any], rows: Sequence[Mapping[str, Any]], content: str) -> None:
    known = list(dict.fromkeys(name for row in rows for name in row))
    for column in columns:
        if column not in known:
            raise TableError(f"<!-- table: {content} -->: no column {column!r}; there are {', '.join(known)}")


def main() -> None:
    for page in pages():
        text = page.read_text()
        try:
            filled = rendered(text)
        except TableError as error:
            raise SystemExit(f"{page.relative_to(ROOT)}: {error}") from None
        if filled != text:
            page.write_text(filled)


if __name__ == "__main__":
    main()
