"""Errors that a user's listener of ``handle_error`` has replaced; SQLAlchemy then calls no further one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attrs import define
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError, StatementError

from .plain import get_transaction

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sqlalchemy.engine import Connection, Dialect, ExecutionContext

    from .state import StatefulSession


@define(eq=False, repr=False)
class Replaced(ExceptionContext):
    """What the package's own listener would have been called with."""

    connection: Connection | None
    dialect: Dialect
    original_exception: BaseException
    sqlalchemy_exception: StatementError | None
    statement: str | None
    is_disconnect: bool
    invalidate_pool_on_disconnect: bool = True
    execution_context: ExecutionContext | None = None


def replaced(session: StatefulSession, error: BaseException, *, committing: bool) -> Iterator[Replaced]:
    """Yield what a listener has hidden of an error, for each connection of the session that it may be of."""
    driver, transaction = error.__cause__, get_transaction(session)
    if driver is None or transaction is None or isinstance(error, StatementError):
        return
    for connection, *_ in set(transaction._connections.values()):
        base = connection.dialect.loaded_dbapi.Error
        if isinstance(driver, base):
            statement, cut = None if committing else "", connection.invalidated
            found = DBAPIError.instance(statement, None, driver, base, connection_invalidated=cut)
            yield Replaced(connection, connection.dialect, driver, found, statement, cut)


def has_others(listeners: Iterable[Any], ours: type[object]) -> bool:
    """Whether an event of an engine has listeners of others as well."""
    return any(not isinstance(getattr(one, "__self__", None), ours) for one in listeners)
