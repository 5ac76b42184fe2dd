"""README.md and docs/ say what was measured."""

import json

import pytest

from benchmarks import readme
from benchmarks.readme import ROOT, TableError, pages, rendered


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_are_those_of_the_results(page):
    text = page.read_text()
    assert text == rendered(text), "run `python -m benchmarks.readme`"


@pytest.fixture
def results(tmp_path, monkeypatch):
    environment = {
        "command": "python -m benchmarks.some",
        "device": "CPU",
        "threads": 2,
        "versions": {"torch": "2", "diffusers": "1"},
        "date": "2026-01-01",
    }
    rows = [
        {"model": "SD1.5, 512 px", "work": "draft", "s": 0.12345},
        {"model": "SD1.5, 512 px", "work": "ddpo", "s": 20},
        {"model": "SDXL", "work": "draft", "note": "OOM"},
    ]
    (tmp_path / "some.json").write_text(json.dumps({"environment": environment, "rows": rows}))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)


def _rows(marker):
    text = f"before\n\n<!-- table: {marker} -->\nold\n<!-- end -->\nafter\n"
    filled = rendered(text)
    assert filled.startswith(f"before\n\n<!-- table: {marker} -->\n|") and filled.endswith(".\n<!-- end -->\nafter\n")
    assert "old" not in filled and rendered(filled) == filled
    assert "\n`python -m benchmarks.some`, CPU, 2 threads, torch 2, diffusers 1, 2026-01-01.\n" in filled
    return [line for line in filled.splitlines() if line.startswith("|") and "---" not in line]


@pytest.mark.parametrize(
    "marker, expected",
    [
        (
            "some",
            [
                "| model | work | s | note |",
                "| SD1.5, 512 px | draft | 0.123 |  |",
                "| SD1.5, 512 px | ddpo | 20 |  |",
                "| SDXL | draft |  | OOM |",
            ],
        ),
        ("some: s, model", ["| s | model |", "| 0.123 | SD1.5, 512 px |", "| 20 | SD1.5, 512 px |", "|  | SDXL |"]),
        ("some: s: where work=draft", ["| s |", "| 0.123 |", "|  |"]),
        ('some: s: where "model=SD1.5, 512 px" work=draft', ["| s |", "| 0.123 |"]),
        ("some: s: where s=0.12345", ["| s |", "| 0.123 |"]),
        ('some: work: where model=SDXL "model=SD1.5, 512 px"', ["| work |", "| draft |", "| ddpo |", "| draft |"]),
        ("some: where model=SDXL", ["| model | work | note |", "| SDXL | draft | OOM |"]),
    ],
)
def test_columns_and_rows_are_chosen(results, marker, expected):
    assert _rows(marker) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!-- table: other -->\n<!-- end -->", "there is no other.json; there are some"),
        ("<!-- table: some: speed -->\n<!-- end -->", "no column 'speed'; there are model, work, s, note"),
        ("<!-- table: some: where speed=1 -->\n<!-- end -->", "no column 'speed'"),
        ("<!-- table: some: where work=sft -->\n<!-- end -->", "no row has work='sft'; there are ['draft', 'ddpo']"),
        ("<!-- table: some: where model=SDXL work=ddpo -->\n<!-- end -->", "no row has all of it"),
        ("<!-- table: some: where work -->\n<!-- end -->", "'work' is no COLUMN=VALUE"),
        ("<!-- table: some table -->\n<!-- end -->", "write NAME"),
        ("<!-- table: some -->\n", "has no <!-- end -->"),
        ("<!-- table: some -->\n<!-- table: some -->\n<!-- end -->", "another table begins before"),
    ],
)
def test_markers_that_cannot_be_filled(results, text, message):
    with pytest.raises(TableError) as error:
        rendered(text)
    assert message in str(error.value)
