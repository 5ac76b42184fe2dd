"""Time against memory, on rows made by hand."""

import pytest

from rftcore.bench.pareto import describe, pareto


def row(method, seconds, **mib):
    return {"method": method, "status": "ok", "median_s": seconds, **mib}


OURS = [row("rftcore", 4.0, peak_mib=600.0), row("rftcore@least", 7.0, peak_mib=30.0)]


def test_faster_in_every_others_bytes_holds():
    found = pareto([*OURS, row("stock", 8.0, peak_mib=1000.0), row("stock+steps", 10.0, peak_mib=100.0)])
    assert found["holds"] and found["dominated"] == []
    assert found["within"]["stock"] == {"method": "rftcore", "times_as_fast": 2.0}
    assert found["within"]["stock+steps"]["method"] == "rftcore@least"
    assert "holds" in describe(found) and "2.00 times as fast" in describe(found)


@pytest.mark.parametrize(
    "other, dominated, within",
    [
        (row("stock", 3.0, peak_mib=500.0), [["rftcore", "stock"]], "rftcore@least"),
        # Not smaller than ours, but faster than all of ours in its bytes.
        (row("stock", 3.9, peak_mib=601.0), [], "rftcore"),
        (row("stock", 20.0, peak_mib=29.0), [], None),
    ],
)
def test_it_does_not_hold_where_another_is_faster_or_smaller(other, dominated, within):
    found = pareto([*OURS, other])
    assert not found["holds"] and found["dominated"] == dominated
    assert (found["within"]["stock"] or {"method": None})["method"] == within
    assert "does not hold" in describe(found)


def test_what_was_not_counted_is_compared_as_the_process_saw_it():
    ours = [row("rftcore", 4.0, peak_mib=600.0, rss_mib=700.0)]
    assert not pareto([*ours, row("compile", 3.0, rss_mib=650.0)])["holds"]
    assert pareto([*ours, row("compile", 5.0, rss_mib=710.0)])["holds"]


def test_nothing_holds_without_both_sides():
    assert not pareto([])["holds"] and not pareto(OURS)["holds"]
    failed = {"method": "stock", "status": "OOM", "median_s": 1.0, "peak_mib": 1.0}
    assert pareto([*OURS, failed, row("stock+steps", 9.0, peak_mib=900.0)])["holds"]
