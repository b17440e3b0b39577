"""The meaning of a database's errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from .._arguments.checks import exception
from ..exceptions import FastAPIAsyncSQLAlchemyError, UnexpectedRollbackError
from .statements import has_writing_part, verb_of

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, ExceptionContext
    from sqlalchemy.engine.interfaces import DBAPICursor

_SQLSTATES: Final = frozenset({"40001", "40P01"})
"""PostgreSQL's serialization_failure and deadlock_detected (its manual, appendix A)."""
_MYSQL_ERRORS: Final = frozenset({1020, 1205, 1213})
"""ER_CHECKREAD (a newer version of the row, MariaDB), ER_LOCK_WAIT_TIMEOUT and ER_LOCK_DEADLOCK."""
_SAVEPOINT_LOST: Final = 1305
"""ER_SP_DOES_NOT_EXIST: MySQL's and MariaDB's answer to ROLLBACK TO SAVEPOINT after a deadlock."""
_NODE_NOT_READY: Final = 1047
"""ER_UNKNOWN_COM_ERROR: a Galera node's answer to every command while it has no part in the cluster."""
_SQLITE_BUSY: Final = 5
"""SQLITE_BUSY; extended codes hold it in their lowest byte."""


_UNAVAILABLE: Final = frozenset({"57P01", "57P02", "57P03", "57P05", "53300", "25006"})
"""PostgreSQL shuts down, has crashed, starts, ended an idle session, is full, or is a standby."""
_CONNECTION_EXCEPTION: Final = "08"
"""The class of PostgreSQL's SQLSTATEs for connections that failed."""
_MYSQL_UNAVAILABLE: Final = frozenset({1040, 1053, 1203, 1927, 2002, 2003, 2006, 2013, 2055})
"""MySQL and MariaDB are full, shut down, ended the connection, cannot be reached, or were lost."""
_OPTION_PREVENTS: Final = 1290
"""ER_OPTION_PREVENTS_STATEMENT; the text names the option, such as --read-only on a replica."""
_NO_SERVER_ACCEPTED: Final = "TargetServerAttributeNotMatched"
"""asyncpg's error if every host answers and none has the role that is asked for."""


def is_conflict(error: BaseException) -> bool:
    """Return whether the database refused work only because of concurrent work.

    Its transaction has been rolled back, or will be, and may succeed if it is repeated. Retries of
    ``db.transactional`` follow this rule.

    True for PostgreSQL's serialization failures and deadlocks; for MariaDB's and MySQL's deadlocks, lock
    timeouts and newer versions of a row; for a Galera node that takes no commands; and for SQLite's locks. An
    ``UnexpectedRollbackError`` means what its cause means. Raises ``ConfigurationError`` if ``error`` is not
    an exception.
    """
    error = exception("error", error)
    if isinstance(error, UnexpectedRollbackError):
        return error.__cause__ is not None and is_conflict(error.__cause__)
    if not isinstance(error, DBAPIError) or error.orig is None:
        return False
    driver = error.orig
    if _is_node_not_ready(driver):
        return True  # nothing was executed, not even a COMMIT, although the connection is discarded
    if error.connection_invalidated:
        return False
    if driver.args[:1] == (_SAVEPOINT_LOST,) and driver.__context__ is not None:
        return is_conflict(driver.__context__)  # the deadlock has rolled the savepoint's transaction back
    state, code, busy = _codes(driver)
    return state in _SQLSTATES or code in _MYSQL_ERRORS or (busy is not None and busy & 0xFF == _SQLITE_BUSY)


def is_unavailable(error: BaseException) -> bool:
    """Return whether the database could not serve the work now, whatever the work was.

    True if the database cannot be reached, was lost, starts, shuts down, has no connection left, or is a
    standby that takes no writes; and for ``PoolTimeoutError`` and ``ReplicaLagError``. A 503 is the right
    answer. The work may be stored nevertheless if the error came from a COMMIT.

    An ``OSError`` counts unless it names a file, because asyncpg raises one if it cannot connect. psycopg
    gives no code if it cannot connect, so a wrong password counts there. An ``UnexpectedRollbackError`` means
    what its cause means. Raises ``ConfigurationError`` if ``error`` is not an exception.
    """
    error = exception("error", error)
    if isinstance(error, UnexpectedRollbackError):
        return error.__cause__ is not None and is_unavailable(error.__cause__)
    if isinstance(error, FastAPIAsyncSQLAlchemyError | PoolTimeout):
        return isinstance(error, TimeoutError | PoolTimeout)
    if isinstance(error, OSError):
        return error.filename is None
    if isinstance(error, DBAPIError) and error.orig is not None:
        return error.connection_invalidated or _is_driver_unavailable(error, error.orig)
    return _is_postgresql_unavailable(error)  # SQLAlchemy 2.0 passes on what asyncpg raises when it connects


