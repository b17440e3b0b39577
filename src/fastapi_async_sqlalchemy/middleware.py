"""The middleware: one unit of work for each HTTP request, settled before the response starts."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, cast

from attrs import define
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from . import _options
from ._context import NoUnit
from ._database import Database, S_co
from ._proxy import SessionProxy, new_database
from ._unit import UnitOfWork, abandon, finish, has_written, roll_back, settle
from .exceptions import ConfigurationError, PartialCommitError

if TYPE_CHECKING:
    from contextvars import ContextVar

    from sqlalchemy.engine import URL
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["SQLAlchemyMiddleware", "create_middleware_and_session_proxy", "db"]

logger = logging.getLogger("fastapi_async_sqlalchemy")

_COMMITTED = "fastapi_async_sqlalchemy.committed"
"""The scope's key of the list of databases that have committed for this request, inner ones first."""
_LAST_LIFESPAN_MESSAGES = frozenset(
    {"lifespan.startup.failed", "lifespan.shutdown.complete", "lifespan.shutdown.failed"}
)
_ERROR_STATUS = 400

_default_database, _default_current, db = new_database(None)


class SQLAlchemyMiddleware(Generic[S_co]):
    """Binds one unit of work to each HTTP request. Pure ASGI.

    The unit is settled when the application starts its response, before the client sees any of it, and
    closed when the application returns. An engine made from ``db_url`` is disposed when the lifespan
    ends; a ``custom_engine`` never.

    Args:
        app: the application inside.
        db_url: where the database is; an asyncio driver. Either this or ``custom_engine``, or neither
            where ``db.bind()`` has given the engine already.
        custom_engine: the caller's own engine.
        engine_args: for ``create_async_engine()``, with ``db_url``.
        session_args: for the sessions; ``class_`` is the session class.
        commit_on_exit: commit a response whose status is below 400, unless an exception is being handled.
        exclude_paths: paths, exactly as requested, that get no unit of work.
        commit_when: the caller's own rule in place of that one: status and exception in, commit or not out.

    Raises:
        ConfigurationError: an argument is wrong.
        EngineAlreadyBoundError: the pair has another engine in use.
    """

    _database: ClassVar[Database[Any]] = _default_database
    _current: ClassVar[ContextVar[UnitOfWork[Any] | NoUnit]] = _default_current

    def __init__(
        self,
        app: ASGIApp,
        db_url: str | URL | None = None,
        custom_engine: AsyncEngine | None = None,
        engine_args: Mapping[str, Any] | None = None,
        session_args: Mapping[str, Any] | None = None,
        commit_on_exit: bool = False,  # noqa: FBT001, FBT002  # the order that users of 0.8 know
        *,
        exclude_paths: Iterable[str] | None = None,
        commit_when: _options.CommitWhen | None = None,
    ) -> None:
        self.app = app
        self._commit_on_exit = _options.boolean("commit_on_exit", commit_on_exit)
        self._excluded = _options.paths("exclude_paths", exclude_paths)
        if commit_when is not None and not callable(commit_when):
            message = f"commit_when must be a function of a status and an exception, not {commit_when!r}."
            raise ConfigurationError(message)
        self._commit_when = commit_when
        self._bind(db_url, custom_engine, engine_args, session_args)
        remedy = "open `async with db():` for each message"
        self._no_unit_in_websocket = NoUnit(self._database, "in a WebSocket", remedy)
        remedy = "take it off exclude_paths, or open `async with db():`"
        self._no_unit_on_path = NoUnit(self._database, "on an excluded path", remedy)

    def _bind(
        self,
        db_url: str | URL | None,
        custom_engine: AsyncEngine | None,
        engine_args: Mapping[str, Any] | None,
        session_args: Mapping[str, Any] | None,
    ) -> None:
        if db_url is not None and custom_engine is not None:
            message = "db_url and custom_engine exclude each other: give one of them."
            raise ConfigurationError(message)
        if custom_engine is not None:
            engine, owned = _options.engine("custom_engine", custom_engine, engine_args)
            self._database.bind(engine, session_args)
        elif db_url is not None:
            self._database.bind(_options.create_engine(db_url, engine_args), session_args, owned=True)
        elif not self._database.connected:
            message = "give db_url or custom_engine, or call db.bind(engine) first."
            raise ConfigurationError(message)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection, or the lifespan."""
        if scope["type"] != "http" or (self._excluded and scope["path"] in self._excluded):
            await self._without_unit(scope, receive, send)
            return
        unit = UnitOfWork(self._database)
        exchange = _Exchange(self, unit, scope, send, scope.get("app"), sys.exception())
        token = self._current.set(unit)
        try:
            try:
                await self.app(scope, receive, exchange.send)
            except Exception:
                if exchange.failure is None:
                    raise
            if exchange.failure is not None:  # the application has unwound from its failed commit
                await exchange.answer(receive)
            if unit.opened is not None:
                await exchange.finish()
        except BaseException:
            await abandon(unit)
            raise
        finally:
            unit.closed = True
            self._current.reset(token)

    async def _without_unit(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._lifespan(scope, receive, send)
            return
        token = self._current.set(
            self._no_unit_in_websocket if scope["type"] == "websocket" else self._no_unit_on_path
        )
        try:
            await self.app(scope, receive, send)
        finally:
            self._current.reset(token)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Dispose an engine that was made here before the server hears of the end, and stops its loop."""

        async def forward(message: Message) -> None:
            if message["type"] in _LAST_LIFESPAN_MESSAGES:
                await self._database.release()
            await send(message)

        self._database.resume()
        try:
            await self.app(scope, receive, forward)
        finally:
            await self._database.release()


