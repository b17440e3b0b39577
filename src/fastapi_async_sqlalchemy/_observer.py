"""What SQLAlchemy's own events tell of a session: has it written, is it busy, did it commit.

A session is watched through a subclass of its ``sync_session_class``, made once per class, and
through session and dialect events, all of them public. Dialect events and not the engine's cursor
events: any listener of the latter kind switches every statement of the engine to a slower path.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn, cast

from attrs import Factory, define
from sqlalchemy import event
from sqlalchemy.orm import Session, SessionTransactionOrigin
from sqlalchemy.sql import text

from .exceptions import ConcurrentUseError, UnexpectedRollbackError, UnitClosedError

if TYPE_CHECKING:
    from sqlalchemy.engine import Connection, Engine, ExceptionContext, ExecutionContext, Result
    from sqlalchemy.orm import SessionTransaction

logger = logging.getLogger("fastapi_async_sqlalchemy")

_WRITING_CTE = re.compile(r"\b(?:INSERT|UPDATE|DELETE|MERGE)\b", re.IGNORECASE)
_READS = frozenset({"SELECT", "SHOW", "EXPLAIN", "DESCRIBE", "PRAGMA", "VALUES", "TABLE", "SET", "BEGIN"})
_DEADLOCK_ROLLED_BACK = 1213
"""MySQL's and MariaDB's ER_LOCK_DEADLOCK, the one statement error that rolls the transaction back."""


@define(eq=False)
class SessionObserver:
    """What is known of one session. It lives as long as the session."""

    database: str
    closed: bool = False
    """The unit has ended: nothing may begin again."""
    holder: asyncio.Task[Any] | None = None
    """The task that is in the middle of an operation, and that operation's name."""
    operation: str = ""
    written: int = 0
    """Statements other than reads since the last commit."""
    failure: BaseException | None = None
    """A statement's error in the transaction at hand, not undone by a savepoint."""
    rolled_back: bool = False
    """The database has rolled the transaction back by itself."""
    committing: bool = False
    committed: bool = False
    unknown: bool = False
    """The connection broke, or the task was cancelled, while COMMIT was under way."""
    released: bool = False
    """The savepoint that is ending was released, not rolled back."""
    connections: tuple[Connection, ...] = ()
    savepoints: tuple[tuple[str, int, BaseException | None], ...] = ()
    streams: tuple[weakref.ref[Result[Any]], ...] = ()
    settled: Callable[[SessionTransaction, bool | None], None] | None = None
    """Called after each end of a transaction or savepoint: True for committed, False for rolled back, None unknown."""
    _idle: asyncio.Future[None] | None = None

    def refuse(self, task: asyncio.Task[Any] | None, operation: str) -> NoReturn:
        """Refuse an operation on an ended unit, or while another task is in the middle of one."""
        if self.closed:
            raise UnitClosedError(self.database)
        raise ConcurrentUseError(_name(self.holder), self.operation, _name(task), operation)

    def leave(self, task: asyncio.Task[Any] | None) -> None:
        """End an operation; whoever waits for the session is woken."""
        if self.holder is task:
            self.holder = None
        if self._idle is not None:
            self._idle.set_result(None)
            self._idle = None

    def busy(self) -> bool:
        """Whether another task is in the middle of an operation."""
        return self.holder is not None and self.holder is not asyncio.current_task()

    async def idle(self) -> None:
        """Wait until no other task is in the middle of an operation."""
        while self.busy():
            if self._idle is None:
                self._idle = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._idle)

    def streaming(self) -> bool:
        """Whether a result of ``stream()`` or ``stream_scalars()`` is still unread."""
        self.streams = tuple(ref for ref in self.streams if (result := ref()) is not None and not _exhausted(result))
        return bool(self.streams)

    def note_statement(self, statement: str) -> None:
        """Count a statement that is about to be sent, unless it only reads."""
        verb, _, rest = statement.lstrip("( \n\t").partition(" ")
        verb = verb.upper()
        if verb in _READS:
            return
        if verb == "SAVEPOINT":
            self.savepoints += ((rest, self.written, self.failure),)
        elif verb == "ROLLBACK":  # TO SAVEPOINT: what came after the savepoint counts no more
            for at, (name, written, failure) in enumerate(self.savepoints):
                if rest.endswith(name):
                    self.savepoints = self.savepoints[: at + 1]
                    self.written, self.failure = written, failure
                    return
        elif verb != "RELEASE" and (verb != "WITH" or _WRITING_CTE.search(statement)):
            self.written += 1


    def note_error(self, context: ExceptionContext) -> None:
        """Remember a statement's error, or that COMMIT was cut short."""
        committing, self.committing = self.committing, False
        if context.statement is not None:
            self.failure = context.sqlalchemy_exception or context.original_exception
            self.rolled_back = _DEADLOCK_ROLLED_BACK in context.original_exception.args[:1]
        elif committing and context.is_disconnect:
            self.unknown = True
            logger.error(
                "COMMIT on %s was interrupted (%s): its outcome is unknown, no hook is run and the connection is "
                "discarded; look the data up before repeating the work.",
                self.database,
                type(context.original_exception).__name__,
            )


