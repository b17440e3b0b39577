"""The middleware: one unit of work for each HTTP request, settled before the response starts."""

from __future__ import annotations

import inspect
import logging
import sys
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Literal, cast

from attrs import evolve
from starlette.applications import Starlette

from ._arguments.checks import begin_of, boolean, mapping, optional_waits, paths, waits
from ._arguments.engines import async_engine, holder, parse
from ._arguments.keywords import session_arguments, session_class_of
from ._dialects.begin import PLAIN, TransactionSettings
from ._dialects.engines import make_engine
from ._proxy import SessionProxy, new_database
from ._session.models import models_of
from ._unit.database import Database, S_co
from ._unit.place import NoUnit
from ._unit.settling import abandon, finish_idle
from ._unit.unit import CLOSED
from ._unit.warming import require_room, warm_up, warm_up_of
from ._web.admission import admission, unavailable
from ._web.failure import KeptBodies
from ._web.policy import commit_policy
from ._web.request import RequestUnit
from ._web.saturation import saturation_warning
from .exceptions import ConfigurationError, PoolTimeoutError, _safe_repr

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from contextvars import ContextVar

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from ._arguments.checks import Begin
    from ._arguments.keywords import EngineArgs, SessionArgs
    from ._unit.place import Place
    from ._web.policy import CommitWhen

__all__ = ["SQLAlchemyMiddleware", "add_pool_timeout_handler", "create_middleware_and_session_proxy", "db"]

logger = logging.getLogger("fastapi_async_sqlalchemy")

_END_OF_LIFESPAN: Final = (
    "that application's lifespan: a TestClient runs it only as `with TestClient(app) as client:`"
)
_LAST_LIFESPAN_MESSAGES: Final = frozenset(
    {"lifespan.startup.failed", "lifespan.shutdown.complete", "lifespan.shutdown.failed"}
)

_default_database, _default_current, db = new_database(None, PLAIN)


