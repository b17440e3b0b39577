"""The meaning of a database's errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sqlalchemy.exc import DBAPIError

from ..exceptions import UnexpectedRollbackError
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


def is_conflict(error: Exception) -> bool:
    """Whether the database refused work only because of concurrent work.

    Its transaction has been rolled back, or will be, and may succeed when it is repeated.
    """
    if isinstance(error, UnexpectedRollbackError):
        return isinstance(error.__cause__, Exception) and is_conflict(error.__cause__)
    if not isinstance(error, DBAPIError) or error.orig is None:
        return False
    driver = error.orig
    if _is_node_not_ready(driver):
        return True  # nothing was executed, not even a COMMIT; the connection is discarded all the same
    if error.connection_invalidated:
        return False
    if driver.args[:1] == (_SAVEPOINT_LOST,) and isinstance(driver.__context__, Exception):
        return is_conflict(driver.__context__)  # the deadlock has rolled the savepoint's transaction back
    state = getattr(driver, "sqlstate", None)
    code: object = driver.args[0] if driver.args else None
    busy = getattr(driver, "sqlite_errorcode", None)
    return (
        state in _SQLSTATES
        or (isinstance(code, int) and code in _MYSQL_ERRORS)
        or (isinstance(busy, int) and busy & 0xFF == _SQLITE_BUSY)
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
_BEGUN: Final = "fastapi_async_sqlalchemy.begun"
"""Whether SQLite was in a transaction before the last statement other than a SELECT."""


def begin_in_time(cursor: DBAPICursor, statement: str, connection: Connection) -> None:
    """Begin the transaction that Python's SQLite driver delays because it sees no write.

    Without it, RELEASE would be a COMMIT, and the writes of a ``WITH`` would be stored immediately.
    """
    if connection.dialect.name != "sqlite":
        return
    driver = connection.connection.driver_connection
    begun = driver is not None and driver.in_transaction
    if not begun and driver is not None:
        verb, autocommits = verb_of(statement), driver.isolation_level is None
        if verb == "SAVEPOINT" or (verb == "WITH" and not autocommits and has_writing_part(statement)):
            cursor.execute("BEGIN")
    connection.info[_BEGUN] = begun


def is_transaction_lost(context: ExceptionContext) -> bool:
    """Whether a statement's error has rolled back its whole transaction, and the connection goes on."""
    connection, code = context.connection, context.original_exception.args[:1]
    if connection is None or connection.closed or connection.invalidated:
        return False
    if context.dialect.name == "sqlite":
        driver = connection.connection.driver_connection
        return connection.info.pop(_BEGUN, False) and driver is not None and not driver.in_transaction
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
