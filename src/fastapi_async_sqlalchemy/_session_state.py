"""What is known of a session: whose it is at the moment, what its transaction has done, what ended it."""

from __future__ import annotations

import asyncio
import logging
from asyncio import current_task
from typing import TYPE_CHECKING, Any, ClassVar, Final
from weakref import WeakKeyDictionary, ref

from attrs import Factory, define
from sqlalchemy.exc import InterfaceError
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only

from ._statements import READS, decides, has_writing_part, verb_of
from .exceptions import ConcurrentUseError, UnitClosedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection, ExceptionContext

    from ._hooks import Hooks
    from ._pool import Checkout
    from ._streams import Stream

logger = logging.getLogger("fastapi_async_sqlalchemy")

ENDINGS: Final = frozenset({"commit", "rollback", "close", "reset", "release"})
"""The operations that decide a transaction, and so are not cut short."""
_WITHOUT_STATEMENT: Final = ENDINGS | {"begin", "connection"}


@define(eq=False, repr=False)
class Shared:
    """What the sessions of one database share."""

    name: str
    """The database, as messages name it."""
    connections: WeakKeyDictionary[Connection, ref[SessionState]] = Factory(
        WeakKeyDictionary["Connection", "ref[SessionState]"]
    )
    """Connections that may be used without calling their session."""


class SessionState(Session):
    """What is known lies in class attributes until it changes: making a session costs nothing more."""

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
    uow_failed_on: tuple[Connection, ...] = ()
    """The connections of such errors: there may be one of each engine in ``binds``."""
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
        if self._is_clean():  # the public sets take thirty times as long to make
            return 0
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

    def uow_give_up(self) -> None:
        """Decide the hooks: whatever cuts the end of the transaction short, it will not be committed."""
        if self.uow_hooks is not None and self.in_transaction() and not self.uow_unknown:
            self.uow_hooks.decide(committed=False)

    def uow_forget(self) -> None:
        """Begin counting anew after a transaction."""
        self.uow_noted = self.uow_begun = self.uow_gone = self.uow_unknown = False
        self.uow_written = 0
        self.uow_failure = None
        self.uow_failed_on = self.uow_savepoints = ()

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
        # the driver refuses it while another task is at the connection, and so it would the ROLLBACK
        unsent = not cut and isinstance(context.sqlalchemy_exception, InterfaceError)
        if statement is None and (not committing or unsent):  # its transaction may still be open
            context.is_disconnect = True
            context.invalidate_pool_on_disconnect = False
        elif statement is not None and not (cut and decides(statement, self.uow_xid)):
            self.uow_failure = context.sqlalchemy_exception or context.original_exception
            if context.connection is not None and context.connection not in self.uow_failed_on:
                self.uow_failed_on += (context.connection,)
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


def task_name(task: asyncio.Task[Any] | None) -> str:
    """Name a task in a message."""
    return "code outside any task" if task is None else f"task {task.get_name()!r}"
