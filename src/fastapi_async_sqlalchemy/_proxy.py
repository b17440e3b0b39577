"""The `db` facade: what users hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias, overload

from sqlalchemy.ext.asyncio import AsyncSession
from starlette.requests import HTTPConnection  # noqa: TC002  # FastAPI reads dependency()'s annotations

from ._arguments.engines import async_engine
from ._session.checkout import pool_status
from ._tasks.fan_out import UnitTaskGroup, gather_in_units, open_connection, open_task_group
from ._tasks.opening import commit_position, connect, open_scope, session_of_request
from ._tasks.transactional import F, decorator
from ._unit.database import Database, S_co
from ._unit.place import Handle, current_variable
from ._unit.unit import UnitOfWork
from .exceptions import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextlib import AbstractAsyncContextManager
    from contextvars import ContextVar

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine

    from ._arguments.checks import IsolationLevel, Propagation
    from ._arguments.keywords import EngineArgs, SessionArgs
    from ._cluster.replica import WalPosition
    from ._dialects.begin import TransactionSettings
    from ._pool_status import PoolStatus
    from ._unit.place import Place


class _NoSignature:
    """Refuses the signature of a proxy, which a framework reads that injects arguments."""

    def __get__(self, proxy: object, kind: type) -> NoReturn:
        if proxy is None:
            raise AttributeError
        message = (
            "Depends(db) would make the arguments of db() a part of the request: "
            "write Depends(db.dependency), which gives the request's session."
        )
        raise ConfigurationError(message)


class SessionProxy(Handle[S_co]):
    """One database's ``db``: the current session and unit of work, and new units.

    Made with its middleware by ``create_middleware_and_session_proxy()`` and kept for the life of the
    process. It has no state of its own but the engine that was bound to it.
    """

    __slots__ = ()
    __signature__ = _NoSignature()

    @property
    def session(self) -> S_co:
        """The current unit's session, made on first use.

        Raises ``MissingSessionError`` outside a request and outside ``async with db():``,
        ``UnitClosedError`` in a task that outlived its unit, ``SessionNotInitialisedError`` before
        there is an engine.
        """
        unit = self._current_place()
        session = unit.opened
        return unit.session if session is None else session

    @property
    def unit(self) -> UnitOfWork[S_co]:
        """The current unit of work; raises as ``session`` does."""
        return self._current_place()._here()

    @property
    def engine(self) -> AsyncEngine:
        """The engine; ``SessionNotInitialisedError`` before there is one."""
        return self._database.engine

    def __call__(
        self,
        session_args: SessionArgs | None = None,
        commit_on_exit: bool = False,  # noqa: FBT001, FBT002  # the names and the order that users of 0.8 know
        *,
        propagation: Propagation = "requires_new",
        read_only: bool | None = None,
        isolation_level: IsolationLevel | None = None,
        deferrable: bool | None = None,
        multi_sessions: bool = False,
        max_concurrent: int | None = None,
        pool_timeout: float | None = None,
        wait_for: WalPosition | None = None,
        timeout: float | None = None,
        fallback: SessionProxy[AsyncSession] | None = None,
    ) -> AbstractAsyncContextManager[UnitOfWork[S_co], None]:
        """Return a unit of work for ``async with db() as unit:``, with a session of its own.

        Leaving the block commits under ``commit_on_exit=True``, else rolls back what was not
        committed, with a WARNING if something was written; an error that leaves the block rolls back.
        ``session_args`` are added to the database's own.

        ``propagation``, inside an open unit: ``requires_new`` is independent of it, ``required`` joins it,
        ``nested`` is a SAVEPOINT of it, ``never`` raises; outside all open one, but ``mandatory``, which
        raises. What was joined is its owner's to commit, but not after an error has left the block.

        ``read_only``, ``isolation_level`` and PostgreSQL's ``deferrable`` hold for all its transactions;
        ``pool_timeout`` is how many seconds it waits for a connection, at most the pool's own. Under
        ``multi_sessions=True`` each task that asks for ``db.session`` inside the block gets a unit of its
        own, settled when the task has ended, which the block's end waits for; ``max_concurrent`` of them
        have a connection at a time.

        ``wait_for`` is for a replica of PostgreSQL: the block is entered, with its connection checked out,
        when that has replayed a position of its primary. After ``timeout`` seconds, 1 by default, it is a
        ``ReplicaLagError``; or, if ``fallback`` is the primary's proxy, a read-only unit on the primary's
        engine, with a WARNING, also where the replica cannot be reached.

        Raises ``SessionNotInitialisedError`` before there is an engine, ``ConfigurationError`` for a wrong
        argument; on entry ``PropagationError``.
        """
        return open_scope(
            self,
            session_args,
            commit_on_exit,
            propagation=propagation,
            read_only=read_only,
            isolation_level=isolation_level,
            deferrable=deferrable,
            multi_sessions=multi_sessions,
            max_concurrent=max_concurrent,
            pool_timeout=pool_timeout,
            waiting=(wait_for, timeout, fallback),
        )

    async def commit_position(self) -> WalPosition:
        """Return how far the log of PostgreSQL's primary goes, for ``replica(wait_for=...)``.

        Everything that was committed before lies before it. Asked on the connection of the current unit's
        transaction, or on one from the pool. Raises ``TransactionBegunError`` in a unit whose writes are not
        committed yet, ``ConfigurationError`` on other databases and of a read-only pair.
        """
        return await commit_position(self)

    def connection(
        self, *, timeout: float | None = None, commit_on_exit: bool | None = None
    ) -> AbstractAsyncContextManager[S_co, None]:
        """Return a new unit's session for ``async with``, its connection checked out on entry.

        ``timeout`` is how many seconds to wait for it, at most the pool's own; then ``PoolTimeoutError``.
        ``commit_on_exit`` is the current unit's unless it is given.
        """
        return open_connection(self, timeout, commit_on_exit)

    def gather(
        self,
        *coroutines: Coroutine[Any, Any, Any],
        return_exceptions: bool = False,
        max_concurrent: int | None = None,
        commit_on_exit: bool | None = None,
        session_args: SessionArgs | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """Run each coroutine in a task and a unit of work of its own; returns their results in order.

        At most ``max_concurrent`` run at a time. Each commits or rolls back with its own outcome:
        ``commit_on_exit`` and ``session_args`` are the current unit's unless they are given. The first
        error cancels the others, waits until they are settled, and is raised; with
        ``return_exceptions=True`` errors are results. Like ``asyncio.gather()`` it returns a list, which
        type checkers see as a tuple.
        """
        return gather_in_units(
            self,
            coroutines,
            return_exceptions=return_exceptions,
            max_concurrent=max_concurrent,
            commit_on_exit=commit_on_exit,
            session_args=session_args,
        )

    def task_group(
        self,
        *,
        max_concurrent: int | None = None,
        commit_on_exit: bool | None = None,
        session_args: SessionArgs | None = None,
    ) -> UnitTaskGroup[S_co]:
        """Return a group of tasks, on ``asyncio.TaskGroup``, each in a unit of its own; else as ``gather()``.

        ``async with db.task_group() as tasks: tasks.create_task(work())``. Errors leave it in an
        ``ExceptionGroup``, when all tasks have ended and their units are settled.
        """
        return open_task_group(self, max_concurrent, commit_on_exit, session_args)

    @overload
    def transactional(self, function: F, /) -> F: ...

    @overload
    def transactional(
        self,
        function: None = None,
        /,
        *,
        propagation: Propagation = "required",
        read_only: bool | None = None,
        isolation_level: IsolationLevel | None = None,
        deferrable: bool | None = None,
        retries: int = 0,
    ) -> Callable[[F], F]: ...

    def transactional(
        self,
        function: F | None = None,
        /,
        *,
        propagation: Propagation = "required",
        read_only: bool | None = None,
        isolation_level: IsolationLevel | None = None,
        deferrable: bool | None = None,
        retries: int = 0,
    ) -> F | Callable[[F], F]:
        """Run a coroutine function in a unit of work, committed when it returns; a decorator.

        The other arguments are those of ``db(...)``. After a serialization failure or a deadlock
        the function is called again, in a new unit, up to ``retries`` times, with growing pauses; not when
        the outcome of COMMIT is unknown. That needs the extra ``[retries]``, and a unit of its own:
        inside one that would be joined it raises ``PropagationError``.

        Raises ``ConfigurationError`` for a wrong argument, and for what is no coroutine function.
        """
        decorate = decorator(
            self,
            propagation=propagation,
            read_only=read_only,
            isolation_level=isolation_level,
            deferrable=deferrable,
            retries=retries,
        )
        return decorate if function is None else decorate(function)

    async def dependency(self, connection: HTTPConnection) -> S_co:
        """Return the session of the request's unit, for ``Annotated[Session, Depends(db.dependency)]``.

        Where no middleware has bound a unit, FastAPI opens one around the endpoint: committed when that
        returns, before the response is sent, and rolled back when it raises. Raises
        ``MissingSessionError`` in a WebSocket, and on a FastAPI that has no dependencies of that scope.
        """
        return await session_of_request(self, connection)

    def pool_status(self) -> PoolStatus:
        """Return what the engine's pool says of itself now.

        Raises ``SessionNotInitialisedError`` before there is an engine.
        """
        return pool_status(self._database.engine.sync_engine.pool)

    def connect(
        self,
        url: str | URL | AsyncEngine,
        *,
        engine_args: EngineArgs | None = None,
        session_args: SessionArgs | None = None,
    ) -> AbstractAsyncContextManager[SessionProxy[S_co], None]:
        """Return ``async with db.connect(url):``, which serves units without an ASGI application.

        An engine made from a URL is disposed at the block's end; a given engine is only let go.
        Raises ``ConfigurationError`` at once, ``EngineAlreadyBoundError`` on entry.
        """
        return connect(self, self, url, engine_args, session_args)

    def bind(self, engine: AsyncEngine, *, session_args: SessionArgs | None = None) -> None:
        """Use a caller's engine, until ``unbind()``; it is never disposed here.

        Raises ``EngineAlreadyBoundError`` while another engine is in use.
        """
        self._database.bind(async_engine("engine", engine), session_args)

    def unbind(self) -> None:
        """Let go of an engine that ``bind()`` took; another one may be bound then."""
        self._database.unbind()

    if not TYPE_CHECKING:  # to type checkers there is no such attribute

        def __getattr__(self, name: str) -> NoReturn:
            """Raise the error that says where a session's or a unit's attribute is found."""
            message = f"'SessionProxy' object has no attribute {name!r}"
            for owner, kind in (("unit", UnitOfWork), ("session", AsyncSession)):
                if not name.startswith("_") and hasattr(kind, name):
                    message = f"{message}: write db.{owner}.{name}"
                    break
            raise AttributeError(message, name=name, obj=self)

    def __repr__(self) -> str:
        return f"<SessionProxy of {self._database.name}>"


DBSessionMeta: TypeAlias = SessionProxy
"""The name of release 0.8."""


def new_database(
    session_class: type[S_co] | None, settings: TransactionSettings
) -> tuple[Database[S_co], ContextVar[Place[S_co]], SessionProxy[S_co]]:
    """Make a database, the variable of its current unit, and its proxy."""
    database: Database[S_co] = Database(session_class, settings)
    current = current_variable(database)
    return database, current, SessionProxy(database, current, current.get)
