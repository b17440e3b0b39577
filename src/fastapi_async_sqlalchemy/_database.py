"""One database: its engine, who owns it, and how its sessions are made."""

from __future__ import annotations

import functools
import importlib.util
from typing import TYPE_CHECKING, Any, Generic, cast

from attrs import Factory, define
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from typing_extensions import TypeVar

from ._observer import Watch
from ._options import session_arguments
from .exceptions import ConfigurationError, EngineAlreadyBoundError, SessionNotInitialisedError

if TYPE_CHECKING:
    from collections.abc import Callable

S_co = TypeVar("S_co", bound=AsyncSession, covariant=True, default=AsyncSession)


@define(eq=False, repr=False)
class Database(Generic[S_co]):
    """One database of a pair: unbound at first, then bound to one engine at a time.

    Who binds an engine ends its use: an engine that was made here is disposed then, a caller's never.
    """

    _declared: type[S_co] | None
    _engine: AsyncEngine | None = None
    _live: bool = False
    _session_args: dict[str, Any] = Factory(dict[str, Any])
    _make: Callable[[], S_co] | None = None
    _watch: Watch = Factory(lambda self: Watch(self._label()), takes_self=True)

    def __repr__(self) -> str:
        return f"<Database {self.name}{'' if self.connected else ', no engine'}>"

    @property
    def name(self) -> str:
        """The database, as messages name it: never with its user, password or query."""
        return self._watch.name

    @property
    def connected(self) -> bool:
        """Whether there is an engine."""
        return self._engine is not None

    @property
    def engine(self) -> AsyncEngine:
        """The engine; ``SessionNotInitialisedError`` before there is one."""
        if self._engine is None:
            raise SessionNotInitialisedError(self.name)
        return self._engine

    def bind(self, engine: AsyncEngine, session_args: object = None) -> None:
        """Take an engine into use, with the arguments of its sessions.

        Raises ``EngineAlreadyBoundError`` while another engine is in use, ``ConfigurationError`` for
        arguments that make no session.
        """
        if self._live and engine is not self._engine:
            raise EngineAlreadyBoundError(self.name)
        arguments = session_arguments(session_args)
        self._make = self._maker(engine, arguments)
        self._engine, self._live, self._session_args = engine, True, arguments
        self._watch.name = self._label()
        self._watch.listen(engine.sync_engine)

    async def release(self, engine: AsyncEngine, *, owned: bool) -> None:
        """End an engine's use: dispose it if it was made here; another one may be bound then."""
        if engine is self._engine:
            self._live = False
        if owned:
            await engine.dispose()

    def unbind(self) -> None:
        """Forget the engine."""
        self._engine, self._live, self._make = None, False, None
        self._watch.name = self._label()

    def new_session(self) -> S_co:
        """Make a session; nothing is sent to the database."""
        if self._make is None:
            raise SessionNotInitialisedError(self.name)
        return self._make()

    def maker(self, session_args: object) -> Callable[[], S_co]:
        """Return what makes sessions with arguments added to the database's own."""
        return self._maker(self.engine, self._session_args | session_arguments(session_args))

    def check(self, engine: AsyncEngine, session_args: object) -> None:
        """Raise ``ConfigurationError`` for what ``bind()`` would refuse."""
        self._maker(engine, session_arguments(session_args))

    def _maker(self, engine: AsyncEngine, arguments: dict[str, Any]) -> Callable[[], S_co]:
        """Return what makes a session, tried once so that a wrong argument shows now."""
        keywords: dict[str, Any] = {"expire_on_commit": False, **arguments, "close_resets_only": False}
        class_: type[AsyncSession] = keywords.pop("class_", None) or self._declared or default_session_class()
        keywords["sync_session_class"] = self._watch.session_class(
            keywords.get("sync_session_class") or class_.sync_session_class
        )
        binds: dict[Any, AsyncEngine | AsyncConnection] = keywords.get("binds") or {}
        for bind in binds.values():
            self._watch.listen((bind.engine if isinstance(bind, AsyncConnection) else bind).sync_engine)
        make = functools.partial(class_, engine, **keywords)
        try:
            make()
        except (TypeError, AttributeError, ValueError, SQLAlchemyError) as error:
            message = f"session_args do not fit {class_.__name__}: {error}: correct the argument it names."
            raise ConfigurationError(message) from error
        return cast("Callable[[], S_co]", make)

    def _label(self) -> str:
        kind = self._declared.__name__ if self._declared is not None else "the default database"
        if self._engine is None:
            return kind
        url = self._engine.url
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
