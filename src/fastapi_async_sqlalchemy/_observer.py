"""What SQLAlchemy's events tell of the sessions of one database: their statements, errors and operations.

Sessions are observed by a subclass of their ``sync_session_class``, and engines by their dialect's
events: a listener of any other kind switches the whole engine to a slower path.
"""

from __future__ import annotations

import asyncio
import functools
from asyncio import current_task
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

from attrs import Factory, define
from sqlalchemy import event
from sqlalchemy.orm import Session

from ._session import ENDINGS, ObservedSession, Shared
from .exceptions import UnitClosedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection, Engine, ExceptionContext, ExecutionContext

_EXCLUSIVE: Final = (
    *("execute", "exec", "scalar", "scalars", "get", "get_one", "refresh", "merge", "merge_all", "delete"),
    *("delete_all", "commit", "prepare", "connection", "begin", "begin_nested", "release"),
    *("bulk_save_objects", "bulk_insert_mappings", "bulk_update_mappings"),
)
_CLEANUP: Final = ("rollback", "close", "reset", "invalidate")
_FLUSH: Final = ("flush",)
_IN_MEMORY: Final = ("add", "add_all")


@define(eq=False)
class Watch(Shared):
    """Tells the statements and errors of one database's connections to the sessions that send them."""

    operating: dict[asyncio.Task[Any] | None, ObservedSession] = Factory(
        dict["asyncio.Task[Any] | None", ObservedSession]
    )
    """The session in the middle of an operation, by task: a dialect's event names only a connection."""
    classes: dict[type[Session], type[ObservedSession]] = Factory(dict[type[Session], type[ObservedSession]])

    def session_class(self, base: type[Session]) -> type[ObservedSession]:
        """Return the observed subclass of a ``sync_session_class``."""
        if base not in self.classes:
            members = {"uow_shared": self, "__module__": base.__module__, "__doc__": base.__doc__}
            combined: Any = type(f"Observed{base.__name__}", (ObservedSession, base), members)
            guards = {
                _EXCLUSIVE: self._exclusive,
                _CLEANUP: self._cleanup,
                _FLUSH: self._flush,
                _IN_MEMORY: _in_memory,
            }
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
        may_stream = name == "execute"
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
                if session.uow_closed and name not in ENDINGS:
                    raise UnitClosedError(self.name)
                if may_stream and "stream_results" in (kwargs.get("execution_options") or ()):
                    session.uow_streams += (ref(result),)
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

    def _flush(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Guard the operation that nearly every other one begins with; there it costs nothing to speak of."""
        guarded = self._exclusive(method)

        @functools.wraps(method)
        def operation(session: ObservedSession, objects: Any = None) -> None:
            if session.uow_holder is None or session.uow_holder is not _current_task():
                guarded(session, objects)
            else:
                method(session, objects)

        return operation

    def _cleanup(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Let one task at a time give the transaction up; an ended unit has nothing left to refuse."""
        guarded = self._exclusive(method)

        @functools.wraps(method)
        def operation(session: ObservedSession, *args: Any, **kwargs: Any) -> Any:
            return (method if session.uow_closed else guarded)(session, *args, **kwargs)

        return operation

    def _session(self, connection: Connection) -> ObservedSession | None:
        session = self.operating.get(_current_task())
        if session is None and (used := self.connections.get(connection)) is not None:
            session = used()
        return session

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