class ObservedSession(Session):
    """A session that refuses a second task at the same time, and any use after its unit's end.

    The operations are overridden rather than watched: SQLAlchemy has no event for the beginning and
    the end of each of them, and the refusal must come before the session's own state changes.
    """

    observer: SessionObserver

    def release(self) -> None:
        """Give the connection of a transaction that only read back; the objects stay as they are.

        Unlike ``rollback()`` this expires nothing, and it is no outcome to the hooks.
        """
        observer = self.observer
        transaction, connections = self.get_transaction(), observer.connections
        settled, observer.settled = observer.settled, None
        try:
            if transaction is not None:
                transaction.close()
        except BaseException:
            for connection in connections:
                connection.close()
            raise
        finally:
            observer.settled = settled

    def close(self) -> None:
        """Close for good once the unit has ended; before that, begin afresh, as SQLAlchemy's default is."""
        if self.observer.closed:
            super().close()
        else:
            super().reset()

    def __del__(self) -> None:
        observer: SessionObserver | None = getattr(self, "observer", None)
        if observer is not None and not observer.closed and observer.connections:
            warnings.warn(
                f"A session of {observer.database} was garbage-collected with its transaction open: "
                "leave the unit of work, `async with db():`, before dropping it.",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )


_EXCLUSIVE = (
    *("execute", "exec", "scalar", "scalars", "get", "get_one", "refresh", "merge", "merge_all", "delete", "delete_all"),
    *("flush", "commit", "prepare", "connection", "begin", "begin_nested", "release"),
    *("bulk_save_objects", "bulk_insert_mappings", "bulk_update_mappings"),
)
_CLEANUP = ("rollback", "close", "reset", "invalidate")
_IN_MEMORY = ("add", "add_all")


@define(eq=False)
class Watch:
    """Tells the statements and errors of one database's connections to the sessions that use them."""

    _observers: dict[Connection, SessionObserver] = Factory(dict)
    _classes: dict[type[Session], type[Session]] = Factory(dict)

    def session_class(self, base: type[Session]) -> type[Session]:
        """Return the observed subclass of a ``sync_session_class``."""
        if base not in self._classes:
            combined = type(f"Observed{base.__name__}", (ObservedSession, base), {})
            for names, guard in ((_EXCLUSIVE, _exclusive), (_CLEANUP, _cleanup), (_IN_MEMORY, _in_memory)):
                for name in names:
                    if hasattr(combined, name):
                        setattr(combined, name, guard(getattr(combined, name)))
            event.listen(combined, "after_begin", self._after_begin)
            event.listen(combined, "before_commit", _before_commit)
            event.listen(combined, "after_commit", _after_commit)
            event.listen(combined, "after_transaction_end", self._after_transaction_end)
            self._classes[base] = combined
        return self._classes[base]

    def engine(self, engine: Engine) -> None:
        """Listen to an engine; doing so twice is once to SQLAlchemy."""
        event.listen(engine, "do_execute", self._do_execute)
        event.listen(engine, "do_executemany", self._do_execute)
        event.listen(engine, "do_execute_no_params", self._do_execute_no_params)
        event.listen(engine, "handle_error", self._handle_error)

    def _after_begin(self, session: ObservedSession, _: SessionTransaction, connection: Connection) -> None:
        observer = session.observer
        if connection not in observer.connections:  # a savepoint begins on the connection of its transaction
            observer.connections += (connection,)
            self._observers[connection] = observer

    def _after_transaction_end(self, session: ObservedSession, transaction: SessionTransaction) -> None:
        observer = session.observer
        if transaction.parent is None:
            outcome = None if observer.unknown else observer.committed
            for connection in observer.connections:
                del self._observers[connection]
            observer.connections = observer.savepoints = ()
            observer.written = 0
            observer.failure = None
            observer.rolled_back = observer.committing = observer.committed = observer.unknown = False
        elif transaction.nested:
            outcome, observer.released = observer.released, False
        else:
            return  # a flush
        if observer.settled is not None:
            observer.settled(transaction, outcome)

    def _do_execute(self, _cursor: object, statement: str, _parameters: object, context: ExecutionContext) -> None:
        if not statement.startswith("SELECT"):
            observer = self._observers.get(context.root_connection)
            if observer is not None:
                observer.note_statement(statement)

    def _do_execute_no_params(self, cursor: object, statement: str, context: ExecutionContext) -> None:
        self._do_execute(cursor, statement, None, context)

    def _handle_error(self, context: ExceptionContext) -> None:
        observer = None if context.connection is None else self._observers.get(context.connection)
        if observer is not None:
            observer.note_error(context)


