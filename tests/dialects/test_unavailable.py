"""Which errors say that a database could not serve the work now, as each driver raises them."""

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import URL, exc, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

from fastapi_async_sqlalchemy import (
    PartialCommitError,
    PoolTimeoutError,
    ReadOnlyError,
    ReplicaLagError,
    create_middleware_and_session_proxy,
    is_conflict,
    is_unavailable,
)
from tests.dialects.test_conflicts import caused_by, error_of
from tests.support.databases import Judge
from tests.support.programs import free_ports


async def connecting_error(url: URL, **connect_args: object) -> Exception:
    """Return the error of a connection that is refused."""
    engine = create_async_engine(url, connect_args=connect_args)
    try:
        with pytest.raises(Exception, match=r".*") as raised:
            await engine.connect()
        return raised.value
    finally:
        await engine.dispose()


@pytest.mark.parametrize("driver_url", ["postgresql", "psycopg", "mariadb", "asyncmy"], indirect=True)
async def test_nobody_listens(driver_url: str) -> None:
    """A port where nobody listens is an unavailable database, by each driver."""
    (port,) = free_ports(1)
    assert is_unavailable(await connecting_error(make_url(driver_url).set(port=port)))


@pytest.mark.parametrize("driver_url", ["postgresql", "psycopg"], indirect=True)
async def test_silent_server(driver_url: str) -> None:
    """So is a server that accepts a connection and never answers."""
    url = make_url(driver_url)
    argument = (
        {"timeout": 0.2} if url.get_driver_name() == "asyncpg" else {"connect_timeout": 2}
    )  # libpq's least
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port: int = silent.getsockname()[1]
        assert is_unavailable(await connecting_error(url.set(port=port), **argument))


async def test_missing_socket(postgresql_url: str, tmp_path: Path) -> None:
    """So is a missing Unix socket, although a missing file that somebody opens is not."""
    url = make_url(postgresql_url).set(host=None, port=None).update_query_dict({"host": str(tmp_path)})
    error = await connecting_error(url)
    assert isinstance(error, FileNotFoundError)
    assert is_unavailable(error)
    with pytest.raises(FileNotFoundError) as raised:
        (tmp_path / "no such file").read_text()
    assert not is_unavailable(raised.value)


KILL = {
    "postgresql": "SELECT pg_terminate_backend(pg_backend_pid())",
    "mysql": "KILL CONNECTION_ID()",
}


@pytest.mark.parametrize("driver_url", ["postgresql", "psycopg", "mariadb", "asyncmy"], indirect=True)
async def test_lost_connection(driver_url: str) -> None:
    """A connection that is lost is unavailable, during a statement and at the next one."""
    engine = create_async_engine(driver_url, poolclass=NullPool)
    try:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
            for statement in (KILL[engine.dialect.name], "SELECT 1"):
                with pytest.raises(exc.DBAPIError) as raised:
                    await connection.execute(text(statement))
                assert is_unavailable(raised.value)
                assert not is_conflict(raised.value)
                await connection.rollback()
                if raised.value.connection_invalidated:
                    break
    finally:
        await engine.dispose()


@pytest.mark.parametrize("driver_url", ["postgresql", "psycopg"], indirect=True)
async def test_no_server_takes_writes(driver_url: str) -> None:
    """A server that takes no writes is unavailable where the URL asks for one that does."""
    url = make_url(driver_url)
    async with Judge(driver_url) as judge:
        await judge.execute(f'ALTER DATABASE "{url.database}" SET default_transaction_read_only = on')
        error = await connecting_error(url.update_query_dict({"target_session_attrs": "read-write"}))
        await judge.execute(f'ALTER DATABASE "{url.database}" RESET default_transaction_read_only')
    assert is_unavailable(error)


POSTGRESQL = {
    "08006": True,  # connection_failure
    "57P01": True,  # admin_shutdown
    "57P02": True,  # crash_shutdown
    "57P03": True,  # cannot_connect_now
    "53300": True,  # too_many_connections
    "25006": True,  # read_only_sql_transaction, also from a standby
    "53100": False,  # disk_full
    "57014": False,  # query_canceled
    "40001": False,  # serialization_failure
    "23505": False,  # unique_violation
    "42601": False,  # syntax_error
}


