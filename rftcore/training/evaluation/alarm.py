"""The alarm against reward hacking: what is trained on and what is not part ways, or a prompt's images grow alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rftcore.training.evaluation.validation import DIVERSITY, Mean, diversity_left

# A change counts where it is more than so many standard errors of the paired difference.
_ERRORS = 2.0
_LEAST_DIVERSITY = 0.5


def alarms(
    trained: str, held_out: Sequence[str], now: Mapping[str, Sequence[float]], first: Mapping[str, Sequence[float]]
) -> list[str]:
    """A sentence for each thing that is wrong with an evaluation's measures, compared with those of step 0.

    Args:
        trained, held_out: names of the judges.
    """
    found = []
    rise = _change(trained, now, first)
    if rise.mean > _ERRORS * rise.standard_error:
        for name in held_out:
            fall = _change(name, now, first)
            if fall.mean < -_ERRORS * fall.standard_error:
                found.append(
                    f"the trained reward {trained} rose by {rise.mean:.3g} ± {rise.standard_error:.2g} since step 0 and "
                    f"the held-out {name} fell by {-fall.mean:.3g} ± {fall.standard_error:.2g}: the model may be "
                    "exploiting the reward; look at the samples"
                )
    for name in now:
        if name.startswith(DIVERSITY):
            left = diversity_left(name, now, first)
            if left < _LEAST_DIVERSITY:
                found.append(
                    f"the images of a prompt differ by {left:.0%} of what they did at step 0 "
                    f"({name.removeprefix(DIVERSITY)}): the model may be collapsing; look at the samples"
                )
    return found


def _change(name: str, now: Mapping[str, Sequence[float]], first: Mapping[str, Sequence[float]]) -> Mean:
    """Mean over images of what each gained; of a single image nothing is known, and nothing has changed."""
    gains = [new - old for old, new in zip(first[name], now[name], strict=True) if math.isfinite(new - old)]
    return Mean.of(gains) if len(gains) > 1 else Mean(0.0, 0.0)
