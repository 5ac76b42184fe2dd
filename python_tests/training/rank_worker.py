"""Two gloo processes, without a launcher that would end them, forked from one process, which imports but once."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import tiny
import torch

from rftcore import cli
from rftcore.rewards import declare
from rftcore.training import Trainer  # noqa: F401  Imported here, it is not imported again in each fork.

# What fails is chosen in the forks alone.
FAILURE = {"how": None, "rank": 1, "calls": 0}
DEADLINE_S = 60


@declare(differentiable=True, unit="points")
def noisy(images, prompts, metadata=None):
    """Draws from the global generator, each process its own numbers; fails in mid-epoch where it is told to."""
    FAILURE["calls"] += 1
    if int(os.environ["RANK"]) == FAILURE["rank"] and FAILURE["calls"] == 12:
        if FAILURE["how"] == "raise":
            raise ZeroDivisionError("the reward is broken")
        if FAILURE["how"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if FAILURE["how"] == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        if FAILURE["how"] == "nan":
            return tiny.brightness(images, prompts) * float("nan")
    return tiny.brightness(images, prompts) + 0.01 * torch.rand(len(images))


def two_processes(folder, config, *flags, how=None):
    """Exit statuses, what each wrote on stderr, and seconds from the first end to the last."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [Path(f"{folder}-{how}-{rank}.log") for rank in range(2)]
    ranks = {}
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            os._exit(_child(rank, port, logs[rank], ["train", "draft", "--config", config, *flags], how))
        ranks[pid] = rank
    statuses, ended = {}, []
    while len(statuses) < 2:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[ranks[pid]] = os.waitstatus_to_exitcode(status)
            ended.append(time.monotonic())
        elif ended and time.monotonic() - ended[0] > DEADLINE_S:
            for other in set(ranks) - {pid for pid, rank in ranks.items() if rank in statuses}:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.05)
    return {
        "status": [statuses[rank] for rank in range(2)],
        "stderr": [log.read_text(errors="replace") for log in logs],
        "seconds": ended[-1] - ended[0],
    }


def _child(rank, port, log, command, how):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    # One that hangs says where before it is killed.
    faulthandler.dump_traceback_later(DEADLINE_S - 5)
    # The reward is found under this module's own name.
    import rank_worker

    rank_worker.FAILURE["how"] = how
    try:
        return cli.main(command)
    except Exception:  # noqa: BLE001
        import traceback

        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def main(folder, *configs):
    """Runs the first config to its end, and the others with the failure that each is named for; two are resumed."""
    whole, *failing = configs
    found = {"whole": two_processes(f"{folder}/whole", whole)}
    for config in failing:
        how = Path(config).stem
        found[how] = two_processes(f"{folder}/{how}", config, how=how)
        if how in ("kill", "signal"):
            found[f"{how}, resumed"] = two_processes(f"{folder}/{how}", config, "--resume_from_checkpoint", "latest")
    Path(folder, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
