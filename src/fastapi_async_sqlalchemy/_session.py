"""A session that knows what it has done, serves one task at a time, and none after its unit's end.

What is on the way of every statement is kept to the bone: SQLAlchemy's own session events are attached
only to the few sessions that need them.
"""

from __future__ import annotations

import asyncio
import logging
import warnings
from asyncio import current_task
from typing import TYPE_CHECKING, Any, ClassVar, Final
from weakref import WeakKeyDictionary, ref

from attrs import Factory, define
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.sql import text
from sqlalchemy.util import await_only

from ._statements import READS, decides, has_writing_part, verb_of
from .exceptions import ConcurrentUseError, UnexpectedRollbackError, UnitClosedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection, ExceptionContext
    from sqlalchemy.orm import SessionTransaction

    from ._hooks import Hooks
    from ._pool import Checkout
    from ._streams import Stream

logger = logging.getLogger("fastapi_async_sqlalchemy")

_CLOSED: Final = (
    "close() on %s rolls back %d statements and %d unflushed objects, because nothing committed them: call "
    "`await db.session.commit()` before, or leave the session for its unit to close."
)


@define(eq=False, repr=False)
class Shared:
    """What the sessions of one database share."""

    name: str
    """The database, as messages name it."""
    connections: WeakKeyDictionary[Connection, ref[ObservedSession]] = Factory(
        WeakKeyDictionary["Connection", "ref[ObservedSession]"]
    )
    """Connections that may be used without calling their session."""


ENDINGS: Final = frozenset({"commit", "rollback", "close", "reset", "release"})
"""The operations that decide a transaction, and so are not cut short."""
_WITHOUT_STATEMENT: Final = ENDINGS | {"begin"}


