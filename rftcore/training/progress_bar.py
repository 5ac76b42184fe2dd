"""The run's progress on a terminal, or as plain lines where there is none."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class ProgressBar:
    """A bar with reward, loss and memory; about twenty plain lines without a terminal; nothing off the main process."""

    def __init__(self, total: int, start: int, *, enabled: bool) -> None:
        self._enabled = enabled
        self._total = total
        self._every = max(1, total // 20)
        interactive = enabled and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if interactive else None

    def update(self, step: int, reward: float, loss: float, gib: float) -> None:
        figures: dict[str, Any] = {"reward": f"{reward:.3f}", "loss": f"{loss:.3f}", "GiB": f"{gib:.2f}"}
        if self._bar is not None:
            self._bar.set_postfix(figures, refresh=False)
            self._bar.update(1)
        elif step % self._every == 0 or step == self._total:
            self.note(f"step {step}/{self._total}  " + "  ".join(f"{key} {value}" for key, value in figures.items()))

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._enabled:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
