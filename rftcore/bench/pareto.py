"""Time against memory: whether anything of pure PyTorch is both faster and smaller than ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rftcore.bench.methods import OURS

Row = Mapping[str, Any]
# Counted first; what a compiled method takes cannot be counted, and is compared as the process or the device saw it.
MEMORIES = ("peak_mib", "rss_mib", "cuda_mib")
# Of another's bytes, what still is the same memory.
_SAME = 1.01


def pareto(rows: Sequence[Row]) -> dict[str, Any]:
    """Of one work's rows, what ours is to the others.

    Returns:
        holds: no method of pure PyTorch is both faster and smaller than one of ours, and each has one of ours within
            its bytes that is at least as fast.
        dominated: [ours, other]: other is faster and smaller.
        within: for each other method the fastest of ours in its bytes, and how many times as fast that is; None where
            ours does not get that small.
    """
    timed = [row for row in rows if row.get("status") == "ok" and "median_s" in row]
    ours = [row for row in timed if _is_ours(row)]
    others = [row for row in timed if not _is_ours(row)]
    dominated = [[a["method"], b["method"]] for a in ours for b in others if _beats(b, a)]
    within = {row["method"]: _within(row, ours) for row in others}
    faster = all(found is not None and found["times_as_fast"] >= 1 for found in within.values())
    return {"holds": bool(ours) and bool(others) and not dominated and faster, "dominated": dominated, "within": within}


def describe(found: Mapping[str, Any]) -> str:
    """The same for people."""
    lines = [f"Pareto, time against memory: {'holds' if found['holds'] else 'does not hold'}"]
    lines += [f"  {other} is faster and smaller than {ours}" for ours, other in found["dominated"]]
    for other, best in found["within"].items():
        if best is None:
            lines.append(f"  in the bytes of {other}: none of ours")
        else:
            lines.append(f"  in the bytes of {other}: {best['method']}, {best['times_as_fast']:.2f} times as fast")
    return "\n".join(lines)


def memory(a: Row, b: Row) -> tuple[float, float] | None:
    """MiB of both by the first way of measuring that they share."""
    for name in MEMORIES:
        if all(isinstance(row.get(name), int | float) for row in (a, b)):
            return a[name], b[name]
    return None


def _is_ours(row: Row) -> bool:
    return row["method"].startswith(OURS)


def _beats(a: Row, b: Row) -> bool:
    found = memory(a, b)
    return found is not None and found[0] < found[1] and a["median_s"] < b["median_s"]


def _within(other: Row, ours: Sequence[Row]) -> dict[str, Any] | None:
    found = list(_comparable(other, ours))
    if not found:
        return None
    best = min(found, key=lambda row: row["median_s"])
    return {"method": best["method"], "times_as_fast": other["median_s"] / best["median_s"]}


def _comparable(other: Row, ours: Sequence[Row]) -> Iterator[Row]:
    for row in ours:
        found = memory(row, other)
        if found is not None and found[0] <= _SAME * found[1]:
            yield row
