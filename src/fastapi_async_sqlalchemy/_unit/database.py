"""One database: its engine, the engine's owner, and the factories of its sessions."""

from __future__ import annotations

import functools
import importlib.util
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Generic, cast

from attrs import Factory, define, evolve
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from typing_extensions import TypeVar

from .._arguments.engines import place_of
from .._arguments.keywords import require_fitting, session_arguments
from .._dialects.begin import PLAIN, require_read_only_twophase
from .._session.loops import running_loop
from .._session.making import maker_of
from .._session.models import models_of
from .._session.watch import Watch
from ..exceptions import ConfigurationError, EngineAlreadyBoundError, SessionNotInitialisedError
from .settings import SettingsRoute
from .uses import Use, newest, use_of

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from weakref import ref

    from sqlalchemy.orm import Session

    from .._arguments.checks import Begin
    from .._dialects.begin import TransactionSettings
    from .._session.checkout import Limits
    from .._session.state import StatefulSession
    from .observing import Opening
    from .uses import PoolWatcher

S_co = TypeVar("S_co", bound=AsyncSession, covariant=True, default=AsyncSession)

_BY_BIND: Final = "`db.bind()`"


@define(eq=False, repr=False)
class Database(Generic[S_co]):
    """One database of a pair, bound to at most one engine at a time.

    Several may use that engine. Each ends its own use, and the last one releases the engine. Whoever has
    created the engine disposes it.
    """

    _declared: type[S_co] | None
    settings: TransactionSettings = PLAIN
    """The default settings of its units' transactions."""
    commit_on_exit: bool = False
    """Whether the end of a block commits by default."""
    waits: bool = False
    """Whether a task waits for its turn of a session by default."""
    begin: Begin | None = None
    """When transactions on the engine in use begin, if that was given where it was bound."""
    _engine: AsyncEngine | None = None
    _session_args: dict[str, Any] = Factory(dict[str, Any])
    _make: Callable[[], S_co] | None = None
    uses: list[Use] = Factory(
        lambda self: [Use(name="the pair", remedy="", waits=self.waits, commit_on_exit=self.commit_on_exit)],
        takes_self=True,
    )
    """Who uses the database, the newest last; the first is the pair itself with its defaults."""
    _variants: dict[TransactionSettings, Callable[[], S_co]] = Factory(
        dict["TransactionSettings", "Callable[[], S_co]"]
    )
    """Session factories for other settings, created on first use."""
    _watch: Watch = Factory(lambda self: Watch(self._label()), takes_self=True)
    configs: tuple[UnitConfig[S_co], UnitConfig[S_co]] = Factory(
        lambda self: (UnitConfig(self, self.settings), UnitConfig(self, self.settings, commit_on_exit=True)),
        takes_self=True,
    )
    """The default configurations of units, without `commit_on_exit` and with it."""
    opening: Opening | None = None
    """What it does with each unit that makes its session, if anything was asked."""
    asked: ContextVar[ref[asyncio.Task[Any]] | None] = Factory(
        lambda: ContextVar["ref[asyncio.Task[Any]] | None"]("fastapi_async_sqlalchemy.asked", default=None)
    )
    """The task in this context that has asked for a separate unit; threads inherit the context.

    One variable serves all blocks, because a context keeps its variables for good.
    """

    def __repr__(self) -> str:
        return f"<Database {self.name}{'' if self.connected else ', no engine'}>"

    @property
    def name(self) -> str:
        """The name of the database in messages: never with its user, password or query."""
        return self._watch.name

    @property
    def shared(self) -> Watch:
        """The state that its sessions have in common."""
        return self._watch

    @property
    def connected(self) -> bool:
        """Whether an engine is bound."""
        return self._engine is not None

    @property
    def engine(self) -> AsyncEngine:
        """The engine; raises ``SessionNotInitialisedError`` before one is bound."""
        if self._engine is None:
            raise SessionNotInitialisedError(self.name)
        return self._engine

    def __attrs_post_init__(self) -> None:
        self._watch.waits = self.waits

    @property
    def user(self) -> Use | None:
        """The first of those who have the engine in use."""
        return next((one for one in self.uses if one.engine is not None), None)

    def bind(self, engine: AsyncEngine, session_args: object = None) -> None:
        """Use an engine until ``unbind()``; raises as ``take()`` does."""
        self.take(use_of(_BY_BIND, "`db.unbind()`", engine=engine), session_args)

    def unbind(self) -> None:
        """End the newest use by ``bind()``, and that of an application that has not started."""
        bound = next((one for one in reversed(self.uses) if one.name == _BY_BIND), None)
        self._change([one for one in self.uses if one is not bound and (one.started or one.engine is None)])
        if self.user is None:
            self._forget()

    def take(self, use: Use, session_args: object = None, begin: Begin | None = None) -> None:
        """Begin a use, which may bring an engine and the arguments of its sessions.

        Raises ``EngineAlreadyBoundError`` while another engine is in use, ``ConfigurationError`` for
        arguments that do not fit a session, or that contradict those of another use.
        """
        arguments, first = session_arguments(session_args), self.user
        if first is not None and use.engine is not None and use.engine is not first.engine:
            same = first.engine is not None and use.engine.url == first.engine.url
            needless = use.name if same and use.is_call else None
            raise EngineAlreadyBoundError(self.name, str(first), first.remedy, needless)
        uses = use.added_to(self.uses)
        engine = use.engine or (None if first is None else first.engine)
        watcher: PoolWatcher | None = newest(uses, "watcher")
        if watcher is not None and engine is not None:
            watcher.check(engine.sync_engine)
        use.require_agreement(uses[1:-1])
        if use.engine is not None:
            other = next((one for one in uses[:-1] if one.engine is not None), None)
            if other is None:
                self._make = self._maker(use.engine, arguments, _beginning(self.settings, begin))
                self._engine, self._session_args, self.begin = use.engine, arguments, begin
                self._variants.clear()
            else:
                now = self.begin or self.settings.begin or "on_first_use"
                other.require("session_args", arguments or self._session_args, self._session_args)
                other.require("begin", begin or now, now)
            self._follow(use.engine)
        self._change(uses)

    def _follow(self, engine: AsyncEngine) -> None:
        self._watch.name = self._label()
        self._watch.listen(engine.sync_engine)
        self._watch.engine = engine.sync_engine
        if (loop := running_loop()) is not None:
            self._watch.loops.bind(loop)
        if self.opening is not None:
            self.opening.bind(self.name, engine)

    def release(self, use: Use) -> None:
        """End a use; the engine of the last one may then give way to another.

        After an application's end it can still be used.
        """
        self._change(use.removed_from(self.uses))
        if use.engine is not None and self.user is None:
            if use.application is None:
                self._forget()
            else:
                self._leave()

    def _change(self, uses: list[Use]) -> None:
        """Exchange the uses, and put in force what the newest of them ask for."""
        before, self.uses = self.uses, uses
        self._watch.waits, self.commit_on_exit = newest(uses, "waits"), newest(uses, "commit_on_exit")
        watcher: PoolWatcher | None = None if self.user is None else newest(uses, "watcher")
        for one in before:
            if one.watcher is not None and one.watcher is not watcher:
                one.watcher.end()
        if watcher is not None:
            watcher.begin(self.name, self.engine.sync_engine)

    def _leave(self) -> None:
        self._watch.leave()
        if self.opening is not None:
            self.opening.unbind()

    def _forget(self) -> None:
        self._leave()
        self._engine, self._make, self.begin = None, None, None
        self._variants.clear()
        self._watch.name = self._label()

    def new_session(self) -> S_co:
        """Create a session; nothing is sent to the database."""
        if self._make is None:
            raise SessionNotInitialisedError(self.name)
        return self._make()

    def maker(
        self, session_args: object, settings: TransactionSettings, engine: AsyncEngine | None = None
    ) -> Callable[[], S_co]:
        """Return a session factory with arguments added to the database's own, and with settings.

        It uses another engine than the database's own, if one is given.
        """
        if session_args is None and engine is None:
            if settings not in self._variants:
                effective = self.effective(settings)
                self._variants[settings] = self._maker(self.engine, self._session_args, effective)
            return self._variants[settings]
        if engine is not None:
            self._watch.listen(engine.sync_engine)
        arguments = self._session_args | session_arguments(session_args)
        return self._maker(engine or self.engine, arguments, self.effective(settings))

    def effective(self, settings: TransactionSettings) -> TransactionSettings:
        """Return settings with the default of the engine in use for what they leave open."""
        return _beginning(settings, self.begin)

    def check(self, engine: AsyncEngine, session_args: object, begin: Begin | None) -> None:
        """Raise ``ConfigurationError`` for arguments that ``bind()`` would refuse."""
        self._maker(engine, session_arguments(session_args), _beginning(self.settings, begin))

    def _maker(
        self, engine: AsyncEngine, arguments: dict[str, Any], settings: TransactionSettings
    ) -> Callable[[], S_co]:
        """Return a session factory; refuse wrong arguments now, without creating a session."""
        keywords: dict[str, Any] = {"expire_on_commit": False, **arguments}
        class_: type[AsyncSession] = keywords.pop("class_", None) or self._declared or default_session_class()
        base: type[Session] = keywords.get("sync_session_class") or class_.sync_session_class
        given: dict[Any, AsyncEngine | AsyncConnection] = keywords.get("binds") or {}
        binds = list(given.values())
        _apply_twophase(settings, engine, keywords)
        require_fitting(class_, base, engine, keywords)
        route = None
        if settings.reads_alone or not settings.as_always:
            route = SettingsRoute(settings, self._watch, engine.sync_engine)
            for bind in (engine, *binds):
                route.require(bind)  # refuses settings that the database does not have
        for bind in binds:
            self._watch.listen(bind.sync_engine)
        resets_on_close = keywords.pop("close_resets_only", True)
        watched = functools.partial(self._watch.session_class, models=models_of(class_))
        keywords["close_resets_only"] = False
        make_plain: Callable[..., AsyncSession] = class_
        if class_.__init__ is AsyncSession.__init__:
            keywords["sync_session_class"] = watched(base)
        else:
            make_plain = maker_of(class_, watched)
        create = cast("Callable[[], S_co]", functools.partial(make_plain, bind=engine, **keywords))
        if route is None and resets_on_close:
            return create

        def make() -> S_co:
            session = create()
            if route is not None:
                route.apply(session)
            if not resets_on_close:
                state = cast("StatefulSession", session.sync_session)._fastapi_async_sqlalchemy
                state.resets_on_close = False
            return session

        return make

    def _label(self) -> str:
        kind = self._declared.__name__ if self._declared is not None else "the default database"
        if self._engine is None:
            return kind
        return f"{kind} ({place_of(self._engine.url)})"


