"""The end of a session, even while a task is in the middle of a statement on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from sqlalchemy.exc import IllegalStateChangeError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from .._dialects.interruption import end_statement
from .plain import get_transaction, in_transaction, objects_of
from .state import pending
from .turns import ENDINGS, exclusive

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import DBAPIConnection

    from .state import StatefulSession


@exclusive
def release(session: Session) -> None:
    """Release the connection of a transaction that only read; called inside SQLAlchemy's greenlet.

    Unlike ``rollback()`` this expires nothing, and hooks do not count it as an outcome.
    """
    state = cast("StatefulSession", session)._fastapi_async_sqlalchemy
    state.end_exposed()
    transaction = get_transaction(session)
    hooks, state.hooks = state.hooks, None
    joined, state.joined = state.joined, ()
    try:
        if transaction is not None:
            transaction.close()
    finally:
        state.hooks, state.joined = hooks, joined
        if hooks is not None:
            hooks.marks.clear()


def end(session: StatefulSession) -> None:
    """Close the session for good; nothing is sent if no transaction is open.

    SQLAlchemy's ``close()`` costs as much as creating a session, so it is skipped for an empty one.
    """
    state = session._fastapi_async_sqlalchemy
    state.closed = True
    if in_transaction(session) or next(objects_of(session), None) is not None:
        Session.close(session)
    if state.checkout is not None:
        state.checkout.after_operation(session)


def resume(session: StatefulSession) -> None:
    """Begin the next transaction if other tasks changed objects while the last one was committed."""
    if not in_transaction(session) and pending(session):
        Session.begin(session)


async def discard_in_use(session: StatefulSession) -> None:
    """End a session while another task is in the middle of an operation on it.

    The connection is discarded, so that the task's statement fails and no other request inherits it. If
    the driver can interrupt a statement, that is enough. In the middle of COMMIT or of a checkout
    SQLAlchemy refuses to discard it, and the operation closes the session at its own end. COMMIT is waited
    for; a checkout is not, as it holds no connection yet.
    """
    state = session._fastapi_async_sqlalchemy
    state.closed = True
    connection = await greenlet_spawn(_connection_at_hand, session)
    goes_on = connection is not None and await end_statement(connection)
    ends_itself = connection is not None and not in_transaction(session)  # after its statement
    if goes_on or ends_itself:
        await state.idle()
        return
    try:
        await greenlet_spawn(Session.invalidate, session)
    except IllegalStateChangeError:
        if state.operation in ENDINGS or connection is not None:
            await state.idle()


def _connection_at_hand(session: Session) -> DBAPIConnection | None:
    """Return the connection of a session that is in the middle of a statement, otherwise None."""
    if not in_transaction(session):
        return None
    try:
        return Session.connection(session).connection.dbapi_connection
    except SQLAlchemyError:  # in the middle of COMMIT or of a checkout
        return None
