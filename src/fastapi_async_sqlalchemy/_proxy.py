"""The `db` facade: what users hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Generic

from attrs import define

from . import _options
from ._context import NoUnit, UnitScope, current_unit
from ._database import Database, S_co
from ._unit import UnitOfWork

if TYPE_CHECKING:
    from types import TracebackType

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession


@define(eq=False, repr=False)
class SessionProxy(Generic[S_co]):
    """One database's ``db``: the current session and unit of work, and new units.

    Made with its middleware by ``create_middleware_and_session_proxy()`` and kept for the life of the
    process. It has no state of its own but the engine that was bound to it.
    """

    _database: Database[S_co]
    _current: ContextVar[UnitOfWork[S_co] | NoUnit]
    _get: Callable[[], UnitOfWork[S_co] | NoUnit]

    @property
    def session(self) -> S_co:
        """The current unit's session, made on first use.

        Raises ``MissingSessionError`` outside a request and outside ``async with db():``,
        ``UnitClosedError`` in a task that outlived its unit, ``SessionNotInitialisedError`` before
        there is an engine.
        """
        unit = self._get()
        session = unit.opened
        return unit.session if session is None else session

    @property
    def unit(self) -> UnitOfWork[S_co]:
        """The current unit of work; raises as ``session`` does."""
        unit = self._get()
        if isinstance(unit, NoUnit):
            return unit.session
        return unit

    @property
    def engine(self) -> AsyncEngine:
        """The engine; ``SessionNotInitialisedError`` before there is one."""
        return self._database.engine

    def __call__(
        self, session_args: Mapping[str, Any] | None = None, commit_on_exit: bool = False  # noqa: FBT001, FBT002  # the names and the order that users of 0.8 know
    ) -> UnitScope[S_co]:
        """Return a new unit of work for ``async with db() as unit:``, with a session of its own.

        Leaving the block commits under ``commit_on_exit=True``, else rolls back what was not
        committed, with a WARNING if something was written; an error that leaves the block rolls back.
        ``session_args`` are added to the database's own.
        """
        if commit_on_exit is not False:
            _options.boolean("commit_on_exit", commit_on_exit)
        if session_args is not None:
            _options.session_arguments(session_args)
        return UnitScope(self._database, self._current, commit_on_exit, session_args)

    def connect(
        self,
        url: str | URL | AsyncEngine,
        *,
        engine_args: Mapping[str, Any] | None = None,
        session_args: Mapping[str, Any] | None = None,
    ) -> Connected[S_co]:
        """Return ``async with db.connect(url):``, which serves units without an ASGI application.

        An engine made from a URL is disposed at the block's end; a given engine is only let go.
        Raises ``ConfigurationError`` at once, ``EngineAlreadyBoundError`` on entry.
        """
        engine, owned = _options.engine("url", url, engine_args)
        _options.session_arguments(session_args)
        return Connected(self, self._database, engine, session_args, owned)

    def bind(self, engine: AsyncEngine, *, session_args: Mapping[str, Any] | None = None) -> None:
        """Use a caller's engine, until ``unbind()``; it is never disposed here.

        Raises ``EngineAlreadyBoundError`` while another engine is in use.
        """
        self._database.bind(engine, session_args)

    def unbind(self) -> None:
        """Let go of an engine that ``bind()`` took; another one may be bound then."""
        self._database.unbind()

    def __repr__(self) -> str:
        return f"<SessionProxy of {self._database.name}>"


@define(eq=False, repr=False)
class Connected(Generic[S_co]):
    """What ``db.connect(...)`` returns: an async context manager around the engine's use."""

    _proxy: SessionProxy[S_co]
    _database: Database[S_co]
    _engine: AsyncEngine
    _session_args: Mapping[str, Any] | None
    _owned: bool

    async def __aenter__(self) -> SessionProxy[S_co]:
        self._database.bind(self._engine, self._session_args, owned=self._owned)
        return self._proxy

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self._database.release()
        finally:
            self._database.unbind()


def new_database(
    session_class: type[S_co] | None,
) -> tuple[Database[S_co], ContextVar[UnitOfWork[S_co] | NoUnit], SessionProxy[S_co]]:
    """Make a database, the variable of its current unit, and its proxy."""
    database: Database[S_co] = Database(session_class)
    current = current_unit(database)
    return database, current, SessionProxy(database, current, current.get)
