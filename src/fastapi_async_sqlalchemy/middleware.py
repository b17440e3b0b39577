"""The middleware: one unit of work for each HTTP request, settled before the response starts."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar, Final, Generic, Literal, cast

from attrs import evolve
from starlette.applications import Starlette

from ._arguments.checks import begin_of, boolean, mapping, optional_waits, paths, waits
from ._arguments.keywords import session_arguments, session_class_of
from ._dialects.begin import PLAIN, TransactionSettings
from ._proxy import SessionProxy, new_database
from ._session.models import models_of
from ._telemetry.observer import Observer, observers_of
from ._unit.database import Database, S_co
from ._unit.place import NoUnit
from ._unit.settling import abandon, finish_idle
from ._unit.unit import CLOSED
from ._unit.warming import warm_up_of
from ._web.admission import admission, unavailable
from ._web.failure import KeptBodies
from ._web.lifespan import EngineUse
from ._web.policy import commit_policy
from ._web.request import RequestUnit
from ._web.saturation import saturation_warning
from ._web.timing import TimedRequestUnit
from .exceptions import ConfigurationError, PoolTimeoutError, _safe_repr

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from contextvars import ContextVar

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Receive, Scope, Send

    from ._arguments.checks import Begin
    from ._arguments.keywords import EngineArgs, SessionArgs
    from ._unit.place import Place
    from ._web.policy import CommitWhen

__all__ = ["SQLAlchemyMiddleware", "add_pool_timeout_handler", "create_middleware_and_session_proxy", "db"]

_BY_MESSAGE: Final = "open `async with db():` for each message"
_NOT_EXCLUDED: Final = "take it off exclude_paths, or open `async with db():`"

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
        observers: are notified of what units do, until the lifespan ends.
        server_timing: add a ``Server-Timing`` header to each response whose request has used the database.
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
        observers: Iterable[Observer] | None = None,
        server_timing: bool = False,
        concurrent_use: Literal["refuse", "wait"] | None = None,
    ) -> None:
        self.app: ASGIApp = _require_app(app)
        commits = self._database.commit_on_exit if commit_on_exit is None else commit_on_exit
        self._policy = commit_policy(commits, commit_when)
        self._bodies = KeptBodies() if self._policy.may_commit else None
        self._excluded = paths("exclude_paths", exclude_paths)
        self._config = self._database.configs[self._policy.commit_on_exit]
        self._admission = admission(max_concurrent_requests, request_queue_timeout)
        timed, observing = boolean("server_timing", server_timing), observers_of(observers)
        self._unit: type[RequestUnit] = TimedRequestUnit if timed else RequestUnit
        self._use = EngineUse(
            database=self._database,
            source=(db_url, custom_engine, mapping("engine_args", engine_args)),
            session_args=session_arguments(session_args),
            begins=begin_of(begin),
            warm_up=warm_up_of(pool_warm_up),
            waits=optional_waits(concurrent_use),
            watcher=saturation_warning(pool_warn_threshold, pool_warn_interval),
            observers=(*observing, Observer()) if timed else observing,  # by which the times are measured
        )
        self._use.bring(app)
        self._use.begin(started=False)
        self._in_websocket = self._no_unit("in a WebSocket", _BY_MESSAGE)
        self._on_excluded_path = self._no_unit("on an excluded path", _NOT_EXCLUDED)

    def _no_unit(self, where: str, remedy: str) -> NoUnit[S_co]:
        return NoUnit(None, database=self._database, where=where, remedy=remedy)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or the lifespan."""
        if scope["type"] != "http" or (self._excluded and scope["path"] in self._excluded):
            await self._without_unit(scope, receive, send)
            return
        if self._admission is not None and not self._admission.admitted(scope):
            await self._admission.serve(self, scope, receive, send)
            return
        outer = self._current.get()
        unit = self._unit(outer, self._config, scope, self._policy, receive, send, self._bodies)
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
            await self._use.serve(self.app, scope, receive, send)
            return
        token = self._current.set(self._in_websocket if kind == "websocket" else self._on_excluded_path)
        try:
            await self.app(scope, receive, send)
        finally:
            self._current.reset(token)


def _require_app(app: ASGIApp) -> ASGIApp:
    if not callable(app):
        message = f"app must be an ASGI application, not {_safe_repr(app)}."
        raise ConfigurationError(message)
    return app


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
    observers: Iterable[Observer] | None = None,
) -> tuple[type[SQLAlchemyMiddleware[S_co]], SessionProxy[S_co]]:
    """Create the pair for one database: a middleware class and its ``db`` proxy.

    Two pairs never share an engine, a session or a unit. ``session_class`` is the database's session
    class, and gives the proxy its type. Without it sessions are SQLModel's if SQLModel is installed,
    otherwise SQLAlchemy's ``AsyncSession``. All units of a ``read_only=True`` pair are read-only, which
    suits a replica. ``commit_on_exit`` is the default of the pair's blocks and of its middleware. ``begin``
    is the default of all units: ``on_first_use`` or ``on_first_write``. With ``concurrent_use="wait"`` a
    task waits for its turn of a session, in place of ``ConcurrentUseError``. ``observers`` are
    notified of what units do.

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
    commits, wait = boolean("commit_on_exit", commit_on_exit), waits(concurrent_use)
    database, current, proxy = new_database(
        session_class, settings, commit_on_exit=commits, waits=wait, observers=observers_of(observers)
    )
    members = {"_database": database, "_current": current, "__doc__": SQLAlchemyMiddleware.__doc__}
    return type("SQLAlchemyMiddleware", (SQLAlchemyMiddleware,), members), proxy
