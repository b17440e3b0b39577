"""A Redis of the test run: it keeps nothing on disk, and nothing else finds its port."""

import shutil
import socket
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

TRIES = 3
"""Between the look for a free port and the server's start another program may take the port."""
DEADLINE = 10
"""How many seconds the server has to end."""
READY = "Ready to accept connections"


class RedisMissingError(RuntimeError):
    """The program redis-server is not installed."""


class RedisError(RuntimeError):
    """The server ended when it was started; the text is its log."""


@contextmanager
def own_redis() -> Generator[str]:
    """Start an empty Redis on a free port of 127.0.0.1 and yield its URL; stop it on exit.

    Raises RedisMissingError where the program is not installed.
    """
    server = shutil.which("redis-server")
    if server is None:
        message = "there is no program redis-server: install Debian's package of that name."
        raise RedisMissingError(message)
    with TemporaryDirectory(prefix="redis-") as folder:
        options = ["--bind", "127.0.0.1", "--dir", folder, "--save", "", "--appendonly", "no"]
        with _running([server, *options], Path(folder, "log"), TRIES) as port:
            yield f"redis://127.0.0.1:{port}"


@contextmanager
def _running(command: list[str], log: Path, tries: int) -> Generator[int]:
    """Start the server and yield its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    with (
        log.open("w") as output,
        subprocess.Popen(  # noqa: S603  # the server's own program
            [*command, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C is not for it: its clients end first
        ) as process,
    ):
        try:
            while READY not in log.read_text(errors="replace"):
                if process.poll() is not None:
                    break
                time.sleep(0.02)
            else:
                yield port
                return
        finally:
            process.terminate()
            try:
                process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                process.kill()
    if tries == 1:
        raise RedisError(log.read_text(errors="replace"))
    with _running(command, log, tries - 1) as other:
        yield other
