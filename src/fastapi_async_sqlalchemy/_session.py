"""A session that serves one task at a time, and none after its unit's end.

What is on the way of every statement is kept to the bone: SQLAlchemy's own session events are attached
only to the few sessions that need them.
"""

from __future__ import annotations

import logging
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast
from weakref import ref

from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.sql import text
from sqlalchemy.util import await_only

from ._session_state import SessionState
from .exceptions import UnexpectedRollbackError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from sqlalchemy.engine import Connection

logger = logging.getLogger("fastapi_async_sqlalchemy")

_CLOSED: Final = (
    "close() on %s rolls back %d statements and %d unflushed objects, because nothing committed them: call "
    "`await db.session.commit()` before, or leave the session for its unit to close."
)


class ObservedSession(SessionState):
    """A session that serves one task at a time, and none after its unit's end.

    Its operations are overridden rather than watched: SQLAlchemy has no event for the beginning and the
    end of each, and a refusal must come before the session's own state changes.
    """

    def commit(self) -> None:
        """Commit, unless the database would silently make a rollback of it."""
        if self.uow_failure is not None or self.uow_hooks is not None:
            _refuse_silent_rollback(self)
        self.uow_committing = True
        try:
            super().commit()
        finally:
            self.uow_committing = False
        if self.uow_noted and not self.in_transaction():  # a hook may have begun the next one
            self.uow_wrote = self.uow_wrote or self.uow_written > 0
            self.uow_forget()

    def prepare(self) -> None:
        """Prepare the first phase of a commit, unless the database would silently make a rollback of it."""
        if self.uow_failure is not None or self.uow_hooks is not None:
            _refuse_silent_rollback(self)
        super().prepare()

    def rollback(self) -> None:
        """Roll back."""
        if self.uow_hooks is not None:
            self.uow_hooks.dooms.clear()
        self.uow_give_up()
        try:
            super().rollback()
        finally:
            if not self.in_transaction():  # a hook may have begun the next one
                self.uow_forget()

    def close(self) -> None:
        """Close for good once the unit has ended; before that, begin afresh, as is SQLAlchemy's default."""
        if self.uow_closed:
            super().close()
        else:
            self.reset()

    def reset(self) -> None:
        """Begin afresh; whoever closes a session that is not his may not know what that costs."""
        if self.has_written():
            logger.warning(_CLOSED, self.uow_shared.name, self.uow_written, self.pending())
        self.uow_give_up()
        super().reset()
        self.uow_forget()

    def invalidate(self) -> None:
        """Discard the connections, and begin afresh unless the unit has ended."""
        if self.uow_closed:
            super().invalidate()
            return
        self.uow_give_up()
        transaction = self.get_nested_transaction() or self.get_transaction()
        while transaction is not None:
            ended, transaction = transaction, transaction.parent
            ended.close(invalidate=True)
        super().reset()
        self.uow_forget()

    def connection(
        self, bind_arguments: dict[str, Any] | None = None, execution_options: Any = None
    ) -> Connection:
        """Return the connection, and remember that it may be used without calling this session."""
        connect = partial(super().connection, bind_arguments, execution_options)
        if self.uow_checkout is None:
            connection = connect()
        else:
            bind = self.get_bind(**(bind_arguments or {}))
            connection = self.uow_checkout.connect(bind, connect, self.uow_outer_holds)
        self.uow_shared.connections[connection] = ref(self)
        self.uow_lent = True
        return connection

    def begin(self, nested: bool = False) -> SessionTransaction:  # noqa: FBT001, FBT002  # SQLAlchemy's signature
        """Begin a transaction that the caller ends; SQLAlchemy does so without calling this session."""
        self.uow_follow()
        transaction = super().begin(nested)
        transaction.__class__ = OwnedTransaction
        self.uow_begun = self.uow_begun or not nested  # what a savepoint begins around itself is nobody's
        return transaction

    def uow_commit(self, end: Callable[[], None]) -> None:
        """Commit what ``begin()`` has returned, by its own method."""
        end()

    def uow_rollback(self, end: Callable[[], None]) -> None:
        """Roll back what ``begin()`` has returned, by its own method."""
        end()

    def release(self) -> None:
        """Give the connection of a transaction that only read back; the objects stay as they are.

        Unlike ``rollback()`` this expires nothing, and it is no outcome to the hooks.
        """
        transaction = self.get_transaction()
        hooks, self.uow_hooks = self.uow_hooks, None
        try:
            if transaction is not None:
                transaction.close()
        finally:
            self.uow_hooks = hooks
            if hooks is not None:
                hooks.dooms.clear()
            self.uow_forget()

    def end(self) -> None:
        """Close for good; sends nothing where no transaction is open.

        SQLAlchemy takes as long for it as for making a session, so that one which holds nothing is spared it.
        """
        self.uow_closed = True
        if self.in_transaction() or next(iter(self), None) is not None:
            Session.close(self)
        self.uow_released()

    def uow_resume(self) -> None:
        """Begin the next transaction, if others have changed objects while the last one was committed."""
        if not self.in_transaction() and self.pending():
            super().begin()

    def uow_follow(self) -> None:
        """Attach SQLAlchemy's events, for what its transactions do without calling this session."""
        if not self.uow_followed:
            self.uow_followed = True
            event.listen(self, "after_begin", _after_begin)
            event.listen(self, "before_commit", _before_commit)
            event.listen(self, "after_commit", _after_commit, insert=True)  # before one that may fail
            event.listen(self, "after_transaction_end", _after_transaction_end)

    def uow_left(self, task: asyncio.Task[Any] | None) -> None:
        """End an operation that somebody waits for, or that its unit did not wait for."""
        if self.uow_closed and self.in_transaction():
            Session.close(self)  # the unit has ended meanwhile, and left the rest to this task
            self.uow_released()
        if self.uow_holder is task:
            self.uow_holder = None
        if self.uow_waiter is not None:
            self.uow_waiter.set_result(None)
            self.uow_waiter = None

    def __del__(self) -> None:
        if not self.uow_closed and hasattr(self, "hash_key") and self.in_transaction():
            warnings.warn(
                f"A session of {self.uow_shared.name} was garbage-collected with its transaction open: "
                "leave the unit of work, `async with db():`, before dropping it.",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )


