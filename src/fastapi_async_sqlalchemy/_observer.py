"""What SQLAlchemy tells of a session: has it written, is it busy, did its transaction commit.

A session is observed by a subclass of its ``sync_session_class``, made once per database, and by
public events. What is on the way of every statement is kept to the bone: of the engine's events only
the dialect's are used, because a listener of any other kind switches the whole engine to a slower path,
and the session's own events are attached to the few sessions that need them.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import warnings
from asyncio import current_task
from typing import TYPE_CHECKING, Any, ClassVar, Final
from weakref import WeakKeyDictionary, ref

from attrs import Factory, define
from sqlalchemy import event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session, SessionTransactionOrigin
from sqlalchemy.sql import text

from .exceptions import ConcurrentUseError, UnexpectedRollbackError, UnitClosedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection, Engine, ExceptionContext, ExecutionContext, Result
    from sqlalchemy.orm import SessionTransaction

logger = logging.getLogger("fastapi_async_sqlalchemy")

_WRITING_CTE: Final = re.compile(r"\b(?:INSERT|UPDATE|DELETE|MERGE)\b", re.IGNORECASE)
_VERB: Final = re.compile(r"(?:\s|\(|--[^\n]*\n|/\*.*?\*/)*(\w+)", re.DOTALL)
_READS: Final = frozenset(
    {"SELECT", "SHOW", "EXPLAIN", "DESCRIBE", "PRAGMA", "VALUES", "TABLE", "SET", "BEGIN", "RELEASE"}
)
_DEADLOCK: Final = 1213
"""MySQL's and MariaDB's ER_LOCK_DEADLOCK: the statement error after which the transaction is gone."""


class ObservedSession(Session):
    """A session that serves one task at a time, and none after its unit's end.

    Its operations are overridden rather than watched: SQLAlchemy has no event for the beginning and the
    end of each, and a refusal must come before the session's own state changes. What is known of the
    session lies in class attributes until it changes, so that making one costs nothing more.
    """

    uow_watch: ClassVar[Watch]
    uow_closed: bool = False
    """The unit has ended: nothing may begin again."""
    uow_holder: asyncio.Task[Any] | None = None
    """The task that is in the middle of an operation, and that operation's name."""
    uow_operation: str = ""
    uow_written: int = 0
    """Statements other than reads since the last commit."""
    uow_failure: BaseException | None = None
    """A statement's error in the transaction at hand, not undone by a savepoint."""
    uow_gone: bool = False
    """The database has rolled the transaction back by itself."""
    uow_committing: bool = False
    uow_committed: bool = False
    """A transaction or savepoint has just committed and is about to end."""
    uow_unknown: bool = False
    """The connection broke, or the task was cancelled, while COMMIT was under way."""
    uow_savepoints: tuple[tuple[str, int, BaseException | None], ...] = ()
    uow_streams: tuple[ref[Result[Any]], ...] = ()
    uow_settled: Callable[[SessionTransaction, bool | None], None] | None = None
    """Called after a transaction or savepoint: True for committed, False for rolled back, None unknown."""
    uow_waiter: asyncio.Future[None] | None = None
    uow_followed: bool = False

    def commit(self) -> None:
        """Commit, unless the database would silently make a rollback of it."""
        if self.uow_failure is not None:
            _refuse_silent_rollback(self)
        self.uow_committing = True
        try:
            super().commit()
        finally:
            self.uow_committing = False
        self.uow_forget()

    def rollback(self) -> None:
        """Roll back."""
        super().rollback()
        self.uow_forget()

    def close(self) -> None:
        """Close for good once the unit has ended; before that, begin afresh, as is SQLAlchemy's default."""
        if self.uow_closed:
            super().close()
        else:
            super().reset()
            self.uow_forget()

    def begin(self, nested: bool = False) -> SessionTransaction:  # noqa: FBT001, FBT002  # SQLAlchemy's signature
        """Begin a transaction that the caller ends; SQLAlchemy does so without calling this session."""
        self.uow_follow()
        return super().begin(nested)

    def release(self) -> None:
        """Give the connection of a transaction that only read back; the objects stay as they are.

        Unlike ``rollback()`` this expires nothing, and it is no outcome to the hooks.
        """
        transaction = self.get_transaction()
        settled, self.uow_settled = self.uow_settled, None
        try:
            if transaction is not None:
                transaction.close()
        finally:
            self.uow_settled = settled
            self.uow_forget()

    def end(self) -> None:
        """Close for good; sends nothing where no transaction is open."""
        self.uow_closed = True
        Session.close(self)

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
        return len(self.new) + len(self.dirty) + len(self.deleted)

    def has_written(self) -> bool:
        """Whether the transaction at hand has sent a statement that writes, or has objects to flush."""
        return bool(self.uow_written or self.pending())

    def held_by_owner(self) -> bool:
        """Whether user code holds the transaction: ``begin()``, a savepoint, a stream, a busy task."""
        transaction = self.get_transaction()
        if transaction is not None and transaction.origin is SessionTransactionOrigin.BEGIN:
            return True
        return self.streaming() or self.in_nested_transaction() or self.busy()

    def streaming(self) -> bool:
        """Whether a result of ``stream()`` or ``stream_scalars()`` is unread and somebody still has it."""
        if self.uow_streams:
            self.uow_streams = tuple(stream for stream in self.uow_streams if _unread(stream()))
        return bool(self.uow_streams)

    def close_streams(self) -> None:
        """Close the results that nobody has read to the end: some drivers will not commit over them."""
        streams, self.uow_streams = self.uow_streams, ()
        for stream in streams:
            result = stream()
            if result is not None:
                result.close()

    def uow_follow(self) -> None:
        """Attach SQLAlchemy's events, for what its transactions do without calling this session."""
        if not self.uow_followed:
            self.uow_followed = True
            event.listen(self, "after_begin", _after_begin)
            event.listen(self, "before_commit", _before_commit)
            event.listen(self, "after_commit", _after_commit)
            event.listen(self, "after_transaction_end", _after_transaction_end)

    def uow_forget(self) -> None:
        """Begin counting anew after a transaction."""
        self.uow_written = 0
        if self.uow_failure is not None or self.uow_savepoints or self.uow_unknown:
            self.uow_failure = None
            self.uow_gone = self.uow_unknown = self.uow_committing = False
            self.uow_savepoints = ()

    def note_statement(self, statement: str) -> None:
        """Count a statement that is about to be sent, unless it only reads."""
        found = _VERB.match(statement)
        verb = found[1].upper() if found else ""
        if verb in _READS:
            return
        if verb == "SAVEPOINT":
            self.uow_savepoints += ((statement.rsplit(maxsplit=1)[-1], self.uow_written, self.uow_failure),)
        elif verb == "ROLLBACK":  # TO SAVEPOINT: what came after the savepoint counts no more
            for at, (name, written, failure) in enumerate(self.uow_savepoints):
                if statement.endswith(name):
                    self.uow_savepoints = self.uow_savepoints[: at + 1]
                    self.uow_written, self.uow_failure = written, failure
                    return
        elif verb != "WITH" or _WRITING_CTE.search(statement):
            self.uow_written += 1

    def note_error(self, context: ExceptionContext) -> None:
        """Remember a statement's error, or that COMMIT was cut short."""
        committing, self.uow_committing = self.uow_committing, False
        if context.statement is not None:
            self.uow_failure = context.sqlalchemy_exception or context.original_exception
            self.uow_gone = self.uow_gone or _DEADLOCK in context.original_exception.args[:1]
        elif committing and context.is_disconnect:
            self.uow_unknown = True
            logger.error(
                "COMMIT on %s was interrupted (%s): its outcome is unknown, no hook runs and the connection "
                "is discarded; look the data up before repeating the work.",
                self.uow_watch.name,
                type(context.original_exception).__name__,
            )

    def uow_reenter(self, task: asyncio.Task[Any] | None, operation: str) -> bool:
        """Let an operation call another of the same task, and refuse anything else."""
        if self.uow_closed:
            raise UnitClosedError(self.uow_watch.name)
        if self.uow_holder is not None and self.uow_holder is not task:
            raise ConcurrentUseError(_name(self.uow_holder), self.uow_operation, _name(task), operation)
        return True

    def uow_left(self, task: asyncio.Task[Any] | None) -> None:
        """End an operation that somebody waits for, or that its unit did not wait for."""
        if self.uow_closed and self.in_transaction():
            Session.close(self)  # the unit has ended meanwhile, and left the rest to this task
        if self.uow_holder is task:
            self.uow_holder = None
        if self.uow_waiter is not None:
            self.uow_waiter.set_result(None)
            self.uow_waiter = None

    def __del__(self) -> None:
        if not self.uow_closed and hasattr(self, "hash_key") and self.in_transaction():
            warnings.warn(
                f"A session of {self.uow_watch.name} was garbage-collected with its transaction open: "
                "leave the unit of work, `async with db():`, before dropping it.",
                ResourceWarning,
                stacklevel=2,
                source=self,
            )


