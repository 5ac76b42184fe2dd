"""Of a product of parameters, few combinations that have every value, or every pair: most faults take no more to show."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence


def covering(combinations: Sequence[Mapping[str, Hashable]], strength: int) -> list[int]:
    """Places of combinations that together have whatever `strength` values any of them has at once."""
    sets = [set(itertools.combinations(sorted(each.items()), min(strength, len(each)))) for each in combinations]
    missing, chosen = set().union(*sets), []
    while missing:
        best = max(range(len(sets)), key=lambda place: len(sets[place] & missing))
        chosen.append(best)
        missing -= sets[best]
    return sorted(chosen)
