"""Admission: only so many requests at a time get as far as the application."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

from attrs import Factory, define
from starlette.responses import PlainTextResponse

from .._arguments.checks import optional_count, optional_seconds
from ..exceptions import ConfigurationError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ADMITTED: Final = "fastapi_async_sqlalchemy.admitted"
"""The scope's key of the set of admissions that the request has passed."""


@define(eq=False, repr=False)
class Admission:
    """Lets so many requests in at a time, each until its response starts; the others wait."""

    limit: int
    timeout: float | None
    """In seconds; None waits as long as it takes."""
    places: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = Factory(
        WeakKeyDictionary["asyncio.AbstractEventLoop", "asyncio.Semaphore"]
    )

    def admitted(self, scope: Scope) -> bool:
        """Whether the request has its place, or has had it."""
        return self in scope.get(_ADMITTED, ())

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request when it is its turn; answer 503 if that does not come in time."""
        scope.setdefault(_ADMITTED, set()).add(self)
        loop = asyncio.get_running_loop()
        places = self.places.get(loop)
        if places is None:
            places = self.places[loop] = asyncio.Semaphore(self.limit)
        deadline = asyncio.timeout(self.timeout)
        try:
            async with deadline:
                await places.acquire()
        except TimeoutError:
            if not deadline.expired():
                raise
            await unavailable(self.timeout or 1)(scope, receive, send)
            return
        held = True

        def release() -> None:
            nonlocal held
            if held:
                held = False
                places.release()

        async def forward(message: Message) -> None:
            if message["type"] == "http.response.start":
                release()
            await send(message)

        try:
            await app(scope, receive, forward)
        finally:
            release()


def admission(limit: object, timeout: object) -> Admission | None:
    """Return the admission that a middleware asks for, checked."""
    seconds = optional_seconds("request_queue_timeout", timeout)
    places = optional_count("max_concurrent_requests", limit)
    if places is None:
        if seconds is not None:
            message = "request_queue_timeout goes with max_concurrent_requests, which says for what to wait."
            raise ConfigurationError(message)
        return None
    return Admission(places, seconds)


def unavailable(retry_after: float) -> PlainTextResponse:
    """Return 503 with ``Retry-After``, in whole seconds."""
    seconds = max(1, -int(-retry_after // 1))
    return PlainTextResponse("Too busy, try again later.", 503, {"Retry-After": str(seconds)})