class OwnedTransaction(SessionTransaction):
    """A transaction or savepoint that user code ends itself: that is an operation of its session, too."""

    def commit(self, *args: Any, **kwargs: Any) -> None:
        """Commit, or release the savepoint."""
        end = partial(super().commit, *args, **kwargs)
        session = self._owner()
        end() if session is None else session.uow_commit(end)

    def rollback(self, *args: Any, **kwargs: Any) -> None:
        """Roll back, to the savepoint if it is one."""
        end = partial(super().rollback, *args, **kwargs)
        session = self._owner()
        end() if session is None else session.uow_rollback(end)

    def _owner(self) -> ObservedSession | None:
        return cast("ObservedSession | None", self.session)  # none once it is closed, which SQLAlchemy tells


def _refuse_silent_rollback(session: ObservedSession) -> None:
    """Raise if the transaction is lost; some databases answer COMMIT with a rollback and no error."""
    if session.uow_hooks is not None:
        session.uow_hooks.refuse_commit()
    if session.uow_failure is None:
        return
    failure, reason = session.uow_failure, "the database has rolled it back after a conflict"
    if not session.uow_gone:
        reason = "a statement in it failed and the database has given the transaction up"
        if session.is_active and _goes_on(session):
            session.uow_failure, session.uow_failed_on = None, ()
            return
    raise UnexpectedRollbackError(session.uow_shared.name, reason) from failure


def _goes_on(session: ObservedSession) -> bool:
    """Ask where statements have failed, whether that has aborted the transaction."""
    try:
        for connection in session.uow_failed_on:
            connection.execute(text("SELECT 1"))
    except SQLAlchemyError:
        return False
    return True


def _after_begin(session: ObservedSession, transaction: SessionTransaction, connection: Connection) -> None:
    session.uow_shared.connections[connection] = ref(session)
    if session.uow_checkout is not None:
        session.uow_checkout.connected()
    if transaction.parent is None and session.uow_hooks is not None:
        session.uow_hooks.begun(connection)


def _before_commit(session: ObservedSession) -> None:
    if not session.in_nested_transaction():
        if session.uow_hooks is not None:
            session.uow_committing = False
            session.uow_hooks.refuse_commit()
            await_only(session.uow_hooks.before_commit())
        _refuse_silent_rollback(session)
        session.uow_committing = True


def _after_commit(session: ObservedSession) -> None:
    if session.in_nested_transaction():
        session.uow_committed = True
        return
    # SQLAlchemy may not come to the end of the transaction: the task may be cancelled at the pool's reset
    session.uow_wrote = session.uow_wrote or session.uow_written > 0
    session.uow_committing = False
    session.uow_forget()
    if session.uow_hooks is not None:
        session.uow_hooks.decide(committed=True)


def _after_transaction_end(session: ObservedSession, transaction: SessionTransaction) -> None:
    root = transaction.parent is None
    if root or transaction.nested:
        outcome = None if root and session.uow_unknown else session.uow_committed
        session.uow_committed = False
        if root:
            session.uow_committing = False
            session.uow_forget()
            session.uow_released()
        if session.uow_hooks is not None:
            session.uow_hooks.follow(transaction, outcome)
