"""Worker processes and their turns: what one of them runs out of is a row, and not the end of the run."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil

from rftcore.bench.worker import Failed, serve
from rftcore.blocks.budget import text_of
from rftcore.commands.bench_options import BenchOptions

_LOOK_SECONDS = 0.05
# Imports torch and diffusers once, and forks workers that have them.
_CONTEXT = multiprocessing.get_context("forkserver")


class Worker:
    """A process of `serve`, watched while it works.

    Args:
        limit: bytes that it may hold.
        timeout: seconds of a call.
    """

    def __init__(self, options: BenchOptions, limit: int, timeout: float) -> None:
        _CONTEXT.set_forkserver_preload(["rftcore.bench.worker"])
        self._connection, theirs = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=serve, args=(theirs, options), daemon=True)
        self._process.start()
        theirs.close()
        self._watched = psutil.Process(self._process.pid)
        self._limit, self._timeout = limit, timeout
        self.dead = False

    def call(self, name: str, *arguments: Any) -> Any:
        """The answer, or a Failed that says why there is none; the process may then be dead."""
        if self.dead:
            return Failed("its process has ended")
        try:
            self._connection.send((name, arguments))
            reason = self._wait()
            if reason is None:
                return self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(_LOOK_SECONDS)
            code = self._process.exitcode
            # What the system kills for memory dies by SIGKILL.
            reason = "OOM: killed by the system" if code == -9 else f"its process ended with {code}"
        self.close()
        return Failed(reason)

    def close(self) -> None:
        self.dead = True
        self._connection.close()
        if self._process.is_alive():
            self._process.kill()
        self._process.join()

    def _wait(self) -> str | None:
        """None once there is an answer, else why the process is not waited for."""
        end = time.monotonic() + self._timeout
        while not self._connection.poll(_LOOK_SECONDS):
            if time.monotonic() > end:
                return f"took more than {self._timeout:g} s"
            try:
                held = self._watched.memory_info().rss
            except psutil.Error:
                # Its end of the pipe says the rest.
                continue
            if held > self._limit:
                return f"OOM: held {text_of(held)}, the limit is {text_of(self._limit)}"
        return None


def in_turns(names: Sequence[str], rounds: int, run: Callable[[str], Any]) -> dict[str, list[Any]]:
    """Answers of `run` by name, a round of all names after the other; who fails has no further turn."""
    answers: dict[str, list[Any]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            if not answers[name] or not isinstance(answers[name][-1], Failed):
                answers[name].append(run(name))
    return answers