@define(eq=False, repr=False)
class UnitConfig(Generic[S_co]):
    """The configuration of units of work; shared by all units opened alike, and never changed."""

    database: Database[S_co]
    settings: TransactionSettings
    make: Callable[[], S_co] | None = None
    """The session factory, if not the database's current one."""
    limits: Limits | None = None
    commit_on_exit: bool = False
    """Whether the end of a unit commits; units of child tasks inherit it by default."""


def _beginning(settings: TransactionSettings, begin: Begin | None) -> TransactionSettings:
    """Return settings whose transactions begin by default when ``begin`` says."""
    return settings if begin is None or settings.begin is not None else evolve(settings, begin=begin)


def _apply_twophase(settings: TransactionSettings, engine: AsyncEngine, keywords: dict[str, Any]) -> None:
    """Enable two-phase commit if requested, and refuse arguments that conflict with it."""
    if settings.twophase:
        keywords["twophase"] = True
        if keywords.get("binds"):
            message = "session_args['binds'] and atomic() exclude each other: give each engine its own pair."
            raise ConfigurationError(message)
    if settings.read_only and keywords.get("twophase"):
        require_read_only_twophase(engine)


def default_session_class() -> type[AsyncSession]:
    """Return SQLModel's session class if SQLModel is installed, otherwise SQLAlchemy's.

    It is looked up when an engine is bound, not at import: SQLModel is slow to import.
    """
    if importlib.util.find_spec("sqlmodel") is None:
        return AsyncSession
    try:
        from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession  # noqa: PLC0415  # slow
    except ImportError as error:
        message = (
            f"SQLModel is installed and cannot be imported ({error}): repair or uninstall it, or choose the "
            "session class by create_middleware_and_session_proxy(AsyncSession)."
        )
        raise ConfigurationError(message) from error
    return SQLModelSession
