"""Statements outside of a transaction: PostgreSQL's drivers send no BEGIN in autocommit."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Generator

    from sqlalchemy.engine import Connection


READ_COMMITTED: Final = frozenset({None, "read_committed", 2})
"""That level in asyncpg's adapter and in psycopg, or none of a connection's own."""


def is_idle(adapted: Any) -> bool:
    """Whether a connection to PostgreSQL is in no transaction, and would begin one by its next statement."""
    driver = adapted.driver_connection
    if hasattr(driver, "is_in_transaction"):  # asyncpg
        return not (driver.is_in_transaction() or adapted.autocommit)
    return not (driver.pgconn.transaction_status or driver.autocommit)


def level_at_begin(adapted: Any) -> object:
    """Return the isolation level by which a connection would begin, None for the server's default."""
    if hasattr(adapted, "isolation_level"):  # asyncpg
        return adapted.isolation_level
    return adapted.driver_connection.isolation_level


@contextmanager
def alone(adapted: Any) -> Generator[None]:
    """Run statements on an idle connection without a transaction around them."""
    adapted.autocommit = True
    try:
        yield
    finally:
        end_alone(adapted)


def end_alone(adapted: Any) -> None:
    """Leave autocommit: psycopg's connection cannot if it broke or was cut short, and is then discarded."""
    driver = adapted.driver_connection
    if hasattr(driver, "is_in_transaction") or not (driver.closed or driver.pgconn.transaction_status):
        adapted.autocommit = False


@contextmanager
def outside_transaction(connection: Connection) -> Generator[None]:
    """Run a query without a separate transaction, unless one is open; then it is rolled back.

    A transaction with another level is begun, as the server may refuse that: a standby has no SERIALIZABLE.
    """
    adapted: Any = connection.connection.dbapi_connection
    if is_idle(adapted) and level_at_begin(adapted) in READ_COMMITTED:
        with alone(adapted):
            yield
    else:
        yield
        connection.connection.rollback()
