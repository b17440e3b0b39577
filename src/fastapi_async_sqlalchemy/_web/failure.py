"""The answer for a COMMIT that failed: by the application's own handler of the error."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from starlette.types import Message, Receive, Scope, Send

_KEPT_PARTS: Final = 256
_KEPT_BYTES: Final = 1 << 20
"""The part of a request's body that is kept for the handler of a failed commit."""
_TOO_LONG: Final = ({"type": "http.disconnect"},)
"""What that handler is given in place of a longer body, so that it does not wait for what was read."""


async def answer(
    failure: Exception, app: object, scope: Scope, *, replay: Receive, receive: Receive, send: Send
) -> None:
    """Answer for a failed commit by the application's own handler; without one, raise the error."""
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
    # a mounted application has put itself into the scope: its handlers come first, as for any error;
    # those for Exception belong to Starlette's ServerErrorMiddleware, outside, which also re-raises
    for one in (scope.get("app"), app):
        handlers: Mapping[Any, Callable[..., Any]] = getattr(one, "exception_handlers", {})
        if isinstance(error, HTTPException) and error.status_code in handlers:
            return handlers[error.status_code]
        for class_ in type(error).__mro__:
            if class_ is not Exception and class_ in handlers:
                return handlers[class_]
    return ExceptionMiddleware(drop).http_exception if isinstance(error, HTTPException) else None


def keep(received: tuple[Message, ...], message: Message) -> tuple[Message, ...]:
    """Add a part to a request's body, unless the body grows too long."""
    if received is _TOO_LONG or len(received) >= _KEPT_PARTS:
        return _TOO_LONG
    size = sum(len(part.get("body", b"")) for part in (*received, message))
    return (*received, message) if size <= _KEPT_BYTES else _TOO_LONG


async def drop(*_: object) -> None:
    """Take the place of sending a message of an abandoned response."""
