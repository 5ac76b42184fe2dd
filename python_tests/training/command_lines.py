"""Runs several command lines in one process, which imports but once: JSON in, statuses and messages out."""

import contextlib
import io
import json
import sys
import traceback

from rftcore import cli


def run(command):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = cli.main(command)
        except Exception:  # noqa: BLE001
            traceback.print_exc()
            status = "traceback"
    return status, errors.getvalue()


if __name__ == "__main__":
    json.dump([run(command) for command in json.load(sys.stdin)], sys.stdout)
