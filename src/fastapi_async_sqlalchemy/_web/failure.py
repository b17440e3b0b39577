"""The answer for a failed COMMIT, by the application's own handler of the error."""

from __future__ import annotations

import inspect
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from attrs import Factory, define
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from starlette.types import Message, Receive, Scope, Send

_KEPT_PARTS: Final = 256
_KEPT_BYTES: Final = 1 << 20
"""The longest request body that is kept for the handler of a failed commit."""
_KEPT_IN_ALL: Final = 64 << 20
"""The most that one middleware keeps for all its requests."""
NOT_KEPT: Final[tuple[Message, ...]] = ({"type": "http.disconnect"},)
"""Replaces a body that was not kept, so that the handler does not wait for messages already read."""
_OUTSIDE: Final = frozenset[object]({500, Exception})
"""The keys of Starlette's outer ServerErrorMiddleware, whose handler also re-raises."""
_NEVER_READ: Final = frozenset({"starlette", "fastapi", __name__.partition(".")[0]})
"""The packages whose own handlers answer without reading the request's body."""


async def answer(
    failure: Exception, app: object, scope: Scope, *, replay: Receive, receive: Receive, send: Send
) -> None:
    """Answer a failed commit by the application's own handler; without one, raise the error."""
    handler = _handler(failure, app, scope)
    if handler is None:
        raise failure
    request = Request(scope, replay)
    if inspect.iscoroutinefunction(handler):
        response = await handler(request, failure)
    else:
        response = await run_in_threadpool(handler, request, failure)
        if inspect.isawaitable(response):  # an object whose __call__ is a coroutine function
            response = await response
    await response(scope, receive, send)


def _handler(error: Exception, app: object, scope: Scope) -> Callable[..., Any] | None:
    """Find the handler of an error as Starlette does."""
    # a mounted application replaces scope["app"]: its handlers come first, as for any error
    for one in (scope.get("app"), app):
        handlers: Mapping[Any, Callable[..., Any]] = getattr(one, "exception_handlers", {})
        keys = (error.status_code,) if isinstance(error, HTTPException) else ()
        for key in (*keys, *type(error).__mro__):
            if key not in _OUTSIDE and key in handlers:
                return handlers[key]
    return ExceptionMiddleware(drop).http_exception if isinstance(error, HTTPException) else None


def may_be_asked(app: object, scope: Scope) -> bool:
    """Whether a handler that could read the request's body may answer for a failed commit."""
    applications = [one for one in (scope.get("app"), app) if one is not None]
    routed = "router" in scope
    return not applications or any(_reads(one) or not (routed or _is_flat(one)) for one in applications)


def _reads(app: object) -> bool:
    """Whether an application has such a handler."""
    handlers: Mapping[Any, object] = getattr(app, "exception_handlers", {})
    return any(
        key not in _OUTSIDE and getattr(handler, "__module__", "").partition(".")[0] not in _NEVER_READ
        for key, handler in handlers.items()
    )


def _is_flat(app: object) -> bool:
    """Whether no other application can be mounted in an application."""
    routes: list[object] = getattr(app, "routes", [])
    return all(isinstance(route, Route) for route in routes)


@define(eq=False, repr=False)
class KeptBodies:
    """The request bodies that a middleware keeps for the handlers of failed commits."""

    size: int = 0
    _lock: Lock = Factory(Lock)
    """A middleware may serve several event loops."""

    def keep(self, received: tuple[Message, ...], message: Message) -> tuple[Message, ...]:
        """Add a part to a request's body, unless that body or the total becomes too long."""
        if received is NOT_KEPT:
            return received
        before, size = _size(received), _size((message,))
        if len(received) < _KEPT_PARTS and before + size <= _KEPT_BYTES:
            with self._lock:
                if self.size + size <= _KEPT_IN_ALL:
                    self.size += size
                    return (*received, message)
        self.release(received)
        return NOT_KEPT

    def release(self, received: tuple[Message, ...]) -> None:
        """Stop counting a request's body."""
        with self._lock:
            self.size -= _size(received)


def _size(received: tuple[Message, ...]) -> int:
    return sum(len(part.get("body", b"")) for part in received)


async def drop(*_: object) -> None:
    """Replace the sending of a message of an abandoned response."""
