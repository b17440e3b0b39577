"""Servers that keep nothing, each started on a free port of 127.0.0.1."""

import socket
import subprocess
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

TRIES = 3
"""Between the look for a free port and the server's start another program may take the port."""


@contextmanager
def listening(
    command: Callable[[int], list[str]], log: Path, ready: str, error: type[Exception], tries: int = TRIES
) -> Generator[int]:
    """Start a server with the command for a port, and yield the port once the log says that it is ready.

    The server is killed on exit. Raises the error, with the log as its text, if the server ends at its start.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    with (
        log.open("w") as output,
        subprocess.Popen(  # noqa: S603  # the caller's own program
            command(port),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal must not end it before its clients
        ) as process,
    ):
        try:
            while ready not in log.read_text(errors="replace"):
                if process.poll() is not None:
                    break
                time.sleep(0.02)
            else:
                yield port
                return
        finally:
            process.kill()
    if tries == 1:
        raise error(log.read_text(errors="replace"))
    with listening(command, log, ready, error, tries - 1) as other:
        yield other
