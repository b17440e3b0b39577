"""Which errors are conflicts: those of other work at the same time, as the drivers raise them."""

from collections.abc import Callable

import pytest
from sqlalchemy import exc, text
from sqlalchemy.ext.asyncio import create_async_engine

from fastapi_async_sqlalchemy import PropagationError, UnexpectedRollbackError, is_conflict


async def error_of(url: str, *statements: str) -> exc.DBAPIError:
    """Return the error of the last statement."""
    engine = create_async_engine(url)
    try:
        async with engine.connect() as connection:
            for statement in statements[:-1]:
                await connection.execute(text(statement))
            with pytest.raises(exc.DBAPIError, match=r".") as raised:
                await connection.execute(text(statements[-1]))
            return raised.value
    finally:
        await engine.dispose()


POSTGRESQL = {
    "40001": True,  # serialization_failure
    "40P01": True,  # deadlock_detected
    "40000": False,  # transaction_rollback
    "40002": False,  # transaction_integrity_constraint_violation
    "40003": False,  # statement_completion_unknown
    "55P03": False,  # lock_not_available: NOWAIT asked not to wait
    "57014": False,  # query_canceled
    "23505": False,  # unique_violation
    "25P02": False,  # in_failed_sql_transaction
    "P0001": False,  # raise_exception
}


@pytest.mark.parametrize("state", POSTGRESQL)
async def test_postgresql(postgresql_url: str, state: str) -> None:
    """PostgreSQL's conflicts are a serialization failure and a deadlock."""
    error = await error_of(
        postgresql_url, f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END $$"
    )
    assert getattr(error.orig, "sqlstate", None) == state
    assert is_conflict(error) == POSTGRESQL[state]


async def test_postgresql_terminated(postgresql_url: str) -> None:
    """A connection that broke is no conflict."""
    assert not is_conflict(await error_of(postgresql_url, "SELECT pg_terminate_backend(pg_backend_pid())"))


MARIADB = {
    1020: True,  # ER_CHECKREAD
    1205: True,  # ER_LOCK_WAIT_TIMEOUT
    1213: True,  # ER_LOCK_DEADLOCK
    1062: False,  # ER_DUP_ENTRY
    1317: False,  # ER_QUERY_INTERRUPTED
    1969: False,  # ER_STATEMENT_TIMEOUT
    2013: False,  # CR_SERVER_LOST
}


@pytest.fixture(params=["mariadb_url", "asyncmy_url"])
def mysql_url(request: pytest.FixtureRequest) -> str:
    """An empty MariaDB database by each of two drivers."""
    url: str = request.getfixturevalue(request.param)
    return url


@pytest.mark.parametrize("code", MARIADB)
async def test_mariadb(mysql_url: str, code: int) -> None:
    """MariaDB's conflicts are a deadlock, a lock that did not come, and a row newer than the snapshot."""
    state = "40001" if code == 1213 else "HY000"
    error = await error_of(
        mysql_url, f"SIGNAL SQLSTATE '{state}' SET MYSQL_ERRNO = {code}, MESSAGE_TEXT = 'no'"
    )
    assert error.orig is not None
    assert error.orig.args[0] == code
    assert is_conflict(error) == MARIADB[code]


async def test_mariadb_connection_lost(mysql_url: str) -> None:
    """A deadlock's code on a connection that was lost is no conflict: what became of a COMMIT is unknown."""
    error = await error_of(
        mysql_url, "SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = 1213, MESSAGE_TEXT = 'not connected'"
    )
    assert error.connection_invalidated  # the text of drivers and proxies for one that is lost
    assert not is_conflict(error)


async def test_sqlite_busy(sqlite_url: str) -> None:
    """A locked SQLite file is a conflict."""
    engine = create_async_engine(sqlite_url)
    async with engine.connect() as other:
        await other.execute(text("BEGIN IMMEDIATE"))
        assert is_conflict(await error_of(f"{sqlite_url}?timeout=0", "CREATE TABLE t (id INTEGER)"))
        await other.rollback()
    await engine.dispose()


async def test_sqlite_busy_snapshot(sqlite_url: str) -> None:
    """So is a snapshot that others have written over: an extended code of the same."""
    engine = create_async_engine(sqlite_url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as other:
        await other.execute(text("PRAGMA journal_mode = WAL"))
        await other.execute(text("CREATE TABLE t (id INTEGER)"))
        reader = create_async_engine(f"{sqlite_url}?timeout=0")
        async with reader.connect() as connection:
            await connection.execute(text("BEGIN"))
            await connection.execute(text("SELECT * FROM t"))
            await other.execute(text("INSERT INTO t VALUES (1)"))
            with pytest.raises(exc.OperationalError, match="database is locked") as raised:
                await connection.execute(text("INSERT INTO t VALUES (2)"))
        await reader.dispose()
    await engine.dispose()
    assert getattr(raised.value.orig, "sqlite_errorname", None) == "SQLITE_BUSY_SNAPSHOT"
    assert is_conflict(raised.value)


SQLITE: dict[str, tuple[str, ...]] = {
    "SQLITE_ERROR": ("SELECT nothing",),
    "SQLITE_CONSTRAINT_UNIQUE": ("CREATE TABLE t (id UNIQUE)", "INSERT INTO t VALUES (1), (1)"),
    "SQLITE_READONLY": ("PRAGMA query_only = ON", "CREATE TABLE t (id INTEGER)"),
}


@pytest.mark.parametrize("name", SQLITE)
async def test_sqlite(sqlite_url: str, name: str) -> None:
    """SQLite's other errors are none."""
    error = await error_of(sqlite_url, *SQLITE[name])
    assert getattr(error.orig, "sqlite_errorname", None) == name
    assert not is_conflict(error)


def caused_by(cause: BaseException | None) -> UnexpectedRollbackError:
    """Return the error of a COMMIT that was refused for this reason."""
    error = UnexpectedRollbackError("Primary", "a statement in it failed")
    error.__cause__ = cause
    return error


async def test_refused_commit(postgresql_url: str) -> None:
    """A COMMIT that was refused is a conflict if what it was refused for is one, at any depth."""
    deadlock = await error_of(postgresql_url, "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40P01'; END $$")
    broken = await error_of(postgresql_url, "SELECT 1/0")
    assert is_conflict(caused_by(deadlock))
    assert is_conflict(caused_by(caused_by(deadlock)))
    assert not is_conflict(caused_by(broken))


NO_ERRORS_OF_A_DATABASE: dict[str, Callable[[], Exception]] = {
    "a value": lambda: ValueError(1213),
    "a timeout": TimeoutError,
    "a pool's timeout": lambda: exc.TimeoutError("QueuePool limit"),
    "a driver's error without arguments": lambda: exc.DBAPIError("SELECT 1", {}, Exception()),
    "of this package": lambda: PropagationError("orders", "a conflict", "none"),
    "refused for no error": lambda: caused_by(None),
    "refused for a value": lambda: caused_by(ValueError(1213)),
    "refused for a cancellation": lambda: caused_by(KeyboardInterrupt()),
}


@pytest.mark.parametrize("name", NO_ERRORS_OF_A_DATABASE)
def test_no_error_of_a_database(name: str) -> None:
    """What no database has said is no conflict."""
    assert not is_conflict(NO_ERRORS_OF_A_DATABASE[name]())


def test_number_that_is_no_code() -> None:
    """A truth value or a text in the place of a code is none."""
    for first in ("1213", True, 1213.0, None):
        assert not is_conflict(exc.DBAPIError("SELECT 1", {}, Exception(first)))
