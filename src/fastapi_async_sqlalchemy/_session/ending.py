"""The end of a session, also when a task is in the middle of a statement on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from sqlalchemy.exc import IllegalStateChangeError, SQLAlchemyError
from sqlalchemy.orm import Session

from .._dialects.interruption import end_statement
from .state import pending
from .turns import ENDINGS, take_turn

if TYPE_CHECKING:
    from sqlalchemy.engine.interfaces import DBAPIConnection
    from sqlalchemy.ext.asyncio import AsyncSession

    from .state import StatefulSession


def release(session: Session) -> None:
    """Give the connection of a transaction that only read back; for ``run_sync()``.

    Unlike ``rollback()`` this expires nothing, and it is no outcome to the hooks.
    """
    watched = cast("StatefulSession", session)
    take_turn(watched, "release", _release, watched)


def _release(session: StatefulSession) -> None:
    state = session._fastapi_async_sqlalchemy
    state.end_exposed()
    transaction = session.get_transaction()
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
    """Close for good; sends nothing where no transaction is open.

    SQLAlchemy takes as long for it as for making a session, so that one which holds nothing is spared it.
    """
    state = session._fastapi_async_sqlalchemy
    state.closed = True
    if session.in_transaction() or next(iter(session), None) is not None:
        Session.close(session)
    if state.checkout is not None:
        state.checkout.after_operation(session)


def resume(session: StatefulSession) -> None:
    """Begin the next transaction, if others have changed objects while the last one was committed."""
    if not session.in_transaction() and pending(session):
        Session.begin(session)


async def discard_in_use(opened: AsyncSession, session: StatefulSession) -> None:
    """End a session under a task that is in the middle of an operation on it.

    The connection is discarded, so that the task's statement fails and no other request inherits it. Where
    the driver can interrupt a statement, that is enough. In the middle of COMMIT or of a checkout
    SQLAlchemy refuses: then the operation closes the session when it ends. COMMIT is waited for; a
    checkout holds no connection yet.
    """
    state = session._fastapi_async_sqlalchemy
    state.closed = True
    connection = await opened.run_sync(_connection_at_hand)
    goes_on = connection is not None and await end_statement(connection)
    ends_itself = connection is not None and not session.in_transaction()  # after its statement
    if goes_on or ends_itself:
        await state.idle()
        return
    try:
        await opened.invalidate()
    except IllegalStateChangeError:
        if state.operation in ENDINGS or connection is not None:
            await state.idle()


def _connection_at_hand(session: Session) -> DBAPIConnection | None:
    """Return the connection of a session that is in the middle of a statement, else None."""
    if not session.in_transaction():
        return None
    try:
        return Session.connection(session).connection.dbapi_connection
    except SQLAlchemyError:  # in the middle of COMMIT or of a checkout
        return None
