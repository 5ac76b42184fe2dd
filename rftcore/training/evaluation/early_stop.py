"""When a held-out judge stops improving: which evaluation was best, and when to stop. Functions of what is remembered.

So a resumed run decides as the one that was never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rftcore.errors import UsageError
from rftcore.training.config import EvalConfig
from rftcore.training.evaluation.validation import Mean

# step -> measure -> values, as `Progress.evaluations`
Evaluations = Mapping[int, Mapping[str, Sequence[float]]]


def check(config: EvalConfig, held_out: Sequence[object]) -> None:
    """Raises UsageError where the run could never stop early although it is asked to."""
    if config.early_stop_patience is None:
        return
    asked = f"eval.early_stop_patience={config.early_stop_patience}"
    if not held_out:
        raise UsageError(f"{asked} watches a held-out judge, and there is none; set eval.held_out_reward")
    if config.validation_steps is None:
        raise UsageError(
            f"{asked} counts evaluations, and eval.validation_steps=null evaluates only before and after; set "
            "eval.validation_steps"
        )


def best_step(evaluations: Evaluations, judge: str) -> int:
    """The step whose evaluation has the judge's highest mean; the first of equals."""

    def mean(step: int) -> float:
        found = Mean.of(evaluations[step][judge]).mean
        return found if math.isfinite(found) else -math.inf

    return max(sorted(evaluations), key=mean)


def reason_to_stop(evaluations: Evaluations, judge: str, patience: int | None) -> str | None:
    """Why the run should end now, if it should."""
    best = best_step(evaluations, judge)
    since = sum(step > best for step in evaluations)
    if patience is None or since < patience:
        return None
    return (
        f"the held-out {judge} was best at step {best} ({Mean.of(evaluations[best][judge]).mean:.3f}), and not in the "
        f"{since} evaluations since (eval.early_stop_patience={patience})"
    )