class ObservedSession(Session):
    """A session that serves one task at a time, and none after its unit's end.

    Its operations are overridden rather than watched: SQLAlchemy has no event for the beginning and the
    end of each, and a refusal must come before the session's own state changes. What is known of the
    session lies in class attributes until it changes, so that making one costs nothing more.
    """

    uow_shared: ClassVar[Shared]
    uow_closed: bool = False
    """The unit has ended: nothing may begin again."""
    uow_holder: asyncio.Task[Any] | None = None
    """The task that is in the middle of an operation, and that operation's name."""
    uow_operation: str = ""
    uow_written: int = 0
    """Statements other than reads since the last commit."""
    uow_noted: bool = False
    """Anything was noted of the transaction at hand: a statement other than a read, an error."""
    uow_wrote: bool = False
    """A commit of this session had such statements."""
    uow_failure: BaseException | None = None
    """A statement's error in the transaction at hand, not undone by a savepoint."""
    uow_begun: bool = False
    """User code began the transaction at hand by name, and ends it."""
    uow_gone: bool = False
    """The database has rolled the transaction back by itself."""
    uow_committing: bool = False
    uow_committed: bool = False
    """A savepoint has just been released and is about to end."""
    uow_unknown: bool = False
    """The connection broke, or the task was cancelled, while COMMIT was under way."""
    uow_savepoints: tuple[tuple[str, int, BaseException | None], ...] = ()
    uow_streams: tuple[Stream, ...] = ()
    uow_hooks: Hooks | None = None
    uow_checkout: Checkout | None = None
    """How the session comes to its connections, where that is limited."""
    uow_outer_holds: Callable[[], bool] | None = None
    """Whether a unit around this session's holds a connection of the same pool."""
    uow_lent: bool = False
    """The connection was handed out: a task may be in the middle of a statement on it."""
    uow_waiter: asyncio.Future[None] | None = None
    uow_settling: bool = False
    """A response is about to start: other tasks wait until the transaction is decided."""
    uow_followed: bool = False
    uow_xid: str = ""
    """The name of its transaction, where that takes part in a two-phase commit."""

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

    def connection(self, *args: Any, **kwargs: Any) -> Connection:
        """Return the connection, and remember that it may be used without calling this session."""
        connection = super().connection(*args, **kwargs)
        self.uow_shared.connections[connection] = ref(self)
        self.uow_lent = True
        return connection

    def begin(self, nested: bool = False) -> SessionTransaction:  # noqa: FBT001, FBT002  # SQLAlchemy's signature
        """Begin a transaction that the caller ends; SQLAlchemy does so without calling this session."""
        self.uow_follow()
        transaction = super().begin(nested)
        self.uow_begun = self.uow_begun or not nested  # what a savepoint begins around itself is nobody's
        return transaction

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

    def uow_before_operation(self, operation: str) -> None:
        """Check a connection out in time for an operation that will need one."""
        if self.uow_checkout is not None and (
            operation not in _WITHOUT_STATEMENT or (operation == "commit" and self.pending())
        ):
            self.uow_checkout.before_statement(self, self.uow_outer_holds)

    def uow_released(self) -> None:
        """Give the place among those with a connection back, if the transaction is over."""
        if self.uow_checkout is not None:
            self.uow_checkout.after_operation(self)

    def busy(self) -> bool:
        """Whether another task is in the middle of an operation."""
        return self.uow_holder is not None and self.uow_holder is not current_task()

    async def idle(self) -> None:
        """Wait until no other task is in the middle of an operation."""
        while self.busy():
            if self.uow_waiter is None:
                self.uow_waiter = asyncio.get_running_loop().create_future()
            await asyncio.shield(self.uow_waiter)

    def pending(self) -> int:
        """Count the objects that the next flush would write."""
        return len(self.new) + sum(map(self.is_modified, self.dirty)) + len(self.deleted)

    def has_written(self) -> bool:
        """Whether the transaction at hand has sent a statement that writes, or has objects to flush."""
        return bool(self.uow_written or self.pending())

    def held_by_owner(self) -> bool:
        """Whether user code holds the transaction: ``begin()``, a savepoint, a stream, a busy task."""
        if self.uow_begun or (self.uow_followed and self.in_nested_transaction()):
            return True
        return (bool(self.uow_streams) and self.streaming()) or self.busy()

    def streaming(self) -> bool:
        """Whether a result of ``stream()`` or ``stream_scalars()`` is unread and somebody still has it."""
        self.uow_streams = tuple(stream for stream in self.uow_streams if stream.unread)
        return bool(self.uow_streams)

    def close_streams(self) -> None:
        """Close the results that nobody has read to the end: some drivers will not commit over them."""
        streams, self.uow_streams = self.uow_streams, ()
        for stream in streams:
            stream.close()

    def uow_refuse_between_rows(self, task: asyncio.Task[Any] | None, operation: str) -> None:
        """Refuse an operation over which the driver would lose the rows that a stream has left."""
        if self.uow_streams and any(stream.between_rows for stream in self.uow_streams):
            raise ConcurrentUseError(
                self.uow_shared.name,
                f"{task_name(task)} called {operation}()",
                "a stream has rows left, which would be lost (read it to its end, or `await result.close()`)",
            )

    def uow_follow(self) -> None:
        """Attach SQLAlchemy's events, for what its transactions do without calling this session."""
        if not self.uow_followed:
            self.uow_followed = True
            event.listen(self, "after_begin", _after_begin)
            event.listen(self, "before_commit", _before_commit)
            event.listen(self, "after_commit", _after_commit, insert=True)  # before one that may fail
            event.listen(self, "after_transaction_end", _after_transaction_end)

    def uow_give_up(self) -> None:
        """Decide the hooks: whatever cuts the end of the transaction short, it will not be committed."""
        if self.uow_hooks is not None and self.in_transaction() and not self.uow_unknown:
            self.uow_hooks.decide(committed=False)

    def uow_forget(self) -> None:
        """Begin counting anew after a transaction."""
        self.uow_noted = self.uow_begun = self.uow_gone = self.uow_unknown = False
        self.uow_written = 0
        self.uow_failure = None
        self.uow_savepoints = ()

    def note_statement(self, statement: str) -> None:
        """Count a statement that is about to be sent, unless it only reads."""
        verb = verb_of(statement)
        if verb in READS:
            return
        self.uow_noted = True
        if verb == "SAVEPOINT":
            self.uow_savepoints += ((statement.rsplit(maxsplit=1)[-1], self.uow_written, self.uow_failure),)
        elif verb == "ROLLBACK":  # TO SAVEPOINT, the last of that name: what came after it counts no more
            last = statement.rsplit(maxsplit=1)[-1]
            for at, (name, written, failure) in reversed([*enumerate(self.uow_savepoints)]):
                if name == last:
                    self.uow_savepoints = self.uow_savepoints[: at + 1]
                    self.uow_written, self.uow_failure = written, failure
                    return
        elif verb != "WITH" or has_writing_part(statement):
            self.uow_written += 1

    def note_error(self, context: ExceptionContext) -> None:
        """Remember a statement's error, or that COMMIT was cut short."""
        committing, self.uow_committing = self.uow_committing, False
        self.uow_noted = True
        statement = context.statement
        if statement is None and context.execution_context is not None:
            statement, self.uow_streams = "", ()  # its rows were being fetched: no more will come
        # an error that is not the database's own says nothing of what became of a COMMIT
        cut = context.is_disconnect or context.sqlalchemy_exception is None
        if statement is None and not committing:  # ROLLBACK failed: its transaction may still be open
            context.is_disconnect = True
            context.invalidate_pool_on_disconnect = False
        elif statement is not None and not (cut and decides(statement, self.uow_xid)):
            self.uow_failure = context.sqlalchemy_exception or context.original_exception
        elif cut:
            self.uow_unknown = context.is_disconnect = True
            logger.error(
                "COMMIT on %s was interrupted (%s): its outcome is unknown, no hook runs and the connection "
                "is discarded; look the data up before repeating the work.",
                self.uow_shared.name,
                type(context.original_exception).__name__,
            )

    def uow_reenter(self, task: asyncio.Task[Any] | None, operation: str) -> bool:
        """Let an operation call another of the same task, or wait for a settlement; refuse anything else.

        Returns whether it is inside another one.
        """
        while self.uow_settling and self.uow_holder is not None and self.uow_holder is not task:
            await_only(self.idle())
        self.uow_refuse(task, operation)
        return self.uow_holder is not None

    def uow_change(self, task: asyncio.Task[Any] | None, operation: str) -> None:
        """Let objects be added during a settlement, unless that is a rollback, which would drop them."""
        if self.uow_closed or not self.uow_settling or self.uow_operation == "rollback":
            self.uow_refuse(task, operation)

    def uow_refuse(self, task: asyncio.Task[Any] | None, operation: str) -> None:
        """Refuse an operation after the unit's end, and in the middle of another task's."""
        if self.uow_closed:
            raise UnitClosedError(self.uow_shared.name)
        if self.uow_holder is not None and self.uow_holder is not task:
            raise ConcurrentUseError(
                self.uow_shared.name,
                f"{task_name(task)} called {operation}()",
                f"{task_name(self.uow_holder)} is in the middle of {self.uow_operation}()",
            )

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


def task_name(task: asyncio.Task[Any] | None) -> str:
    """Name a task in a message."""
    return "code outside any task" if task is None else f"task {task.get_name()!r}"


def _refuse_silent_rollback(session: ObservedSession) -> None:
    """Raise if the transaction is lost; some databases answer COMMIT with a rollback and no error."""
    if session.uow_hooks is not None:
        session.uow_hooks.refuse_commit()
    if session.uow_failure is None:
        return
    failure, reason = session.uow_failure, "the database has rolled it back after a conflict"
    if not session.uow_gone:
        try:
            session.connection().execute(text("SELECT 1"))  # refused where an error aborts the transaction
        except SQLAlchemyError:
            reason = "a statement in it failed and the database has given the transaction up"
        else:
            session.uow_failure = None
            return
    raise UnexpectedRollbackError(session.uow_shared.name, reason) from failure


def _after_begin(session: ObservedSession, transaction: SessionTransaction, connection: Connection) -> None:
    session.uow_shared.connections[connection] = ref(session)
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
