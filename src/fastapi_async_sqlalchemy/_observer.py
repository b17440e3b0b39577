"""What SQLAlchemy's events tell of the sessions of one database: their statements, errors and operations.

Sessions are observed by a subclass of their ``sync_session_class``, and engines by their dialect's
events: a listener of any other kind switches the whole engine to a slower path.
"""

from __future__ import annotations

import asyncio
import functools
from asyncio import current_task
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakSet, ref

from attrs import Factory, define
from sqlalchemy import event
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session
from sqlalchemy.pool import QueuePool
from sqlalchemy.util import EMPTY_DICT

from ._ending import let_go
from ._pool import pool_status, remedy_for
from ._session import ObservedSession
from ._session_state import ENDINGS, Shared, task_name
from ._statements import has_writing_part, verb_of
from ._streams import cursor_of, stream_of
from .exceptions import ConcurrentUseError, PoolTimeoutError, UnitClosedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection, Engine, ExceptionContext, ExecutionContext, Result
    from sqlalchemy.engine.interfaces import DBAPICursor

    from ._session_state import SessionState

_EXCLUSIVE: Final = (
    *("exec", "scalar", "scalars", "get", "get_one", "refresh", "merge", "merge_all", "delete"),
    *("delete_all", "commit", "uow_commit", "prepare", "connection", "begin", "begin_nested", "release"),
    *("bulk_save_objects", "bulk_insert_mappings", "bulk_update_mappings"),
)
_EXECUTE: Final = ("execute",)
_CLEANUP: Final = ("rollback", "uow_rollback", "close", "reset", "invalidate")
_GIVES_UP: Final = frozenset({*_CLEANUP, "release"})
"""The operations over which a stream may be left unread."""
_TRANSACTION_LOST: Final = frozenset({1020, 1206, 1213})
"""MariaDB's ER_CHECKREAD, ER_LOCK_TABLE_FULL and ER_LOCK_DEADLOCK: errors that undo the whole transaction."""
_LOCK_TIMEOUT: Final = (1205,)
_BEGUN: Final = "fastapi_async_sqlalchemy.begun"
"""Whether SQLite was in a transaction before the last statement other than a SELECT."""
_OWN_LOOP: Final = (
    "make a `def` route an `async def`, let it call coroutine functions by `anyio.from_thread.run(...)`, or "
    "give the other loop an engine of its own"
)
_FLUSH: Final = ("flush",)
_IN_MEMORY: Final = ("add", "add_all")


