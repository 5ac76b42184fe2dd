"""What a command or a run may fail with because of its user, its input or its machine, told apart from a bug."""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class UsageError(ValueError):
    """The request itself is wrong: a key, a flag, a value, a path. The command exits with status 2."""


class RunError(RuntimeError):
    """The run cannot go on: a broken gradient, a LoRA that does not reload. The command exits with status 1."""


class Interrupted(RuntimeError):
    """A signal stopped the run after it had saved itself. The command exits with status 128 + the signal's number."""

    def __init__(self, signal_number: int, checkpoint: str) -> None:
        self.signal_number = signal_number
        name = signal.Signals(signal_number).name
        super().__init__(
            f"{name}: saved {checkpoint} and stopped; continue with --resume_from_checkpoint latest and the same config"
        )


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence that names the known word closest to `word`, or lists them all when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
