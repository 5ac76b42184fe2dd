"""Writes the README's tables from `benchmarks/results/*.json`, and from nothing else.

python -m benchmarks.readme
"""

from __future__ import annotations

import json
import re

from benchmarks.harness import RESULTS, table

README = RESULTS.parent.parent / "README.md"
_TABLE = re.compile(r"(?P<head><!-- table: (?P<name>\w+)(?:: (?P<columns>[^\n]+))? -->)\n.*?<!-- end -->", re.DOTALL)


def rendered(text: str) -> str:
    """The text with every table filled in."""
    return _TABLE.sub(lambda match: f"{match['head']}\n{_section(match['name'], match['columns'])}\n<!-- end -->", text)


def _section(name: str, columns: str | None) -> str:
    content = json.loads((RESULTS / f"{name}.json").read_text())
    rows = content["rows"]
    if columns:
        rows = [{column: row.get(column, "") for column in columns.split(", ")} for row in rows]
    environment = content["environment"]
    versions, threads = environment["versions"], environment["threads"]
    return (
        f"{table(rows)}\n\n"
        f"`{environment['command']}`, {environment['device']}, {threads} thread{'s' * (threads > 1)}, "
        f"torch {versions['torch']}, diffusers {versions['diffusers']}, {environment['date']}."
    )


def main() -> None:
    README.write_text(rendered(README.read_text()))


if __name__ == "__main__":
    main()