def _is_driver_unavailable(error: DBAPIError, driver: BaseException) -> bool:
    codes = _, code, _ = _codes(driver)
    if error.statement is None and codes == (None, None, None):
        return True  # the driver's own error, at connecting, BEGIN or COMMIT
    return (
        _is_postgresql_unavailable(driver)
        or _is_node_not_ready(driver)
        or code in _MYSQL_UNAVAILABLE
        or (code == _OPTION_PREVENTS and "read-only" in str(driver))
    )


def _is_postgresql_unavailable(driver: BaseException) -> bool:
    state = _codes(driver)[0]
    if state is None:
        return type(driver).__name__ == _NO_SERVER_ACCEPTED
    return state in _UNAVAILABLE or state.startswith(_CONNECTION_EXCEPTION)


def _codes(driver: BaseException) -> tuple[str | None, int | None, int | None]:
    """Return a driver's SQLSTATE, MySQL's or MariaDB's number, and SQLite's; None for what it has not."""
    state: object = getattr(driver, "sqlstate", None)
    code: object = driver.args[0] if driver.args else None
    busy: object = getattr(driver, "sqlite_errorcode", None)
    return (
        state if isinstance(state, str) else None,
        code if isinstance(code, int) and not isinstance(code, bool) else None,
        busy if isinstance(busy, int) else None,
    )


def discard_refused(context: ExceptionContext) -> None:
    """Have the pool's connections discarded once a Galera node takes no commands: others may lead elsewhere.

    The node answers a ping, and so its connections would stay in the pool.
    """
    if _is_node_not_ready(context.original_exception):
        context.is_disconnect = context.invalidate_pool_on_disconnect = True


def _is_node_not_ready(error: BaseException) -> bool:
    return error.args[:1] == (_NODE_NOT_READY,) and "WSREP" in str(error)


_TRANSACTION_LOST: Final = frozenset({1020, 1206, 1213})
"""MariaDB's ER_CHECKREAD, ER_LOCK_TABLE_FULL and ER_LOCK_DEADLOCK: errors that undo the whole transaction."""
_LOCK_TIMEOUT: Final = (1205,)


def begin_in_time(cursor: DBAPICursor, statement: str, connection: Connection) -> bool:
    """Begin the transaction that Python's SQLite driver delays because it sees no write.

    Without it, RELEASE would be a COMMIT, and the writes of a ``WITH`` would be stored immediately. Return
    whether SQLite was in a transaction already.
    """
    if connection.dialect.name != "sqlite":
        return False
    driver = connection.connection.driver_connection
    begun = driver is not None and driver.in_transaction
    if not begun and driver is not None:
        verb, autocommits = verb_of(statement), driver.isolation_level is None
        if verb == "SAVEPOINT" or (verb == "WITH" and not autocommits and has_writing_part(statement)):
            cursor.execute("BEGIN")
    return begun


def is_transaction_lost(context: ExceptionContext, begun_on: Connection | None) -> bool:
    """Whether a statement's error has rolled back its whole transaction, and the connection goes on.

    ``begun_on`` is the connection on which SQLite was in this transaction before its last statement.
    """
    connection, code = context.connection, context.original_exception.args[:1]
    if connection is None or connection.closed or connection.invalidated:
        return False
    if context.dialect.name == "sqlite":
        driver = connection.connection.driver_connection
        return connection is begun_on and driver is not None and not driver.in_transaction
    return not _TRANSACTION_LOST.isdisjoint(code) or (
        code == _LOCK_TIMEOUT and _timeout_rolls_back(connection)
    )


def _timeout_rolls_back(connection: Connection) -> bool:
    """Ask MariaDB whether a lock timeout undoes the statement alone, or the whole transaction."""
    cursor = connection.connection.cursor()
    try:
        cursor.execute("SELECT @@innodb_rollback_on_timeout")
        return bool(cursor.fetchall()[0][0])
    finally:
        cursor.close()
