"""The `db` facade: what users hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Self, overload

from attrs import define, evolve
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.requests import HTTPConnection  # noqa: TC002  # FastAPI reads dependency()'s annotations

from ._concurrency import Closing, Connection, UnitTaskGroup, children_of, close, coroutines_of, gather
from ._context import PropagatingScope, TaskUnitsScope, UnitScope, current_unit, open_unit, request_unit
from ._database import Database, S_co, Terms
from ._options import async_engine, boolean, count, create_engine, optional_count, propagation_of
from ._pool import limits_of, pool_status
from ._replica import ReplicaScope, replay, require_postgresql, written_position
from ._transaction import transaction_settings
from ._transactional import F, transactional
from .exceptions import ConfigurationError, TransactionBegunError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextlib import AbstractAsyncContextManager, AsyncExitStack
    from contextvars import ContextVar
    from types import TracebackType

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncSession

    from ._arguments import EngineArgs, SessionArgs
    from ._concurrency import Children
    from ._context import Current
    from ._options import IsolationLevel, Propagation
    from ._pool_status import PoolStatus
    from ._replica import WalPosition
    from ._transaction import TransactionSettings
    from ._unit import UnitOfWork


@define(eq=False, repr=False)
class Handle(Generic[S_co]):
    """What a proxy holds: its database, and where the current unit is found."""

    database: Database[S_co]
    current: ContextVar[Current[S_co]]
    current_unit: Callable[[], Current[S_co]]
    """The variable's ``get``."""

    def __deepcopy__(self, _: object) -> Self:
        """Return the one there is: what is copied with its proxy goes on using the same database."""
        return self


