"""The `db` facade, the object that users hold."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias, overload

from starlette.requests import HTTPConnection  # noqa: TC002  # FastAPI evaluates dependency()'s annotations

from ._arguments.engines import async_engine
from ._session.checkout import pool_status
from ._tasks.fan_out import UnitTaskGroup, gather_in_units, open_connection, open_task_group
from ._tasks.health import ping
from ._tasks.opening import commit_position, connect, open_scope, session_of_request
from ._tasks.transactional import F, decorator
from ._telemetry.observer import observers_of
from ._unit.database import Database, S_co, default_session_class
from ._unit.holders import holders
from ._unit.observing import observe, on_open, request_here
from ._unit.place import Handle, NoSignature, current_variable
from ._unit.scope import UnitScope
from ._unit.unit import UnitOfWork

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable
    from contextlib import AbstractAsyncContextManager
    from contextvars import ContextVar

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

    from ._arguments.checks import Begin, IsolationLevel, Propagation
    from ._arguments.keywords import EngineArgs, SessionArgs
    from ._cluster.replica import WalPosition
    from ._dialects.begin import TransactionSettings
    from ._pool_status import PoolStatus
    from ._telemetry.observer import Observer
    from ._unit.place import Place


_NOTHING: Final = (None,) * 7
_NO_WAIT: Final = (None,) * 3


class SessionProxy(Handle[S_co]):
    """One database's ``db``: the current session and unit of work, and new units.

    ``create_middleware_and_session_proxy()`` creates it together with its middleware, for the life of the
    process. Its only state is the engine bound to it.
    """

    __slots__ = ()
    __signature__ = NoSignature()

    @property
    def session(self) -> S_co:
        """The current unit's session, created on first use.

        Raises ``MissingSessionError`` outside a request and outside ``async with db():``,
        ``UnitClosedError`` in a task that outlived its unit, and ``SessionNotInitialisedError`` before
        an engine is bound.
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
        """The engine; raises ``SessionNotInitialisedError`` before one is bound."""
        return self._database.engine

    def __call__(
        self,
        session_args: SessionArgs | None = None,
        commit_on_exit: bool = False,  # noqa: FBT001, FBT002  # the names and the order of release 0.8
        *,
        propagation: Propagation = "requires_new",
        read_only: bool | None = None,
        isolation_level: IsolationLevel | None = None,
        deferrable: bool | None = None,
        begin: Begin | None = None,
        multi_sessions: bool = False,
        max_concurrent: int | None = None,
        pool_timeout: float | None = None,
        wait_for: WalPosition | None = None,
        timeout: float | None = None,
        fallback: SessionProxy[AsyncSession] | None = None,
    ) -> AbstractAsyncContextManager[UnitOfWork[S_co], None]:
        """Return a unit of work with a separate session, for ``async with db() as unit:``.

        Leaving the block commits under ``commit_on_exit=True``. Otherwise uncommitted work is rolled back,
        with a WARNING if something was written. An error that leaves the block always rolls back.
        ``session_args`` are added to the database's own.

        ``propagation`` says how the block relates to an open unit. ``requires_new`` is independent of it,
        ``required`` joins it, ``nested`` is a SAVEPOINT of it, and ``never`` raises. Outside a unit,
        ``mandatory`` raises and all others open one. A joined unit is committed by its owner, but not after
        an error has left the block.

        ``read_only``, ``isolation_level`` and PostgreSQL's ``deferrable`` hold for all its transactions.
        Under PostgreSQL's ``begin="on_first_write"`` plain reads before the first other statement are sent
        without a transaction.
        ``pool_timeout`` is how many seconds it waits for a connection, at most the pool's own timeout. Under
        ``multi_sessions=True`` each task that asks for ``db.session`` inside the block gets a separate unit,
        which is settled when the task ends. The end of the block waits for these tasks. At most
        ``max_concurrent`` of their units hold a connection at a time.

        ``wait_for`` is for a replica of PostgreSQL. The block is entered, with its connection checked out,
        once the replica has replayed that position of its primary. After ``timeout`` seconds, 1 by default,
        entry raises ``ReplicaLagError``. If ``fallback`` is the primary's proxy, the block gets a
        read-only unit on the primary's engine instead, with a WARNING, also if the replica is unreachable.

        Raises ``SessionNotInitialisedError`` before an engine is bound, ``ConfigurationError`` for a wrong
        argument, and on entry ``PropagationError``.
        """
        given = session_args, read_only, isolation_level, deferrable, begin, max_concurrent, pool_timeout
        waiting = wait_for, timeout, fallback
        plain = given == _NOTHING and waiting == _NO_WAIT and propagation == "requires_new"
        # the usual call is written out, because passing all of it on costs more than the unit
        if plain and multi_sessions is False and (commit_on_exit is True or commit_on_exit is False):
            return UnitScope(self._database.configs[commit_on_exit], self._current)
        return open_scope(
            self,
            session_args,
            commit_on_exit,
            propagation=propagation,
            read_only=read_only,
            isolation_level=isolation_level,
            deferrable=deferrable,
            begin=begin,
            multi_sessions=multi_sessions,
            max_concurrent=max_concurrent,
            pool_timeout=pool_timeout,
            waiting=waiting,
        )

    async def commit_position(self) -> WalPosition:
        """Return the current position of PostgreSQL's primary in its log, for ``replica(wait_for=...)``.

        Everything committed before the call lies before that position. The query uses the connection of the
        current unit's transaction, or one from the pool. Raises ``TransactionBegunError`` in a unit with
        uncommitted writes, ``ConfigurationError`` on other databases and for a read-only pair.
        """
        return await commit_position(self)

    def connection(
        self, *, timeout: float | None = None, commit_on_exit: bool | None = None
    ) -> AbstractAsyncContextManager[S_co, None]:
        """Return a new unit's session for ``async with``, with its connection checked out on entry.

        ``timeout`` is how many seconds to wait for the connection, at most the pool's own timeout; then
        ``PoolTimeoutError`` is raised. ``commit_on_exit`` defaults to that of the current unit.
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
        """Run each coroutine in a separate task and unit of work, and return the results in order.

        At most ``max_concurrent`` run at a time. Each unit commits or rolls back by its own outcome.
        ``commit_on_exit`` and ``session_args`` default to those of the current unit. The first error cancels
        the other tasks, waits until their units are settled, and is raised. With ``return_exceptions=True``
        errors are returned as results. The result is a list, as with ``asyncio.gather()``, which type
        checkers see as a tuple.
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
        """Return a group of tasks, built on ``asyncio.TaskGroup``, each in a separate unit; see ``gather()``.

        ``async with db.task_group() as tasks: tasks.create_task(work())``. Errors leave the block in an
        ``ExceptionGroup``, once all tasks have ended and their units are settled.
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
        """Decorate a coroutine function to run in a unit of work that commits when it returns.

        The other arguments are those of ``db(...)``. After a serialization failure or a deadlock the function
        is called again in a new unit, up to ``retries`` times, with growing pauses. It is not called again
        when the outcome of COMMIT is unknown. Retries need the extra ``[retries]`` and a unit that the
        function does not share: where it would join one, the call raises ``PropagationError``.

        Raises ``ConfigurationError`` for a wrong argument, and if ``function`` is not a coroutine function.
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

        Where no middleware has bound a unit, FastAPI opens one around the endpoint. It is committed when the
        endpoint returns, before the response is sent, and rolled back when the endpoint raises. Raises
        ``MissingSessionError`` in a WebSocket, and with a FastAPI that has no function-scoped dependencies.
        """
        return await session_of_request(self, connection)

    def pool_status(self) -> PoolStatus:
        """Return the current state of the engine's pool.

        Raises ``SessionNotInitialisedError`` before an engine is bound.
        """
        return pool_status(self._database.engine.sync_engine.pool)

    async def ping(self, *, timeout: float = 5.0) -> None:  # noqa: ASYNC109  # for each of its two parts
        """Check a connection out and send a statement, to learn whether the database answers.

        It needs no unit and opens none. After ``timeout`` seconds it raises ``PoolTimeoutError`` if no
        connection came free, otherwise Python's ``TimeoutError``; other errors are the driver's.
        """
        await ping(self._database, timeout)

    def connect(
        self,
        url: str | URL | AsyncEngine,
        *,
        engine_args: EngineArgs | None = None,
        session_args: SessionArgs | None = None,
        begin: Begin | None = None,
        pool_warm_up: int | None = None,
        observers: Iterable[Observer] | None = None,
    ) -> AbstractAsyncContextManager[SessionProxy[S_co], None]:
        """Return ``async with db.connect(url):``, which serves units without an ASGI application.

        An engine made from a URL is disposed at the end of the block; a given engine is only released.
        ``begin`` is the default of its units. ``pool_warm_up`` connections are opened on entry. ``observers``
        are told what units do in the block. Raises ``ConfigurationError`` immediately,
        ``EngineAlreadyBoundError`` on entry.
        """
        return connect(
            self,
            self,
            url,
            engine_args,
            session_args,
            begin=begin,
            pool_warm_up=pool_warm_up,
            observers=observers_of(observers),
        )

    def on_open(self, callback: Callable[[UnitOfWork[S_co]], object]) -> None:
        """Call a plain function with each new unit when it makes its session, from now on.

        The function may register hooks, or add to ``unit.info``. An error in it reaches the code that asked
        for the session, and leaves the unit without one.
        """
        on_open(self._database, callback)

    def bind(self, engine: AsyncEngine, *, session_args: SessionArgs | None = None) -> None:
        """Use a caller's engine until ``unbind()``, which does not dispose it.

        Raises ``EngineAlreadyBoundError`` while another engine is in use.
        """
        self._database.bind(async_engine("engine", engine), session_args)

    def unbind(self) -> None:
        """Release the engine given to ``bind()``; another one may then be bound."""
        self._database.unbind()

    if not TYPE_CHECKING:  # type checkers should see no such attribute

        def __getattr__(self, name: str) -> NoReturn:
            """Raise an error that says where to find an attribute of a session or a unit."""
            message = f"'SessionProxy' object has no attribute {name!r}"
            declared = self._database._declared or default_session_class()
            for owner, kind in (("unit", UnitOfWork), ("session", declared)):
                if not name.startswith("_") and hasattr(kind, name):
                    message = f"{message}: write db.{owner}.{name}"
                    break
            raise AttributeError(message, name=name, obj=self)

    def __repr__(self) -> str:
        return f"<SessionProxy of {self._database.name}>"


DBSessionMeta: TypeAlias = SessionProxy
"""The name used in release 0.8."""


def new_database(
    session_class: type[S_co] | None,
    settings: TransactionSettings,
    observers: tuple[Observer, ...] = (),
) -> tuple[Database[S_co], ContextVar[Place[S_co]], SessionProxy[S_co]]:
    """Create a database, the variable of its current unit, and its proxy."""
    database: Database[S_co] = Database(session_class, settings)
    current = current_variable(database)
    database.shared.request = partial(request_here, current)
    database.shared.holders = partial(holders, database, current)
    if observers:
        observe(database, observers)
    return database, current, SessionProxy(database, current, current.get)
