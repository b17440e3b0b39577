"""Kill the leader of the running cluster: `make cluster-kill`, or `python -m examples.cluster.kill`."""

import fcntl
import os
import signal
import sys
from pathlib import Path
from tempfile import gettempdir
from typing import TextIO

PID_FILE = Path(gettempdir(), f"fastapi-async-sqlalchemy-cluster-{os.getuid()}.pid")
"""The process id of `make cluster`, which locks the file until it ends; an unlocked file is stale."""


def lock(file: TextIO) -> bool:
    """Lock the file until it is closed, unless another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def main() -> None:
    """Signal the program that runs the cluster to kill the leader."""
    try:
        with PID_FILE.open() as file:
            if lock(file):
                raise ProcessLookupError
            os.kill(int(file.read()), signal.SIGUSR1)
    except (OSError, ValueError):
        sys.exit("no cluster runs: start one by `make cluster`.")


if __name__ == "__main__":
    main()