@define(eq=False)
class _Exchange:
    """One request's response on its way to the client."""

    _middleware: SQLAlchemyMiddleware[Any]
    _unit: UnitOfWork[Any]
    _scope: Scope
    _send: Send
    _app: object
    _outer_exception: BaseException | None
    failure: Exception | None = None
    """Why the response was abandoned: its commit failed."""
    _decision: bool | None = None
    _held: bool = False
    _complete: bool = False

    def send(self, message: Message) -> Awaitable[None]:
        """Settle the unit before the response starts, note the response's end, pass everything on."""
        if self.failure is not None:
            return _drop()
        kind = message["type"]
        if kind == "http.response.start":
            if self._unit.opened is not None or self._middleware._commit_when is not None:
                return self._start(message, sys.exception())
        elif (kind == "http.response.body" and not message.get("more_body")) or kind == "http.response.pathsend":
            self._complete = True
        return self._send(message)

    async def _start(self, message: Message, exception: BaseException | None) -> None:
        if exception is self._outer_exception:
            exception = None
        try:
            self._decision = self._decide(message["status"], exception)
            wrote = has_written(self._unit)
            self._held = await settle(self._unit, commit=self._decision)
        except Exception as error:
            self.failure = self._explain(error)
            await roll_back(self._unit)
            if self.failure is error:
                raise
            raise self.failure from error
        if wrote and self._decision and not self._held:
            self._scope.setdefault(_COMMITTED, []).append(self._middleware._database.name)
        await self._send(message)

    def _decide(self, status: int, exception: BaseException | None) -> bool | None:
        """Return True to commit, False to roll back, None to leave what was written to its owner."""
        rule = self._middleware._commit_when
        if rule is not None:
            return bool(rule(status, exception))
        if status >= _ERROR_STATUS or exception is not None:
            return False
        return self._middleware._commit_on_exit or None

    def _explain(self, error: Exception) -> Exception:
        committed = self._scope.get(_COMMITTED)
        if not committed:
            return error
        partial = PartialCommitError(committed, self._middleware._database.name)
        logger.error("%s", partial)
        return partial

    async def finish(self) -> None:
        """Settle what the tail began, or what its owner still holds, and close the unit."""
        if self.failure is not None:
            commit: bool | None = False
        elif self._held or self._middleware._commit_when is not None:
            commit = self._decision
        else:
            commit = self._middleware._commit_on_exit or None
        if commit and not self._complete:
            commit = False  # the client has left, or the application never finished its response
        try:
            await finish(self._unit, commit=commit)
        except Exception:
            logger.exception(
                "COMMIT on %s failed after the response had started: the client has been told of a success that "
                "does not include what came later.",
                self._middleware._database.name,
            )
            raise

    async def answer(self, receive: Receive) -> None:
        """Answer for a failed commit by the application's own handler; without one the error goes on."""
        failure = cast("Exception", self.failure)
        handler = self._handler(type(failure))
        if handler is None:
            raise failure
        request = Request(self._scope, receive)
        if inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(handler, "__call__", None)):
            response = await handler(request, failure)
        else:
            response = await run_in_threadpool(handler, request, failure)
        await response(self._scope, receive, self._send)

    def _handler(self, kind: type[Exception]) -> Callable[..., Any] | None:
        # a mounted application has put itself into the scope: its handlers come first, as for any error;
        # those for Exception belong to Starlette's ServerErrorMiddleware, outside, which also re-raises
        for app in (self._scope.get("app"), self._app):
            handlers: Mapping[Any, Callable[..., Any]] = getattr(app, "exception_handlers", {})
            for class_ in kind.__mro__:
                if class_ is not Exception and class_ in handlers:
                    return handlers[class_]
        return None


async def _drop() -> None:
    """Take the place of sending a message of an abandoned response."""


def create_middleware_and_session_proxy(session_class: type[S_co] | None = None) -> tuple[type[SQLAlchemyMiddleware[S_co]], SessionProxy[S_co]]:
    """Make the pair of one database: a middleware class, and the ``db`` that goes with it.

    Two pairs never see each other's engine, session or unit. ``session_class`` is the database's
    session class, which makes its proxy a type of its own; without it sessions are SQLModel's where
    SQLModel is installed, else SQLAlchemy's ``AsyncSession``.

    Raises:
        ConfigurationError: ``session_class`` is not an ``AsyncSession`` class.
    """
    if session_class is not None:
        _options.session_class("session_class", session_class)
    database, current, proxy = new_database(session_class)
    members = {"_database": database, "_current": current, "__module__": __name__, "__doc__": SQLAlchemyMiddleware.__doc__}
    return type("SQLAlchemyMiddleware", (SQLAlchemyMiddleware,), members), proxy
