"""Two-phase commit: how each database names its transactions, and finishes them in one round trip each."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import event
from sqlalchemy.dialects.postgresql.base import PGDialect
from sqlalchemy.exc import NotSupportedError
from sqlalchemy.sql import text
from sqlalchemy.util import await_only

from ..exceptions import ConfigurationError
from .alone import alone
from .logical import LogicalConnection
from .statements import TWO_PHASE, dated

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection, Engine, ExecutionContext
    from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
    from sqlalchemy.pool import ConnectionPoolEntry, PoolResetState

CLOCK: Final = text("SELECT @@timestamp")
"""The query for MariaDB's time in seconds since 1970, whatever the time zone."""
XID: Final = "fastapi_async_sqlalchemy.xid"
"""The name of the last two-phase transaction begun on a connection to MariaDB."""
_NO_XA: Final = "a Galera cluster has no two-phase commit: leave it out of atomic()."
_FOLLOWED_HERE: Final = "fastapi_async_sqlalchemy.followed_here"


def date_by_server(dialect: Any) -> None:
    """Make a copy of MariaDB's dialect put the server's time into the names of two-phase transactions.

    XA RECOVER does not report a transaction's age, which another machine must know.
    """
    begin = dialect.do_begin_twophase

    def begin_dated(connection: Connection, xid: str) -> None:
        connection.info[XID] = dated(xid, int(connection.execute(CLOCK).scalar_one()))
        try:
            begin(connection, connection.info[XID])
        except NotSupportedError as error:
            if "Galera" not in str(error.orig):
                raise
            raise ConfigurationError(_NO_XA) from error

    dialect.do_begin_twophase = begin_dated


def finish_in_one(engine: Engine, dialect: Any) -> None:
    """Make a copy of PostgreSQL's dialect finish two-phase transactions without a statement to spare.

    SQLAlchemy follows each COMMIT PREPARED by BEGIN and ROLLBACK, and asyncpg prepares every statement.
    psycopg names a transaction when it begins, but the witness gets its name when it is prepared.
    """
    if dialect.driver == "asyncpg" and not _cursors_ask_server():
        return
    dialect.do_begin_twophase = partial(PGDialect.do_begin_twophase, dialect)
    dialect.do_prepare_twophase = _prepare
    dialect.do_commit_twophase = partial(_finish, "COMMIT", dialect.do_commit)
    dialect.do_rollback_twophase = partial(_finish, "ROLLBACK", dialect.do_rollback)
    if dialect.driver == "asyncpg":
        dialect.do_begin_twophase = _begin_simply
        dialect.do_commit_twophase = partial(_finish, "COMMIT", partial(_end, "COMMIT", dialect.do_commit))
        dialect.do_rollback_twophase = partial(
            _finish, "ROLLBACK", partial(_end, "ROLLBACK", dialect.do_rollback)
        )
        dialect.do_execute_no_params = partial(_execute_simply, dialect.do_execute_no_params)
        event.listen(engine.pool, "reset", _end_simply)


def _cursors_ask_server() -> bool:
    """Whether asyncpg's cursors look for a transaction at the server, not among its own: since 0.32."""
    major, minor = version("asyncpg").split(".")[:2]
    return (int(major), int(minor)) >= (0, 32)


def _prepare(connection: Connection, xid: str) -> None:
    _execute(connection, f"PREPARE TRANSACTION '{xid}'")


def _finish(
    verb: str,
    finish: Callable[[Any], None],
    connection: Connection,
    xid: str,
    is_prepared: bool = True,  # noqa: FBT001, FBT002  # SQLAlchemy's
) -> None:
    """Finish a transaction, a prepared one in autocommit: otherwise psycopg would first begin another."""
    if not is_prepared:
        finish(connection.connection)
        return
    adapted = connection.connection.dbapi_connection
    with nullcontext() if isinstance(adapted, LogicalConnection) else alone(adapted):
        _execute(connection, f"{verb} PREPARED '{xid}'")


def _end(verb: str, end: Callable[[Any], None], connection: Any) -> None:
    """End a transaction that is not prepared; one in a sandbox is a savepoint."""
    if isinstance(connection.dbapi_connection, LogicalConnection):
        end(connection)
    else:
        _send(verb, connection.dbapi_connection)


def _execute(connection: Connection, statement: str) -> None:
    connection.exec_driver_sql(statement, execution_options={"no_parameters": True}).close()


def _begin_simply(connection: Connection, _: str) -> None:
    """Begin a transaction that asyncpg does not follow: it would wait for a COMMIT or ROLLBACK."""
    adapted: Any = connection.connection.dbapi_connection
    if isinstance(adapted, LogicalConnection):
        return  # its first statement begins it
    words = ["BEGIN"]
    if adapted.isolation_level is not None:
        words += ["ISOLATION LEVEL", adapted.isolation_level.replace("_", " ")]
    words += ["READ ONLY"] * adapted.readonly + ["DEFERRABLE"] * adapted.deferrable
    connection.info[_FOLLOWED_HERE] = True
    adapted.autocommit = True
    _send(" ".join(words), adapted)


def _end_simply(driver: DBAPIConnection, record: ConnectionPoolEntry, state: PoolResetState) -> None:
    """Roll back what is open on a connection that returns to the pool."""
    if record.info.pop(_FOLLOWED_HERE, False):
        adapted: Any = driver
        if not state.terminate_only and adapted.driver_connection.is_in_transaction():
            _send("ROLLBACK", adapted)
        adapted.autocommit = False


def _execute_simply(
    execute: Callable[..., None],
    cursor: DBAPICursor,
    statement: str,
    context: ExecutionContext | None = None,
) -> None:
    """Execute a statement by asyncpg, one of a two-phase commit without preparing it."""
    adapted = None if context is None else context.root_connection.connection.dbapi_connection
    if adapted is None or isinstance(adapted, LogicalConnection) or not statement.startswith(TWO_PHASE):
        execute(cursor, statement, context)
    else:
        _send(statement, adapted)


def _send(statement: str, adapted: Any) -> None:
    """Send a statement by PostgreSQL's simple protocol, in one round trip."""

    async def simply() -> None:
        async with adapted._execute_mutex:
            await adapted.driver_connection.execute(statement)

    try:
        await_only(simply())
    except Exception as error:  # noqa: BLE001  # any error of asyncpg's: SQLAlchemy translates it
        adapted._handle_exception(error)