@pytest.mark.parametrize("driver_url", ["postgresql", "psycopg"], indirect=True)
@pytest.mark.parametrize("state", POSTGRESQL)
async def test_postgresql(driver_url: str, state: str) -> None:
    """PostgreSQL's own codes decide."""
    error = await error_of(driver_url, f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END $$")
    assert is_unavailable(error) == POSTGRESQL[state]


READ_ONLY = "The MariaDB server is running with the --read-only option so it cannot execute this statement"
NOT_SAFE = (
    "The MariaDB server is running with the --secure-file-priv option so it cannot execute this statement"
)
MARIADB = {
    (1040, "Too many connections"): True,
    (1053, "Server shutdown in progress"): True,
    (1290, READ_ONLY): True,
    (1290, NOT_SAFE): False,
    (1047, "WSREP has not yet prepared node for application use"): True,
    (1047, "Unknown command"): False,
    (1062, "Duplicate entry"): False,
    (1205, "Lock wait timeout exceeded"): False,
}


@pytest.mark.parametrize("driver_url", ["mariadb", "asyncmy"], indirect=True)
@pytest.mark.parametrize(("code", "message"), MARIADB)
async def test_mariadb(driver_url: str, code: int, message: str) -> None:
    """MariaDB's numbers decide, together with the text for those with more than one meaning."""
    error = await error_of(
        driver_url, f"SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = {code}, MESSAGE_TEXT = '{message}'"
    )
    assert is_unavailable(error) == MARIADB[code, message]


async def test_sqlite(sqlite_url: str, tmp_path: Path) -> None:
    """SQLite has no server: neither a locked file nor a missing folder is unavailable."""
    engine = create_async_engine(sqlite_url)
    async with engine.connect() as other:
        await other.execute(text("BEGIN IMMEDIATE"))
        assert not is_unavailable(await error_of(f"{sqlite_url}?timeout=0", "CREATE TABLE t (id INTEGER)"))
        await other.rollback()
    await engine.dispose()
    error = await connecting_error(make_url(f"sqlite+aiosqlite:///{tmp_path}/no/such.db"))
    assert not is_unavailable(error)


async def test_full_pool(postgresql_url: str) -> None:
    """A full pool is unavailable, whether this package or SQLAlchemy waited for it."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    engine_args = {"pool_size": 1, "max_overflow": 0, "pool_timeout": 0.1}
    engine = create_async_engine(postgresql_url, **engine_args)
    try:
        async with db.connect(engine), db() as unit, engine.connect():
            with pytest.raises(PoolTimeoutError) as ours:
                await unit.session.connection()
            with pytest.raises(exc.TimeoutError) as theirs:
                await engine.connect()
        assert [is_unavailable(one.value) for one in (ours, theirs)] == [True, True]
    finally:
        await engine.dispose()


async def test_refused_commit(postgresql_url: str) -> None:
    """A COMMIT that was refused means what its cause means."""
    lost = await error_of(postgresql_url, "SELECT pg_terminate_backend(pg_backend_pid())")
    assert is_unavailable(caused_by(caused_by(lost)))
    assert not is_unavailable(caused_by(await error_of(postgresql_url, "SELECT 1/0")))
    assert not is_unavailable(caused_by(None))


OTHERS: dict[str, tuple[Callable[[], BaseException], bool]] = {
    "a replica that lags": (lambda: ReplicaLagError("replica", "0/1", None, 1), True),
    "a timeout": (TimeoutError, True),
    "a number": (lambda: ValueError(2003), False),
    "a partial commit": (lambda: PartialCommitError(["shop"], "audit"), False),
    "a read-only unit": (lambda: ReadOnlyError("shop", 1), False),
    "a cancellation": (KeyboardInterrupt, False),
    "no driver's error": (lambda: exc.DBAPIError("SELECT 1", {}, Exception("2003")), False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_others(name: str) -> None:
    """Of the other errors those count that more time would have prevented."""
    make, expected = OTHERS[name]
    assert is_unavailable(make()) == expected
