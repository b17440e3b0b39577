"""Kill the leader of the running cluster: `make cluster-kill`, or `python -m examples.cluster.kill`."""

import os
import signal
import sys
from pathlib import Path
from tempfile import gettempdir

PID_FILE = Path(gettempdir(), f"fastapi-async-sqlalchemy-cluster-{os.getuid()}.pid")
"""Where `make cluster` writes its process id."""


def main() -> None:
    """Signal the program that runs the cluster to kill the leader."""
    try:
        os.kill(int(PID_FILE.read_text()), signal.SIGUSR1)
    except (OSError, ValueError):
        sys.exit("no cluster runs: start one by `make cluster`.")


if __name__ == "__main__":
    main()