_EXCLUSIVE: Final = (
    *("execute", "exec", "scalar", "scalars", "get", "get_one", "refresh", "merge", "merge_all", "delete"),
    *("delete_all", "flush", "commit", "prepare", "connection", "begin", "begin_nested", "release"),
    *("bulk_save_objects", "bulk_insert_mappings", "bulk_update_mappings"),
)
_CLEANUP: Final = ("rollback", "close", "reset", "invalidate")
_IN_MEMORY: Final = ("add", "add_all")


@define(eq=False)
class Watch:
    """Tells the statements and errors of one database's connections to the sessions that send them."""

    name: str
    """The database, as messages name it."""
    operating: dict[asyncio.Task[Any] | None, ObservedSession] = Factory(
        dict["asyncio.Task[Any] | None", ObservedSession]
    )
    """The session in the middle of an operation, by task: a dialect's event names only a connection."""
    connections: WeakKeyDictionary[Connection, ObservedSession] = Factory(
        WeakKeyDictionary["Connection", ObservedSession]
    )
    """Connections that are used without calling their session."""
    classes: dict[type[Session], type[ObservedSession]] = Factory(dict[type[Session], type[ObservedSession]])

    def session_class(self, base: type[Session]) -> type[ObservedSession]:
        """Return the observed subclass of a ``sync_session_class``."""
        if base not in self.classes:
            members = {"uow_watch": self, "__module__": base.__module__, "__doc__": base.__doc__}
            combined: Any = type(f"Observed{base.__name__}", (ObservedSession, base), members)
            guards = {_EXCLUSIVE: self._exclusive, _CLEANUP: self._cleanup, _IN_MEMORY: _in_memory}
            for names, guard in guards.items():
                for name in names:
                    if hasattr(combined, name):
                        setattr(combined, name, guard(getattr(combined, name)))
            self.classes[base] = combined
        return self.classes[base]

    def listen(self, engine: Engine) -> None:
        """Listen to an engine; doing so twice is once to SQLAlchemy."""
        event.listen(engine, "do_execute", self._do_execute)
        event.listen(engine, "do_executemany", self._do_execute)
        event.listen(engine, "do_execute_no_params", self._do_execute_no_params)
        event.listen(engine, "handle_error", self._handle_error)

    def _exclusive(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Let one task at a time into an operation that waits for the database."""
        name = method.__name__
        operating = self.operating

        @functools.wraps(method)
        def operation(session: ObservedSession, *args: Any, **kwargs: Any) -> Any:
            task = _current_task()
            if (session.uow_holder is not None or session.uow_closed) and session.uow_reenter(task, name):
                return method(session, *args, **kwargs)
            session.uow_holder = task
            session.uow_operation = name
            outer = operating.get(task)
            operating[task] = session
            try:
                result = method(session, *args, **kwargs)
            except Exception as error:
                if session.uow_closed:
                    raise UnitClosedError(self.name) from error
                raise
            else:
                if "execution_options" in kwargs:
                    self._note_result(session, name, result, kwargs["execution_options"])
                return result
            finally:
                if outer is None:
                    operating.pop(task, None)
                else:
                    operating[task] = outer
                if session.uow_closed or session.uow_waiter is not None:
                    session.uow_left(task)
                else:
                    session.uow_holder = None

        return operation

    def _note_result(self, session: ObservedSession, operation: str, result: Any, options: Any) -> None:
        """Remember a connection that was handed out, and a result that is still being read."""
        if operation == "connection":
            self.connections[result] = session
        elif options and options.get("stream_results"):
            session.uow_streams += (ref(result),)

    def _cleanup(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Let one task at a time give the transaction up; an ended unit has nothing left to refuse."""
        guarded = self._exclusive(method)

        @functools.wraps(method)
        def operation(session: ObservedSession, *args: Any, **kwargs: Any) -> Any:
            return (method if session.uow_closed else guarded)(session, *args, **kwargs)

        return operation

    def _session(self, connection: Connection) -> ObservedSession | None:
        return self.operating.get(_current_task()) or self.connections.get(connection)

    def _do_execute(
        self, _cursor: object, statement: str, _values: object, context: ExecutionContext
    ) -> None:
        if not statement.startswith("SELECT"):
            session = self._session(context.root_connection)
            if session is not None:
                session.note_statement(statement)

    def _do_execute_no_params(self, cursor: object, statement: str, context: ExecutionContext) -> None:
        self._do_execute(cursor, statement, None, context)

    def _handle_error(self, context: ExceptionContext) -> None:
        session = None if context.connection is None else self._session(context.connection)
        if session is not None:
            session.note_error(context)


def _in_memory(method: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a change of the session while another task is at work on it, or after the unit's end."""
    name = method.__name__

    @functools.wraps(method)
    def operation(session: ObservedSession, *args: Any, **kwargs: Any) -> Any:
        if session.uow_closed or session.uow_holder is not None:
            session.uow_reenter(_current_task(), name)
        return method(session, *args, **kwargs)

    return operation


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return current_task()
    except RuntimeError:  # no loop runs in this thread: a `def` route
        return None


def _name(task: asyncio.Task[Any] | None) -> str:
    return "code outside any task" if task is None else f"task {task.get_name()!r}"


def _unread(result: Result[Any] | None) -> bool:
    # Result.closed tells of an explicit close() alone; no public name tells that all rows were read
    return not (result is None or result.closed or result._soft_closed)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]  # see above


def _refuse_silent_rollback(session: ObservedSession) -> None:
    """Raise if the transaction is lost; some databases answer COMMIT with a rollback and no error."""
    failure, reason = session.uow_failure, "the database has rolled it back after a deadlock"
    if not session.uow_gone:
        try:
            session.connection().execute(text("SELECT 1"))  # refused where an error aborts the transaction
        except SQLAlchemyError:
            reason = "a statement in it failed and the database has given the transaction up"
        else:
            session.uow_failure = None
            return
    raise UnexpectedRollbackError(reason) from failure


def _after_begin(session: ObservedSession, _: SessionTransaction, connection: Connection) -> None:
    session.uow_watch.connections[connection] = session


def _before_commit(session: ObservedSession) -> None:
    if not session.in_nested_transaction():
        if session.uow_failure is not None:
            _refuse_silent_rollback(session)
        session.uow_committing = True


def _after_commit(session: ObservedSession) -> None:
    session.uow_committed = True


def _after_transaction_end(session: ObservedSession, transaction: SessionTransaction) -> None:
    root = transaction.parent is None
    if root or transaction.nested:
        outcome = None if root and session.uow_unknown else session.uow_committed
        session.uow_committed = False
        if root:
            session.uow_forget()
        if session.uow_settled is not None:
            session.uow_settled(transaction, outcome)
