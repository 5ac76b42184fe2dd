"""Runs `rftcore train` to its end, killed and resumed, each in a fork of one process, which imports but once."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import tiny

from rftcore import cli
from rftcore.rewards import declare
from rftcore.training import Trainer  # noqa: F401  Imported here, it is not imported again in each fork.

# Python's own events of a file system that is written to, and one of every reward: a run's moments, which are the same
# in every run. What compiled writers do lies in between.
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile", "shutil.rmtree", "tiny.reward"}


@declare(differentiable=True, unit="points")
def brightness(images, prompts, metadata=None):
    sys.audit("tiny.reward", "")
    return tiny.brightness(images, prompts)


def train(algorithm, config, output_dir, *flags, kill_at=None, kill_after_s=None):
    """Exit status, seconds and moments of a run, killed at that moment of it or so many seconds after its folder's."""
    pid = os.fork()
    if pid == 0:
        os._exit(_child(algorithm, config, output_dir, flags, kill_at))
    started = time.monotonic()
    if kill_after_s is not None:
        # Before its folder is there, there is nothing to resume.
        while not output_dir.exists() and time.monotonic() - started < 120:
            time.sleep(0.005)
        # Before the child is waited for, its number cannot be another's.
        threading.Event().wait(kill_after_s)
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    file = output_dir.with_suffix(".moments")
    moments = json.loads(file.read_text()) if file.exists() else []
    return status, time.monotonic() - started, moments


def _child(algorithm, config, output_dir, flags, kill_at):
    moments = []

    def noted(event, given):
        if event not in EVENTS or not (event == "tiny.reward" or str(output_dir) in str(given[0])):
            return
        moments.append(f"{event} {given[0]}".replace(str(output_dir), "output_dir"))
        if len(moments) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    log = os.open(output_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.addaudithook(noted)
    command = ["train", algorithm, "--config", str(config), "--output_dir", str(output_dir), *flags]
    try:
        status = cli.main(command)
    finally:
        sys.stdout.flush()
    if kill_at is None:
        output_dir.with_suffix(".moments").write_text(json.dumps(moments))
    return status


def main(folder, plan):
    """plan: algorithm -> kinds of moments, "any", "saving" or "clock". Writes runs.json: what was done, and its status."""
    folder, runs = Path(folder), []
    for algorithm, kinds in json.loads(plan).items():
        config, whole = folder / f"{algorithm}.yaml", folder / f"{algorithm}-whole"
        status, seconds, moments = train(algorithm, config, whole)
        runs.append({"folder": whole.name, "moment": "never", "status": [status]})
        chance = random.Random(f"kill {algorithm}")
        for number, kind in enumerate(kinds):
            killed = folder / f"{algorithm}-{number}"
            if kind == "clock":
                after = chance.uniform(0, seconds)
                first, _, _ = train(algorithm, config, killed, kill_after_s=after)
                moment = f"after {after:.2f} of {seconds:.2f} s"
            else:
                chosen = range(len(moments))
                if kind == "saving":
                    chosen = [place for place in chosen if ".checkpoint-" in moments[place]]
                place = chance.choice(chosen)
                first, _, _ = train(algorithm, config, killed, kill_at=place + 1)
                moment = f"{place + 1} of {len(moments)}: {moments[place]}"
            again, _, _ = train(algorithm, config, killed, "--resume_from_checkpoint", "latest")
            runs.append({"folder": killed.name, "moment": moment, "status": [first, again]})
    (folder / "runs.json").write_text(json.dumps(runs))


if __name__ == "__main__":
    main(*sys.argv[1:])