class SQLAlchemyMiddleware(Generic[S_co]):
    """Pure ASGI middleware that binds one unit of work to each HTTP request.

    The unit is settled when the application starts its response, before the client sees any of it. It is
    closed when the application returns. An engine made from ``db_url`` is disposed when the lifespan
    ends; a ``custom_engine`` never is.

    Args:
        app: the wrapped application.
        db_url: the URL of the database, with an asyncio driver. Give this or ``custom_engine``. Give neither
            if ``db.bind()`` or ``db.connect()`` provides the engine before the application has started.
        custom_engine: the caller's own engine.
        engine_args: for ``create_async_engine()``, with ``db_url``.
        session_args: for the sessions; ``class_`` is the session class.
        commit_on_exit: commit a response whose status is below 400, unless an exception is being handled;
            the default is that of the pair.
        exclude_paths: paths, exactly as requested, that get no unit of work.
        commit_when: a function that replaces that rule: it gets status and exception, and returns whether
            to commit.
        max_concurrent_requests: how many requests at a time reach the application, each until its response
            starts. The others wait. Excluded paths do not count.
        request_queue_timeout: seconds after which a waiting request is answered 503 with ``Retry-After``.
        pool_warn_threshold: the share of the pool, above 0 and up to 1, whose checkout logs a WARNING.
        pool_warn_interval: seconds between two such WARNINGs.
        begin: when units begin their transactions; None is as the pair.
        pool_warm_up: how many connections are open when the application has started.
        concurrent_use: "wait" lets a task wait for its turn of a session, as long as for a connection, where
            "refuse" raises ``ConcurrentUseError``; the default is that of the pair.

    Raises:
        ConfigurationError: an argument is wrong.
        EngineAlreadyBoundError: the pair has another engine in use.
    """

    _database: ClassVar[Database[Any]] = _default_database
    _current: ClassVar[ContextVar[Place[Any]]] = _default_current

    def __init__(  # noqa: PLR0917  # the order of release 0.8
        self,
        app: ASGIApp,
        db_url: str | URL | None = None,
        custom_engine: AsyncEngine | None = None,
        engine_args: EngineArgs | Mapping[str, object] | None = None,
        session_args: SessionArgs | Mapping[str, object] | None = None,
        commit_on_exit: bool | None = None,  # noqa: FBT001  # the order of release 0.8
        *,
        exclude_paths: Iterable[str] | None = None,
        commit_when: CommitWhen | None = None,
        max_concurrent_requests: int | None = None,
        request_queue_timeout: float | None = None,
        pool_warn_threshold: float | None = None,
        pool_warn_interval: float = 60.0,
        begin: Begin | None = None,
        pool_warm_up: int | None = None,
        concurrent_use: Literal["refuse", "wait"] | None = None,
    ) -> None:
        if not callable(app):
            message = f"app must be an ASGI application, not {_safe_repr(app)}."
            raise ConfigurationError(message)
        self.app = app
        self._policy = commit_policy(self._commits(commit_on_exit), commit_when)
        self._bodies = KeptBodies() if self._policy.may_commit else None
        self._excluded = paths("exclude_paths", exclude_paths)
        database = self._database
        self._config = database.configs[self._policy.commit_on_exit]
        self._admission = admission(max_concurrent_requests, request_queue_timeout)
        self._warning = saturation_warning(pool_warn_threshold, pool_warn_interval)
        self._session_args = session_arguments(session_args)
        self._waits, self._warm_up = optional_waits(concurrent_use), warm_up_of(pool_warm_up)
        self._begins: Begin | None = begin_of(begin)
        self._owned = db_url is not None
        self._engine = self._own_or_given(db_url, custom_engine, mapping("engine_args", engine_args))
        self._begin()
        self._in_websocket = NoUnit(
            None, database=database, where="in a WebSocket", remedy="open `async with db():` for each message"
        )
        self._on_excluded_path = NoUnit(
            None,
            database=database,
            where="on an excluded path",
            remedy="take it off exclude_paths, or open `async with db():`",
        )

    def _commits(self, given: bool | None) -> bool:  # noqa: FBT001  # three values
        return self._database.commit_on_exit if given is None else given

    def _own_or_given(
        self, db_url: str | URL | None, custom_engine: AsyncEngine | None, engine_args: Mapping[str, object]
    ) -> AsyncEngine | None:
        self._holder = holder("the middleware of an application", _END_OF_LIFESPAN)
        if db_url is None and engine_args:
            other = "another engine" if custom_engine is None else "custom_engine"
            message = f"engine_args go with db_url: {other} has its own already."
            raise ConfigurationError(message)
        if custom_engine is not None:
            if db_url is not None:
                message = "db_url and custom_engine exclude each other: give one of them."
                raise ConfigurationError(message)
            return async_engine("custom_engine", custom_engine)
        if db_url is None:
            if self._session_args:
                message = "session_args go with an engine: give them to db.bind() or db.connect()."
                raise ConfigurationError(message)
            if self._begins is not None:
                message = "begin goes with an engine: give it to db.connect(), or to the pair."
                raise ConfigurationError(message)
            return None
        source, application = (parse("db_url", db_url), dict(engine_args)), _innermost(self.app)
        self._holder = evolve(self._holder, source=source, application=application)
        first = self._database.holder
        if first is not None and first.application is application and first.source == source:
            return self._database.engine  # the application has rebuilt its middleware stack
        return make_engine("db_url", db_url, engine_args)

    def _begin(self) -> None:
        """Bind the engine, again after an earlier lifespan, or prepare for one to be bound later."""
        if self._engine is None:
            self._database.watch_pool(self._warning)
        else:
            require_room(self._engine, self._warm_up)
            self._database.take(self._engine, self._session_args, self._holder, self._warning, self._begins)
        if self._waits is not None:
            self._database.shared.waits = self._waits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or the lifespan."""
        if scope["type"] != "http" or (self._excluded and scope["path"] in self._excluded):
            await self._without_unit(scope, receive, send)
            return
        if self._admission is not None and not self._admission.admitted(scope):
            await self._admission.serve(self, scope, receive, send)
            return
        outer = self._current.get()
        unit = RequestUnit(outer, self._config, scope, self._policy, receive, send, self._bodies)
        unit._outer_exception = sys.exception()
        unit._app = scope.get("app")  # read before a mounted application replaces it
        self._current.set(unit)
        try:
            try:
                await self.app(scope, unit._receive, unit._send)
                if unit._failure is not None:
                    raise unit._failure  # noqa: TRY301  # the application swallowed it
            except Exception:  # answered inside `except`: outer middlewares see it handled
                if unit._failure is None:
                    raise
                await unit._answer()
            session = unit._watched
            if session is None:
                unit._phase = CLOSED
            elif finish_idle(unit):
                unit._note_commit(session)  # the application may have committed explicitly
            else:
                await unit._finish_tail()
        except BaseException:
            await abandon(unit)
            raise
        finally:
            # a server may run a connection's next request in this context: do not let a chain of units grow
            self._current.set(outer)
            unit._outer = None
            if unit._received:
                unit._forget_body(())

    async def _without_unit(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        if kind == "lifespan":
            await self._lifespan(scope, receive, send)
            return
        token = self._current.set(self._in_websocket if kind == "websocket" else self._on_excluded_path)
        try:
            await self.app(scope, receive, send)
        finally:
            self._current.reset(token)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
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
            if message["type"] in _LAST_LIFESPAN_MESSAGES:
                await end()
            await send(message)

        self._begin()
        try:
            await self.app(scope, receive, forward)
        finally:
            await end()
            if not answered:  # an application without a lifespan may still be served
                self._database.watch_pool(self._warning)

    async def _start(self) -> None:
        """Require an engine, and open the connections that were requested."""
        if not self._database.connected:
            error = (
                f"{self._database.name} has no engine though the application has started: give the "
                "middleware db_url or custom_engine, or connect an engine in the lifespan, by "
                "`async with db.connect(url):` or `db.bind(engine)`."
            )
            raise ConfigurationError(error)
        await warm_up(self._database.engine, self._warm_up)

    async def _end(self) -> None:
        """Release the engine; an error while disposing it is logged and not raised."""
        self._database.watch_pool(None)
        if self._engine is not None:
            try:
                await self._database.release(self._engine, owned=self._owned)
            except Exception:
                logger.exception("The engine of %s could not be disposed.", self._database.name)


def _innermost(app: object) -> object:
    """Return the application below all middlewares: a router, the same at each rebuild of the stack."""
    while True:
        inner: object = getattr(app, "app", None)
        if inner is None or inspect.ismethod(inner):  # a router's `app` is a method
            return app
        app = inner


def add_pool_timeout_handler(app: Starlette) -> None:
    """Answer every ``PoolTimeoutError`` in an application with 503 and ``Retry-After``."""
    _require_starlette(app)
    app.add_exception_handler(PoolTimeoutError, _answer_pool_timeout)


def _require_starlette(app: object) -> None:
    if not isinstance(app, Starlette):
        message = f"app must be a Starlette or FastAPI application, not {_safe_repr(app)}."
        raise ConfigurationError(message)


async def _answer_pool_timeout(_: Request, error: Exception) -> Response:
    return unavailable(cast("PoolTimeoutError", error).retry_after)


def create_middleware_and_session_proxy(
    session_class: type[S_co] | None = None,
    *,
    read_only: bool = False,
    commit_on_exit: bool = False,
    begin: Begin | None = None,
    concurrent_use: Literal["refuse", "wait"] = "refuse",
) -> tuple[type[SQLAlchemyMiddleware[S_co]], SessionProxy[S_co]]:
    """Create the pair for one database: a middleware class and its ``db`` proxy.

    Two pairs never share an engine, a session or a unit. ``session_class`` is the database's session
    class, and gives the proxy its type. Without it sessions are SQLModel's if SQLModel is installed,
    otherwise SQLAlchemy's ``AsyncSession``. All units of a ``read_only=True`` pair are read-only, which
    suits a replica. ``commit_on_exit`` is the default of the pair's blocks and of its middleware. ``begin``
    is the default of all units: ``on_first_use`` or ``on_first_write``. With ``concurrent_use="wait"`` a
    task waits for its turn of a session, in place of ``ConcurrentUseError``.

    Raises:
        ConfigurationError: an argument is wrong.
    """
    if session_class is not None:
        session_class_of("session_class", session_class)
        models_of(session_class)
    settings = PLAIN
    if boolean("read_only", read_only):
        settings = TransactionSettings(read_only=True)
    if begin_of(begin) == "on_first_write":
        settings = evolve(settings, begin=begin)
    commits = boolean("commit_on_exit", commit_on_exit)
    database, current, proxy = new_database(
        session_class, settings, commit_on_exit=commits, waits=waits(concurrent_use)
    )
    members = {"_database": database, "_current": current, "__doc__": SQLAlchemyMiddleware.__doc__}
    return type("SQLAlchemyMiddleware", (SQLAlchemyMiddleware,), members), proxy
