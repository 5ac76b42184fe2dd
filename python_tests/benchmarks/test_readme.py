"""The README says what was measured."""

from benchmarks.readme import README, rendered


def test_tables_are_those_of_the_results():
    text = README.read_text()
    assert text == rendered(text), "run `python -m benchmarks.readme`"
