"""A Redis of the test run: it keeps nothing on disk, and nothing else finds its port."""

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.listening import listening


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

        def command(port: int) -> list[str]:
            return [server, *options, "--port", str(port)]

        with listening(command, Path(folder, "log"), "Ready to accept connections", RedisError) as port:
            yield f"redis://127.0.0.1:{port}"