@define(eq=False, repr=False)
class Watch(Shared):
    """Tells the statements and errors of one database's connections to the sessions that send them."""

    operating: dict[asyncio.Task[Any] | None, ObservedSession] = Factory(
        dict["asyncio.Task[Any] | None", ObservedSession]
    )
    """The session in the middle of an operation, by task: a dialect's event names only a connection."""
    classes: dict[type[Session], type[ObservedSession]] = Factory(dict[type[Session], type[ObservedSession]])

    engines: WeakSet[Engine] = Factory(WeakSet["Engine"])
    unbuffered: bool = False
    """There are streams that another statement would cut short."""
    loop: asyncio.AbstractEventLoop | None = None
    """The event loop of asyncpg's pooled connections, which do not notice that another one breaks them."""

    def session_class(self, base: type[Session]) -> type[ObservedSession]:
        """Return the observed subclass of a ``sync_session_class``."""
        if base not in self.classes:
            members = {"uow_shared": self, "__module__": base.__module__, "__doc__": base.__doc__}
            combined: Any = type(f"Observed{base.__name__}", (ObservedSession, base), members)
            guards = {
                _EXECUTE: self._execute,
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
        self.engines.add(engine)
        event.listen(engine, "do_execute", self._do_execute)
        event.listen(engine, "do_executemany", self._do_execute)
        event.listen(engine, "do_execute_no_params", self._do_execute_no_params)
        event.listen(engine, "handle_error", self._handle_error)
        if engine.dialect.driver == "asyncpg" and isinstance(engine.pool, QueuePool):
            event.listen(engine, "connect", self._connected)

    def _connected(self, *_: object) -> None:
        self.loop = asyncio.get_running_loop()

    def _refuse_other_loop(self, task: asyncio.Task[Any], name: str) -> None:
        """Refuse the connections of a loop that runs in another thread; an emptied pool has none."""
        pools = (engine.pool for engine in self.engines)
        kept = any(
            isinstance(pool, QueuePool) and (pool.checkedin() or pool.checkedout() > 0) for pool in pools
        )
        if kept and self.loop is not None and self.loop.is_running():
            attempt, busy = f"{task_name(task)} called {name}()", "another running event loop has connections"
            raise ConcurrentUseError(self.name, attempt, busy, _OWN_LOOP)

    def xid(self) -> str:
        """Name the two-phase transaction that the session at work is beginning."""
        session = self.operating.get(_current_task())
        return "" if session is None else session.uow_xid

    def _exclusive(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Let one task at a time into an operation that waits for the database."""
        name = method.__name__.removeprefix("uow_")

        @functools.wraps(method)
        def operation(session: ObservedSession, *args: Any, **kwargs: Any) -> Any:
            task = _current_task()
            if (session.uow_holder is not None or session.uow_closed) and session.uow_reenter(task, name):
                return method(session, *args, **kwargs)
            outer = self._enter(session, task, name)
            try:
                if session.uow_checkout is not None:
                    session.uow_before_operation(name)
                result = method(session, *args, **kwargs)
            except BaseException as error:
                self._translate(session, error)
                raise
            finally:
                self._leave(session, task, outer)
            if session.uow_closed and name not in ENDINGS:
                raise UnitClosedError(self.name)
            return result

        return operation

    def _execute(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Guard the most frequent operation, the only one that may leave a stream unread.

        Its usual call is written out: to hand on ``*args, **kwargs`` costs more than the whole guard.
        """
        guarded = self._exclusive(method)

        @functools.wraps(method)
        def execute(
            session: ObservedSession,
            statement: Any,
            params: Any = None,
            *,
            execution_options: Any = EMPTY_DICT,
            bind_arguments: Any = None,
            **internal: Any,
        ) -> Any:
            if internal or session.uow_holder is not None or session.uow_closed:
                options = {"execution_options": execution_options, "bind_arguments": bind_arguments}
                return guarded(session, statement, params, **options, **internal)
            task = _current_task()
            outer = self._enter(session, task, "execute")
            try:
                if session.uow_checkout is not None:
                    session.uow_before_operation("execute")
                result = method(
                    session,
                    statement,
                    params,
                    execution_options=execution_options,
                    bind_arguments=bind_arguments,
                )
            except BaseException as error:
                self._translate(session, error)
                raise
            finally:
                self._leave(session, task, outer)
            if session.uow_closed:
                raise UnitClosedError(self.name)
            if execution_options and "stream_results" in execution_options:
                self._streams(session, result)
            return result

        return execute

    def _streams(self, session: ObservedSession, result: Result[Any]) -> None:
        """Remember that a result is still to be read, and whose error it is if that fails."""
        cursor = cursor_of(result)
        if cursor is not None:
            stream = stream_of(result, cursor)
            session.uow_streams += (stream,)
            self.connections[cursor.connection] = ref(session)
            self.unbuffered = self.unbuffered or stream.unbuffered

    def _enter(
        self, session: ObservedSession, task: asyncio.Task[Any] | None, name: str
    ) -> ObservedSession | None:
        """Begin an operation; returns the session whose operation this task is in the middle of already."""
        if self.loop is not None and task is not None and task.get_loop() is not self.loop:
            self._refuse_other_loop(task, name)
        if self.unbuffered and name not in _GIVES_UP:
            session.uow_refuse_between_rows(task, name)
        session.uow_holder = task
        session.uow_operation = name
        outer = self.operating.get(task)
        self.operating[task] = session
        return outer

    def _leave(
        self, session: ObservedSession, task: asyncio.Task[Any] | None, outer: ObservedSession | None
    ) -> None:
        if outer is None:
            del self.operating[task]
        else:
            self.operating[task] = outer
        if session.uow_closed or session.uow_waiter is not None:
            session.uow_left(task)
        else:
            session.uow_holder = None
        if session.uow_checkout is not None:
            session.uow_released()

    def _translate(self, session: ObservedSession, error: BaseException) -> None:
        """Raise this package's error in place of one that tells less."""
        let_go(error)
        if not isinstance(error, Exception):
            return
        if session.uow_closed:
            raise UnitClosedError(self.name) from error
        if isinstance(error, PoolTimeout):
            pools = [session.get_bind().engine.pool, *(engine.pool for engine in self.engines)]
            pool = next((pool for pool in pools if pool_status(pool).available == 0), pools[0])
            timeout = pool.timeout() if isinstance(pool, QueuePool) else 0.0
            remedy = remedy_for(session.uow_outer_holds)
            raise PoolTimeoutError(self.name, timeout, pool_status(pool), remedy) from error

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

    def _session(self, connection: Connection) -> SessionState | None:
        session: SessionState | None = self.operating.get(_current_task())
        if session is None and (used := self.connections.get(connection)) is not None:
            session = used()
        return session

    def _do_execute(
        self, cursor: DBAPICursor, statement: str, _values: object, context: ExecutionContext
    ) -> None:
        if not statement.startswith("SELECT"):
            session = self._session(context.root_connection)
            if session is not None:
                if context.dialect.name == "sqlite":
                    _before_on_sqlite(cursor, statement, context.root_connection)
                session.note_statement(statement)

    def _do_execute_no_params(self, cursor: DBAPICursor, statement: str, context: ExecutionContext) -> None:
        self._do_execute(cursor, statement, None, context)

    def _handle_error(self, context: ExceptionContext) -> None:
        session = None if context.connection is None else self._session(context.connection)
        if session is not None:
            session.note_error(context)
            session.uow_gone = session.uow_gone or _is_gone(context)


def _before_on_sqlite(cursor: DBAPICursor, statement: str, connection: Connection) -> None:
    """Begin the transaction that Python's driver puts off where it sees no write.

    Without one RELEASE would be a COMMIT, and what a ``WITH`` writes would be stored at once.
    """
    driver = connection.connection.driver_connection
    begun = driver is not None and driver.in_transaction
    if not begun and driver is not None:
        verb, autocommits = verb_of(statement), driver.isolation_level is None
        if verb == "SAVEPOINT" or (verb == "WITH" and not autocommits and has_writing_part(statement)):
            cursor.execute("BEGIN")
    connection.info[_BEGUN] = begun


def _is_gone(context: ExceptionContext) -> bool:
    """Whether a statement's error has rolled back its whole transaction, and the connection goes on."""
    connection, code = context.connection, context.original_exception.args[:1]
    if connection is None or connection.closed or connection.invalidated:
        return False
    if context.dialect.name == "sqlite":
        driver = connection.connection.driver_connection
        return connection.info.pop(_BEGUN, False) and driver is not None and not driver.in_transaction
    return not _TRANSACTION_LOST.isdisjoint(code) or (
        code == _LOCK_TIMEOUT and _timeout_rolls_back(connection)
    )


def _timeout_rolls_back(connection: Connection) -> bool:
    """Ask MariaDB what a lock that was waited for in vain undoes: the statement alone, or all."""
    cursor = connection.connection.cursor()
    try:
        cursor.execute("SELECT @@innodb_rollback_on_timeout")
        return bool(cursor.fetchall()[0][0])
    finally:
        cursor.close()


def _in_memory(method: Callable[..., Any]) -> Callable[..., Any]:
    """Refuse a change of the session while another task is at work on it, or after the unit's end."""
    name = method.__name__

    @functools.wraps(method)
    def operation(session: ObservedSession, *args: Any, **kwargs: Any) -> Any:
        if session.uow_closed or session.uow_holder is not None:
            session.uow_change(_current_task(), name)
        return method(session, *args, **kwargs)

    return operation


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return current_task()
    except RuntimeError:  # no loop runs in this thread: a `def` route
        return None
