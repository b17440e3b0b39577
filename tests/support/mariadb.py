"""A MariaDB of the test run: it keeps nothing for a crash of the machine, and so waits for no disk."""

import os
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from sqlalchemy import URL

from tests.support.listening import listening

FAST = (
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-flush-method=nosync",
    "--skip-innodb-doublewrite",
    "--skip-name-resolve",
    "--character-set-server=utf8mb4",  # Debian's default, and not MariaDB's
    "--collation-server=utf8mb4_general_ci",
)


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

        def command(port: int) -> list[str]:
            own = [f"--socket={folder}/socket", "--bind-address=127.0.0.1", f"--port={port}"]
            return [server, *common, *FAST, *options, *own]

        with listening(command, Path(folder, "log"), "ready for connections", MariadbError) as port:
            yield URL.create("mysql+aiomysql", "root", host="127.0.0.1", port=port)
