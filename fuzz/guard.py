"""What an input must not do, and who watches it."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Of the processor: a machine that is busy with other work slows nothing down here.
SECONDS, BYTES = 5, 2 * 2**30
# Of Python's audit events, those of code that data has no business to run.
_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "subprocess.Popen",
    "pty.spawn",
    "socket.connect",
    "socket.getaddrinfo",
    "webbrowser.open",
)
_CHANGING = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Broken(BaseException):
    """A rule was broken. No Exception, so that nothing on the way takes it for its own."""


class Refused(Exception):
    """The input was refused as it should be: the end of a check."""


class Guard:
    """Watches one folder's inputs, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder.resolve())
        self._watching, self._seen = False, []
        signal.signal(signal.SIGPROF, self._alarm)
        sys.addaudithook(self._audit)

    def watch(self, action: Callable[[], None]) -> None:
        """Runs it. Raises: Broken, or whatever it raised that is no Refused."""
        before = _most_resident()
        self._seen, self._watching = [], True
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            action()
        except Refused:
            pass
        finally:
            self._watching = False
            signal.setitimer(signal.ITIMER_PROF, 0)
        if self._seen:
            raise Broken(self._seen[0])
        if _most_resident() - before > BYTES:
            raise Broken("more than 2 GiB")

    def _alarm(self, *_) -> None:
        if self._watching:
            raise Broken(f"more than {SECONDS} s")

    def _audit(self, event: str, arguments: tuple) -> None:
        if not self._watching:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = isinstance(mode, str) and any(letter in mode for letter in "wax+")
            if (writes or (isinstance(flags, int) and flags & _WRITING)) and self._outside(path):
                self._seen.append(f"{event} to write {path!r}")
        elif event in _CHANGING:
            if self._outside(arguments[0]):
                self._seen.append(f"{event} of {arguments[0]!r}")
        elif event in _FORBIDDEN:
            self._seen.append(f"{event} {arguments!r:.200}")

    def _outside(self, path: Any) -> bool:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        # A descriptor is of something that was opened; modules that are imported late are cached.
        if not isinstance(path, str) or "__pycache__" in path or path == os.devnull:
            return False
        return not os.path.realpath(path).startswith(self.folder)


def _most_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tried(errors: tuple[type[Exception], ...], action: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What the action gives. Raises: Refused for one of the errors, once its message is known to say something."""
    try:
        return action(*arguments, **named)
    except errors as error:
        if len(str(error)) < 15:
            raise Broken(f"{type(error).__name__} says only {str(error)!r}") from error
        raise Refused from error


def demand(held: bool, what: str) -> None:
    """Raises Broken where something is not so."""
    if not held:
        raise Broken(what)