class SessionProxy(Handle[S_co]):
    """One database's ``db``: the current session and unit of work, and new units.

    Made with its middleware by ``create_middleware_and_session_proxy()`` and kept for the life of the
    process. It has no state of its own but the engine that was bound to it.
    """

    __slots__ = ()

    @property
    def session(self) -> S_co:
        """The current unit's session, made on first use.

        Raises ``MissingSessionError`` outside a request and outside ``async with db():``,
        ``UnitClosedError`` in a task that outlived its unit, ``SessionNotInitialisedError`` before
        there is an engine.
        """
        unit = self.current_unit()
        session = unit.opened
        return unit.session if session is None else session

    @property
    def unit(self) -> UnitOfWork[S_co]:
        """The current unit of work; raises as ``session`` does."""
        return self.current_unit().here()

    @property
    def engine(self) -> AsyncEngine:
        """The engine; ``SessionNotInitialisedError`` before there is one."""
        return self.database.engine

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
        if commit_on_exit is not False and commit_on_exit is not True:
            boolean("commit_on_exit", commit_on_exit)
        database, make, limits = self.database, None, None
        settings = database.settings
        if not (read_only is None and isolation_level is None and deferrable is None):
            settings = transaction_settings(read_only, isolation_level, deferrable, settings)
        if session_args is not None or settings is not database.settings:
            make = database.maker(session_args, settings)
        if pool_timeout is not None or max_concurrent is not None:
            limits = limits_of("pool_timeout", pool_timeout, max_concurrent)
        terms = database.terms[commit_on_exit]
        if make or limits:
            terms = Terms(database, settings, make, limits, commit_on_exit)
        new = UnitScope(terms, self.current)
        if multi_sessions is not False or max_concurrent is not None:
            return self._for_each_task(new, multi_sessions, propagation, (wait_for, timeout, fallback))
        if wait_for is not None or timeout is not None or fallback is not None:
            return self._on_replica(new, session_args, propagation, (wait_for, timeout, fallback))
        if propagation == "requires_new":
            return new
        return PropagatingScope(new, propagation_of(propagation), session_args is not None)

    @staticmethod
    def _for_each_task(
        new: UnitScope[S_co],
        multi_sessions: bool,  # noqa: FBT001  # still to be checked
        propagation: Propagation,
        waiting: tuple[object, ...],
    ) -> TaskUnitsScope[S_co]:
        if not boolean("multi_sessions", multi_sessions):
            message = "max_concurrent goes with multi_sessions=True: one session has one connection."
            raise ConfigurationError(message)
        if propagation_of(propagation) != "requires_new":
            message = f"multi_sessions=True opens units of its own: leave propagation={propagation!r} out."
            raise ConfigurationError(message)
        if any(one is not None for one in waiting):
            message = "wait_for, timeout and fallback are for one unit: leave multi_sessions=True out."
            raise ConfigurationError(message)
        return TaskUnitsScope(new)

    def _on_replica(
        self,
        new: UnitScope[S_co],
        session_args: SessionArgs | None,
        propagation: Propagation,
        waiting: tuple[object, object, object],
    ) -> ReplicaScope[S_co]:
        position, timeout, fallback = waiting
        if propagation_of(propagation) != "requires_new":
            message = f"wait_for opens a unit of its own: leave propagation={propagation!r} out."
            raise ConfigurationError(message)
        wait = replay(self.database.name, self.engine, position, timeout)
        primary = None
        if fallback is not None:
            if not isinstance(fallback, SessionProxy) or fallback.engine is self.engine:
                message = "fallback must be the primary's proxy, which has an engine of its own."
                raise ConfigurationError(message)
            require_postgresql("fallback", fallback.engine)
            settings = evolve(new.terms.settings, read_only=True)
            make = self.database.maker(session_args, settings, fallback.engine)
            primary = UnitScope(Terms(self.database, settings, make, new.terms.limits), self.current)
        return ReplicaScope(new, wait, primary)

    async def commit_position(self) -> WalPosition:
        """Return how far the log of PostgreSQL's primary goes, for ``replica(wait_for=...)``.

        Everything that was committed before lies before it. Asked on the connection of the current unit's
        transaction, or on one from the pool. Raises ``TransactionBegunError`` in a unit whose writes are not
        committed yet, ``ConfigurationError`` on other databases and of a read-only pair.
        """
        require_postgresql("commit_position()", self.engine)
        if self.database.settings.read_only:
            message = f"commit_position() is for the primary's proxy, and {self.database.name} only reads."
            raise ConfigurationError(message)
        unit = open_unit(self.current)
        if unit is not None and unit.watched is not None and unit.watched.in_transaction():
            if unit.watched.has_written():
                remedy = (
                    "call commit_position() when `await db.unit.commit()` has given its writes a position"
                )
                raise TransactionBegunError(self.database.name, remedy)
            return await written_position(unit.session)
        async with self.connection(commit_on_exit=False) as session:
            return await written_position(session)

    def connection(
        self, *, timeout: float | None = None, commit_on_exit: bool | None = None
    ) -> AbstractAsyncContextManager[S_co, None]:
        """Return a new unit's session for ``async with``, its connection checked out on entry.

        ``timeout`` is how many seconds to wait for it, at most the pool's own; then ``PoolTimeoutError``.
        ``commit_on_exit`` is the current unit's unless it is given.
        """
        children = self._children(commit_on_exit, None)
        limits = limits_of("timeout", timeout, None, children.terms.limits)
        return Connection(UnitScope(evolve(children.terms, limits=limits), self.current))

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
        found = coroutines_of(coroutines)
        try:
            places = optional_count("max_concurrent", max_concurrent)
            boolean("return_exceptions", return_exceptions)
            children = self._children(commit_on_exit, session_args)
        except BaseException:
            close(found)
            raise
        running = gather(children, found, places, return_exceptions=return_exceptions)
        return Closing(running, found)

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
        places = optional_count("max_concurrent", max_concurrent)
        self._children(commit_on_exit, session_args)  # refuses what is wrong now
        return UnitTaskGroup(lambda: self._children(commit_on_exit, session_args), places)

    def _children(
        self,
        commit_on_exit: bool | None,  # noqa: FBT001  # three values
        session_args: SessionArgs | None,
    ) -> Children[S_co]:
        return children_of(self.database, self.current, commit_on_exit, session_args)

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
        propagation = propagation_of(propagation)
        settings = transaction_settings(read_only, isolation_level, deferrable, self.database.settings)
        if count("retries", retries, 0) and propagation in {"mandatory", "nested"}:
            message = f"retries need a unit of their own: propagation={propagation!r} joins another one."
            raise ConfigurationError(message)

        def scope() -> PropagatingScope[S_co]:
            terms = self.database.terms[True]
            if settings is not terms.settings:
                make = self.database.maker(None, settings)
                terms = Terms(self.database, settings, make, commit_on_exit=True)
            return PropagatingScope(UnitScope(terms, self.current), propagation, has_session_args=False)

        def decorate(function: F) -> F:
            return transactional(function, scope, lambda: scope().joins() is None, retries)

        return decorate if function is None else decorate(function)

    async def dependency(self, connection: HTTPConnection) -> S_co:
        """Return the session of the request's unit, for ``Annotated[Session, Depends(db.dependency)]``.

        Where no middleware has bound a unit, FastAPI opens one around the endpoint: committed when that
        returns, before the response is sent, and rolled back when it raises. Raises
        ``MissingSessionError`` in a WebSocket, and on a FastAPI that has no dependencies of that scope.
        """
        unit = request_unit(self.current, connection.scope)
        if unit is not None:
            return unit.session
        stack: AsyncExitStack | None = connection.scope.get("fastapi_function_astack")
        if stack is None or connection.scope["type"] != "http":
            return self.session
        opened = await stack.enter_async_context(self(commit_on_exit=True))
        opened.request = connection.scope
        return opened.session

    def pool_status(self) -> PoolStatus:
        """Return what the engine's pool says of itself now.

        Raises ``SessionNotInitialisedError`` before there is an engine.
        """
        return pool_status(self.database.engine.sync_engine.pool)

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
        if isinstance(url, AsyncEngine):
            if engine_args is not None:
                message = "engine_args go with a URL: an engine has its own already."
                raise ConfigurationError(message)
            engine = url
        else:
            engine = create_engine("url", url, engine_args)
        self.database.check(engine, session_args)
        return Connected(self, self.database, engine, session_args, owned=engine is not url)

    def bind(self, engine: AsyncEngine, *, session_args: SessionArgs | None = None) -> None:
        """Use a caller's engine, until ``unbind()``; it is never disposed here.

        Raises ``EngineAlreadyBoundError`` while another engine is in use.
        """
        self.database.bind(async_engine("engine", engine), session_args)

    def unbind(self) -> None:
        """Let go of an engine that ``bind()`` took; another one may be bound then."""
        self.database.unbind()

    def __repr__(self) -> str:
        return f"<SessionProxy of {self.database.name}>"


@define(eq=False, repr=False)
class Connected(Generic[S_co]):
    """What ``db.connect(...)`` returns: an async context manager around the engine's use."""

    proxy: SessionProxy[S_co]
    database: Database[S_co]
    engine: AsyncEngine
    session_args: SessionArgs | None
    owned: bool

    async def __aenter__(self) -> SessionProxy[S_co]:
        self.database.bind(self.engine, self.session_args)
        return self.proxy

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.database.release(self.engine, owned=self.owned)
        finally:
            self.database.unbind()


def new_database(
    session_class: type[S_co] | None, settings: TransactionSettings
) -> tuple[Database[S_co], ContextVar[Current[S_co]], SessionProxy[S_co]]:
    """Make a database, the variable of its current unit, and its proxy."""
    database: Database[S_co] = Database(session_class, settings)
    current = current_unit(database)
    return database, current, SessionProxy(database, current, current.get)
