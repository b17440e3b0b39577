"""The `db` facade, the object that users hold."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NoReturn, TypeAlias, cast

from starlette.requests import HTTPConnection  # noqa: TC002  # FastAPI evaluates dependency()'s annotations

from ._arguments.engines import async_engine
from ._session.checkout import pool_status
from ._tasks.blocks import Blocks
from ._tasks.health import ping
from ._tasks.opening import commit_position, connect, open_after, unit_of_request
from ._tasks.tables import create_all, drop_all
from ._telemetry.observer import observers_of
from ._unit.database import Database, S_co, default_session_class
from ._unit.holders import holders
from ._unit.observing import observe, on_open, request_here
from ._unit.place import NoSignature, current_variable
from ._unit.unit import UnitOfWork

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from contextlib import AbstractAsyncContextManager
    from contextvars import ContextVar

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
    from sqlalchemy.sql.schema import MetaData

    from ._arguments.checks import Begin, IsolationLevel
    from ._arguments.keywords import EngineArgs, SessionArgs
    from ._cluster.replica import WalPosition
    from ._dialects.begin import TransactionSettings
    from ._pool_status import PoolStatus
    from ._telemetry.observer import Observer
    from ._unit.place import Place


class SessionProxy(Blocks[S_co]):
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

    def after(
        self,
        position: WalPosition,
        *,
        timeout: float = 1.0,
        fallback: SessionProxy[AsyncSession] | None = None,
        session_args: SessionArgs | None = None,
        isolation_level: IsolationLevel | None = None,
        pool_timeout: float | None = None,
    ) -> AbstractAsyncContextManager[UnitOfWork[S_co], None]:
        """Return a unit on a replica of PostgreSQL that sees all that was committed before a position.

        The block is entered, with its connection checked out, once the replica has replayed the position of
        its primary. After ``timeout`` seconds entry raises ``ReplicaLagError``. If ``fallback`` is the
        primary's proxy, the block gets a read-only unit on the primary's engine instead, with a WARNING,
        also if the replica is unreachable. The other arguments are those of ``db(...)``.
        """
        return open_after(
            self,
            position,
            timeout,
            fallback,
            session_args=session_args,
            isolation_level=isolation_level,
            pool_timeout=pool_timeout,
        )

    async def commit_position(self) -> WalPosition:
        """Return the current position of PostgreSQL's primary in its log, for ``replica.after(...)``.

        Everything committed before the call lies before that position. The query uses the connection of the
        current unit's transaction, or one from the pool. Raises ``TransactionBegunError`` in a unit with
        uncommitted writes, ``ConfigurationError`` on other databases and for a read-only pair.
        """
        return await commit_position(self)

    async def dependency(
        self,
        connection: HTTPConnection = cast("HTTPConnection", None),  # noqa: B008  # FastAPI knows no other type
    ) -> S_co:
        """Return the session of the request's unit, for ``Annotated[Session, Depends(db.dependency)]``.

        Where no middleware has bound a unit, FastAPI opens one around the endpoint. It is committed when the
        endpoint returns, before the response is sent, and rolled back when the endpoint raises. Where another
        container than FastAPI's calls it, in a worker, it returns the session of the current unit. Raises
        ``MissingSessionError`` in a WebSocket, and with a FastAPI that has no function-scoped dependencies.
        """
        return (await unit_of_request(self, connection)).session

    async def unit_dependency(
        self,
        connection: HTTPConnection = cast("HTTPConnection", None),  # noqa: B008  # as above
    ) -> UnitOfWork[S_co]:
        """Return the request's unit, for ``Annotated[UnitOfWork[S], Depends(db.unit_dependency)]``.

        Otherwise as ``dependency()``, with which it shares the unit.
        """
        return await unit_of_request(self, connection)

    async def create_all(self, metadata: MetaData) -> None:
        """Create the tables of ``Base.metadata`` that are not there yet, in a unit that commits.

        Migrations are better for anything that lives longer than a demo or a test.
        """
        await create_all(self, metadata)

    async def drop_all(self, metadata: MetaData) -> None:
        """Drop the tables of ``Base.metadata`` that are there, in a unit that commits."""
        await drop_all(self, metadata)

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
        commit_on_exit: bool | None = None,
        begin: Begin | None = None,
        pool_warm_up: int | None = None,
        observers: Iterable[Observer] | None = None,
    ) -> AbstractAsyncContextManager[SessionProxy[S_co], None]:
        """Return ``async with db.connect(url):``, which serves units without an ASGI application.

        An engine made from a URL is disposed at the end of the block; a given engine is only released.
        ``commit_on_exit`` is the default of the blocks inside; without it, that of the pair holds.
        ``begin`` is the default of its units. ``pool_warm_up`` connections are opened on entry. ``observers``
        are notified of what units do in the block. Raises ``ConfigurationError`` immediately,
        ``EngineAlreadyBoundError`` on entry.
        """
        return connect(
            self,
            self,
            url,
            engine_args,
            session_args,
            commit_on_exit=commit_on_exit,
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

        Each call needs its own ``unbind()``. Raises ``EngineAlreadyBoundError`` while another engine is in
        use.
        """
        self._database.bind(async_engine("engine", engine), session_args)

    def unbind(self) -> None:
        """End the last ``bind()``; another engine may be bound once nobody uses this one.

        The use of an application that has not started ends, too.
        """
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
    *,
    commit_on_exit: bool = False,
    waits: bool = False,
    observers: tuple[Observer, ...] = (),
) -> tuple[Database[S_co], ContextVar[Place[S_co]], SessionProxy[S_co]]:
    """Create a database, the variable of its current unit, and its proxy."""
    database: Database[S_co] = Database(session_class, settings, commit_on_exit, waits)
    current = current_variable(database)
    database.shared.request = partial(request_here, current)
    database.shared.holders = partial(holders, database, current)
    if observers:
        observe(database, observers)
    return database, current, SessionProxy(database, current, current.get)
