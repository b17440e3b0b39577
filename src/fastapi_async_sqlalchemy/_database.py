"""One database: its engine, who owns it, and how its sessions are made."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, Generic, cast

from attrs import Factory, define
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session
from typing_extensions import TypeVar

from . import _options
from ._observer import ObservedSession, SessionObserver, Watch
from .exceptions import ConfigurationError, EngineAlreadyBoundError, SessionNotInitialisedError

S_co = TypeVar("S_co", bound=AsyncSession, covariant=True, default=AsyncSession)


@define(eq=False, repr=False)
class Database(Generic[S_co]):
    """One database of a pair: unbound at first, then bound to one engine at a time.

    An engine that was made here (``owned``) is disposed when its use ends; a caller's never.
    """

    _declared: type[AsyncSession] | None
    _engine: AsyncEngine | None = None
    _owned: bool = False
    _live: bool = False
    _session_args: dict[str, Any] = {}  # noqa: RUF012  # replaced by bind(), never changed in place
    _make: Callable[[], AsyncSession] | None = None
    _watch: Watch = Factory(Watch)
    name: str = ""

    def __attrs_post_init__(self) -> None:
        self.name = self._label()

    def __repr__(self) -> str:
        return f"<Database {self.name}{'' if self._engine is not None else ', no engine'}>"

    @property
    def engine(self) -> AsyncEngine:
        """The engine; ``SessionNotInitialisedError`` before there is one."""
        if self._engine is None:
            raise SessionNotInitialisedError(self.name)
        return self._engine

    @property
    def connected(self) -> bool:
        """Whether there is an engine."""
        return self._engine is not None

    def bind(self, engine: AsyncEngine, session_args: object = None, *, owned: bool = False) -> None:
        """Take an engine into use, with the arguments of its sessions.

        Raises ``EngineAlreadyBoundError`` while another engine is in use, ``ConfigurationError`` for
        arguments that make no session.
        """
        if not isinstance(engine, AsyncEngine):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers without a type checker
            message = f"the engine must be an AsyncEngine of create_async_engine(), not {type(engine).__name__}."
            raise ConfigurationError(message)
        if self._live and engine is not self._engine:
            raise EngineAlreadyBoundError(self.name)
        arguments = _options.session_arguments(session_args)
        make = self._maker(engine, arguments)
        self._engine, self._owned, self._live = engine, owned, True
        self._session_args, self._make = arguments, make
        self.name = self._label()
        self._watch.engine(engine.sync_engine)

    def resume(self) -> None:
        """Take the engine into use again, for the next lifespan of the same application."""
        self._live = True

    async def release(self) -> None:
        """End the engine's use: dispose it if it was made here; another one may be bound then."""
        self._live = False
        if self._owned and self._engine is not None:
            await self._engine.dispose()

    def unbind(self) -> None:
        """Forget the engine."""
        self._engine, self._owned, self._live, self._make = None, False, False, None
        self.name = self._label()

    def new_session(self, session_args: Mapping[str, Any] | None = None) -> S_co:
        """Make a session; nothing is sent to the database."""
        make = self._make
        if make is None:
            raise SessionNotInitialisedError(self.name)
        if session_args is not None:
            make = self._maker(self.engine, self._session_args | _options.session_arguments(session_args))
        session = make()
        cast("ObservedSession", session.sync_session).observer = SessionObserver(self.name)
        return cast("S_co", session)

    def _maker(self, engine: AsyncEngine, arguments: Mapping[str, Any]) -> Callable[[], AsyncSession]:
        """Return what makes a session, tried once so that a wrong argument shows now."""
        keywords = {"expire_on_commit": False, **arguments, "close_resets_only": False}
        class_: type[AsyncSession] = keywords.pop("class_", None) or self._declared or default_session_class()
        sync_class: type[Session] = keywords.get("sync_session_class") or class_.sync_session_class
        keywords["sync_session_class"] = self._watch.session_class(sync_class)
        for bind in (keywords.get("binds") or {}).values():
            other = bind.engine if isinstance(bind, AsyncConnection) else bind
            self._watch.engine(other.sync_engine)
        make = functools.partial(class_, engine, **keywords)
        try:
            make()
        except (TypeError, AttributeError, SQLAlchemyError) as error:
            message = f"session_args do not fit {class_.__name__}: {error}"
            raise ConfigurationError(message) from error
        return make

    def _label(self) -> str:
        """Name the database in messages: never its user, password or query."""
        kind = self._declared.__name__ if self._declared is not None else "the default database"
        if self._engine is None:
            return kind
        url: URL = self._engine.url
        place = URL.create(url.drivername, host=url.host, port=url.port, database=url.database)
        return f"{kind} ({place})"


def default_session_class() -> type[AsyncSession]:
    """Return SQLModel's session class where SQLModel is installed, else SQLAlchemy's.

    Looked up when an engine is bound, not at import: SQLModel is slow to import.
    """
    if importlib.util.find_spec("sqlmodel") is None:
        return AsyncSession
    from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession  # noqa: PLC0415  # see above

    return SQLModelSession
