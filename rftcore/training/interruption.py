"""Ctrl+C and SIGTERM as a request to save and stop, not as an exception in mid-step."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Context in which the first signal is noted for the loop to find, and a second one interrupts at once.

    Outside the main thread, where Python cannot handle signals, it changes nothing.
    """

    def __init__(self) -> None:
        self.signal_number = 0

    def __enter__(self) -> StopRequest:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_number:
            raise KeyboardInterrupt
        self.signal_number = number
        print(
            f"\n{signal.Signals(number).name}: saving after this step; once more stops at once, without saving",
            file=sys.stderr,
            flush=True,
        )
