"""The engine that a middleware brings, in use from its application's startup to its shutdown."""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any, Final
from weakref import finalize

from attrs import Factory, define, evolve

from .._arguments.engines import async_engine, parse
from .._dialects.engines import make_engine
from .._telemetry.logs import fields
from .._unit.observing import observe, stop_observing
from .._unit.uses import use_of
from .._unit.warming import require_room, warm_up
from ..exceptions import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from .._arguments.checks import Begin
    from .._telemetry.observer import Observer
    from .._unit.database import Database
    from .._unit.uses import PoolWatcher, Use

logger = logging.getLogger("fastapi_async_sqlalchemy")

_LAST_MESSAGES: Final = frozenset(
    {"lifespan.startup.failed", "lifespan.shutdown.complete", "lifespan.shutdown.failed"}
)
_END_OF_LIFESPAN: Final = (
    "that application's lifespan: `with TestClient(app) as client:` runs it; a client that does not run the "
    "lifespan, such as TestClient without `with` and AsyncClient, never ends it"
)


@define(eq=False, repr=False, kw_only=True)
class EngineUse:
    """The use of an engine by one middleware; without an engine, what goes with one bound elsewhere."""

    database: Database[Any]
    source: tuple[str | URL | None, AsyncEngine | None, Mapping[str, object]]
    """The middleware's ``db_url``, ``custom_engine`` and ``engine_args``."""
    session_args: dict[str, Any]
    begins: Begin | None
    """When transactions begin."""
    warm_up: int
    """How many connections are opened before the application has started."""
    waits: bool | None
    """Whether tasks take turns; None leaves that to the pair."""
    watcher: PoolWatcher | None
    observers: tuple[Observer, ...]
    engine: AsyncEngine | None = None
    """None if the middleware brings no engine."""
    use: Use = Factory(
        lambda self: use_of(
            "the middleware of an application",
            _END_OF_LIFESPAN,
            waits=self.waits,
            watcher=self.watcher,
            started=False,
        ),
        takes_self=True,
    )
    _observing: finalize[[Database[Any], tuple[Observer, ...]], EngineUse] | None = None

    @property
    def owned(self) -> bool:
        """Whether the engine was created here, and is disposed at shutdown."""
        return self.source[0] is not None

    def bring(self, app: ASGIApp) -> None:
        """Find or create the engine; raise ``ConfigurationError`` for wrong arguments."""
        db_url, custom_engine, engine_args = self.source
        self.use = evolve(self.use, application=_application(app))
        if db_url is None and engine_args:
            other = "another engine" if custom_engine is None else "custom_engine"
            message = f"engine_args go with db_url: {other} has its own already."
            raise ConfigurationError(message)
        if custom_engine is not None:
            if db_url is not None:
                message = "db_url and custom_engine exclude each other: give one of them."
                raise ConfigurationError(message)
            self.engine = async_engine("custom_engine", custom_engine)
        elif db_url is not None:
            self.engine = self._own(db_url, engine_args)
        elif self.session_args:
            message = "session_args go with an engine: give them to db.bind() or db.connect()."
            raise ConfigurationError(message)
        elif self.begins is not None:
            message = "begin goes with an engine: give it to db.connect(), or to the pair."
            raise ConfigurationError(message)
        self.use = evolve(self.use, engine=self.engine)

    def _own(self, db_url: str | URL, engine_args: Mapping[str, object]) -> AsyncEngine:
        source = (parse("db_url", db_url), dict(engine_args))
        self.use = evolve(self.use, source=source)
        for one in self.database.uses:
            if one.engine is not None and one.application is self.use.application and one.source == source:
                return one.engine  # the application has rebuilt its middleware stack
        return make_engine("db_url", db_url, engine_args)

    def begin(self, *, started: bool) -> None:
        """Bind the engine, again after an earlier lifespan, or prepare for one to be bound later."""
        if self.engine is not None:
            require_room(self.engine, self.warm_up)
        self.database.take(evolve(self.use, started=started), self.session_args, self.begins)
        if self.observers and self._observing is None:
            observe(self.database, self.observers)
            # an application that builds its stack again drops this object without an end of its lifespan
            self._observing = finalize(self, stop_observing, self.database, self.observers)
            self._observing.atexit = False

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the lifespan, and dispose an owned engine before the server stops the event loop."""
        answered = ended = False

        async def end() -> None:
            nonlocal ended
            if not ended:
                ended = True
                await self._end()

        async def forward(message: Message) -> None:
            nonlocal answered
            answered = True
            if message["type"] == "lifespan.startup.complete":
                await self._start()
            if message["type"] in _LAST_MESSAGES:
                await end()
            await send(message)

        self.begin(started=True)
        try:
            await app(scope, receive, forward)
        finally:
            await end()
            if not answered:  # an application without a lifespan may still be served
                self.begin(started=False)

    async def _start(self) -> None:
        """Require an engine, and open the connections that were requested."""
        if not self.database.connected:
            error = (
                f"{self.database.name} has no engine though the application has started: give the "
                "middleware db_url or custom_engine, or connect an engine in the lifespan, by "
                "`async with db.connect(url):` or `db.bind(engine)`."
            )
            raise ConfigurationError(error)
        await warm_up(self.database.engine, self.warm_up)

    async def _end(self) -> None:
        """End the use; an error while disposing an owned engine is logged and not raised."""
        self.database.release(self.use)
        if self.engine is not None and self.owned:
            try:
                await self.engine.dispose()
            except Exception:
                name = self.database.name
                logger.exception("The engine of %s could not be disposed.", name, extra=fields(name))
        if self._observing is not None:
            self._observing()
            self._observing = None


def _application(app: object) -> object:
    """Return the application that is building its stack, otherwise the innermost one.

    A middleware in between may hide the innermost one.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "build_middleware_stack":
            return frame.f_locals.get("self", app)
        frame = frame.f_back
    return _innermost(app)


def _innermost(app: object) -> object:
    """Return the application below all middlewares: a router, the same at each rebuild of the stack."""
    while True:
        inner: object = getattr(app, "app", None)
        if inner is None or inspect.ismethod(inner):  # a router's `app` is a method
            return app
        app = inner
