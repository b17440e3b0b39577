"""A MariaDB of the test run: it keeps nothing for a crash of the machine, and so waits for no disk."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import URL

FAST = (
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-flush-method=nosync",
    "--skip-innodb-doublewrite",
    "--skip-name-resolve",
    "--character-set-server=utf8mb4",  # Debian's default, and not MariaDB's
    "--collation-server=utf8mb4_general_ci",
)
TRIES = 3
"""Between the look for a free port and the server's start somebody else may take the port."""


class MariadbMissingError(RuntimeError):
    """The programs of MariaDB are not installed."""


class MariadbError(RuntimeError):
    """The server ended when it was started; the text is its log."""


@contextmanager
def own_mariadb(*options: str) -> Generator[URL]:
    """Start a MariaDB with an empty data folder on a free port of 127.0.0.1; end it and remove all on exit.

    Raises MariadbMissingError where the programs are not installed.
    """
    install, server = shutil.which("mariadb-install-db"), shutil.which("mariadbd")
    if install is None or server is None:
        message = "mariadbd and mariadb-install-db are not installed"
        raise MariadbMissingError(message)
    with TemporaryDirectory(prefix="mariadb-") as folder:
        user: list[str] = []
        if os.geteuid() == 0:
            user = ["--user=mysql"]
            shutil.chown(folder, "mysql")
        common = ["--no-defaults", f"--datadir={folder}/data", f"--tmpdir={folder}", *user]
        subprocess.run(  # noqa: S603  # the server's own program
            [install, *common, "--auth-root-authentication-method=normal", "--skip-test-db"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        command = [server, *common, f"--socket={folder}/socket", *FAST, *options]
        with _running(command, Path(folder, "log"), TRIES) as port:
            yield URL.create("mysql+aiomysql", "root", host="127.0.0.1", port=port)


@contextmanager
def _running(command: list[str], log: Path, tries: int) -> Generator[int]:
    """Start the server, and yield its port; it need not end well, for nothing of it is kept."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    with (
        log.open("w") as said,
        subprocess.Popen(  # noqa: S603  # as above
            [*command, "--bind-address=127.0.0.1", f"--port={port}"], stderr=said
        ) as process,
    ):
        try:
            while "ready for connections" not in log.read_text(errors="replace"):
                if process.poll() is not None:
                    break
                time.sleep(0.02)
            else:
                yield port
                return
        finally:
            process.kill()
    if tries == 1:
        raise MariadbError(log.read_text(errors="replace"))
    with _running(command, log, tries - 1) as other:
        yield other