def pending(session: Session) -> int:
    """Count the objects that the next flush would write."""
    return len(session.new) + len(session.dirty) + len(session.deleted)


def held_by_owner(session: ObservedSession) -> bool:
    """Whether user code holds the transaction: ``begin()``, a savepoint, an unread stream, a task at work."""
    transaction = session.get_transaction()
    return (
        (transaction is not None and transaction.origin is SessionTransactionOrigin.BEGIN)
        or session.in_nested_transaction()
        or session.observer.busy()
        or session.observer.streaming()
    )


def _exclusive(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let one task at a time into an operation that waits for the database."""
    name = method.__name__

    @functools.wraps(method)
    def operation(self: ObservedSession, *args: Any, **kwargs: Any) -> Any:
        observer = self.observer
        task = _current_task()
        if observer.holder is not None or observer.closed:
            if observer.holder is task and not observer.closed:
                return method(self, *args, **kwargs)  # one operation calls another
            observer.refuse(task, name)
        observer.holder = task
        observer.operation = name
        try:
            result = method(self, *args, **kwargs)
            options = kwargs.get("execution_options")
            if options and options.get("stream_results"):
                observer.streams += (weakref.ref(result),)
            return result
        except Exception as error:
            if observer.closed:
                raise UnitClosedError(observer.database) from error
            raise
        finally:
            if observer.closed and self.in_transaction():
                Session.close(self)  # the unit ended meanwhile, and left the rest to this task
            observer.leave(task)

    return operation


def _cleanup(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let one task at a time give the transaction up; an ended unit has nothing left to refuse."""
    guarded = _exclusive(method)

    @functools.wraps(method)
    def operation(self: ObservedSession, *args: Any, **kwargs: Any) -> Any:
        return (method if self.observer.closed else guarded)(self, *args, **kwargs)

    return operation


def _in_memory(method: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a change of the session while another task is at work on it, or after the unit's end."""
    name = method.__name__

    @functools.wraps(method)
    def operation(self: ObservedSession, *args: Any, **kwargs: Any) -> Any:
        observer = self.observer
        if observer.closed or observer.holder is not None:
            task = _current_task()
            if observer.closed or observer.holder is not task:
                observer.refuse(task, name)
        return method(self, *args, **kwargs)

    return operation


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread: a `def` route
        return None


def _name(task: asyncio.Task[Any] | None) -> str:
    return "code outside any task" if task is None else f"task {task.get_name()!r}"


def _exhausted(result: Result[Any]) -> bool:
    # Result.closed tells of an explicit close() alone; that all rows were read is known to this attribute only
    return bool(result._soft_closed) or result.closed  # noqa: SLF001  # see above


def _before_commit(session: ObservedSession) -> None:
    """Refuse a COMMIT that the database would silently turn into a rollback."""
    if session.in_nested_transaction():
        return
    observer = session.observer
    if observer.rolled_back:
        raise UnexpectedRollbackError("the database has rolled it back after a deadlock") from observer.failure
    if observer.failure is not None:
        for connection in observer.connections:
            try:
                connection.execute(text("SELECT 1"))  # refused where an error has aborted the transaction
            except Exception:
                reason = "a statement in it failed and the database gave the transaction up"
                raise UnexpectedRollbackError(reason) from observer.failure
        observer.failure = None
    observer.committing = True


def _after_commit(session: ObservedSession) -> None:
    observer = session.observer
    if session.in_nested_transaction():
        observer.released = True
    else:
        observer.committing = False
        observer.committed = True
