"""The `db` facade: what users hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic

from attrs import define
from sqlalchemy.ext.asyncio import AsyncEngine

from ._context import NoUnit, UnitScope, current_unit
from ._database import Database, S_co
from ._options import async_engine, boolean, create_engine
from .exceptions import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager
    from contextvars import ContextVar
    from types import TracebackType

    from sqlalchemy.engine import URL

    from ._options import EngineArgs, SessionArgs
    from ._unit import UnitOfWork


@define(eq=False, repr=False)
class Handle(Generic[S_co]):
    """What a proxy holds: its database, and where the current unit is found."""

    database: Database[S_co]
    current: ContextVar[UnitOfWork[S_co] | NoUnit]
    current_unit: Callable[[], UnitOfWork[S_co] | NoUnit]
    """The variable's ``get``."""


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
        unit = self.current_unit()
        if isinstance(unit, NoUnit):
            return unit.session
        return unit

    @property
    def engine(self) -> AsyncEngine:
        """The engine; ``SessionNotInitialisedError`` before there is one."""
        return self.database.engine

    def __call__(
        self,
        session_args: SessionArgs | None = None,
        commit_on_exit: bool = False,  # noqa: FBT001, FBT002  # the names and the order that users of 0.8 know
    ) -> AbstractAsyncContextManager[UnitOfWork[S_co], None]:
        """Return a new unit of work for ``async with db() as unit:``, with a session of its own.

        Leaving the block commits under ``commit_on_exit=True``, else rolls back what was not
        committed, with a WARNING if something was written; an error that leaves the block rolls back.
        ``session_args`` are added to the database's own.

        Raises ``SessionNotInitialisedError`` before there is an engine, ``ConfigurationError`` for a wrong
        argument.
        """
        if commit_on_exit is not False:
            boolean("commit_on_exit", commit_on_exit)
        make = None if session_args is None else self.database.maker(session_args)
        return UnitScope(self.database, self.current, commit_on_exit, make)

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
    session_class: type[S_co] | None,
) -> tuple[Database[S_co], ContextVar[UnitOfWork[S_co] | NoUnit], SessionProxy[S_co]]:
    """Make a database, the variable of its current unit, and its proxy."""
    database: Database[S_co] = Database(session_class)
    current = current_unit(database)
    return database, current, SessionProxy(database, current, current.get)
