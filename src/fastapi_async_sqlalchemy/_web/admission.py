"""Admission: a limit on how many requests reach the application at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

from attrs import Factory, define
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from .._arguments.checks import optional_count, optional_seconds
from .._session.plain import in_transaction
from .._unit.place import bound_here
from .._unit.unit import UnitOfWork
from ..exceptions import ConfigurationError
from .stepping import Stepped

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ADMITTED: Final = "fastapi_async_sqlalchemy.admitted"
"""The scope's key for the set of admissions that the request has passed."""
_MISTAKEN: Final = (400, 500)
"""The statuses by which FastAPI and others answer an unknown error while reading the body."""
_BUSY: Final = "Too busy, try again later."


@define(eq=False, repr=False)
class Places:
    """The places of one event loop; a free place goes to the request that has waited longest."""

    free: int
    returning: deque[asyncio.Future[None]] = Factory(deque["asyncio.Future[None]"])
    """Requests that had a place before; they come first."""
    arriving: deque[asyncio.Future[None]] = Factory(deque["asyncio.Future[None]"])

    def take_free(self) -> bool:
        """Take a place if one is free."""
        taken = self.free > 0
        self.free -= taken
        return taken

    async def take(self, waiting: deque[asyncio.Future[None]], seconds: float | None) -> bool:
        """Take a place, or wait for one; return whether it came in time."""
        if self.take_free():
            return True
        turn = asyncio.get_running_loop().create_future()
        waiting.append(turn)
        deadline = asyncio.timeout(seconds)
        try:
            async with deadline:
                await turn
        except BaseException as error:
            if turn.cancelled():
                with suppress(ValueError):  # give() has passed it over meanwhile
                    waiting.remove(turn)
            else:  # the place came too late
                self.give()
            if isinstance(error, TimeoutError) and deadline.expired():
                return False
            raise
        return True

    def give(self) -> None:
        """Give a place back."""
        for waiting in (self.returning, self.arriving):
            while waiting:
                turn = waiting.popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
        self.free += 1


@define(eq=False, repr=False)
class Admitted:
    """An admitted request, and its place."""

    places: Places
    timeout: float | None
    held: bool = True
    """False while it waits for the body from its client, and after it is over."""
    over: bool = False
    """Whether its response has started, or it has ended without one."""
    reading: bool = True
    """Whether more of its body is to come."""
    refused: HTTPException | None = None
    """The error raised when it did not get its place back in time."""

    def leave(self) -> None:
        """Give the place back, permanently or for a while."""
        if self.held:
            self.held = False
            self.places.give()

    async def receive(self, receive: Receive) -> Message:
        """Pass on the client's messages; the place is free for others while the body is awaited."""
        if self.at_body():
            return await self._receive_body(receive)
        return await receive()

    def at_body(self) -> bool:
        """Whether the client's next message may be awaited without a place."""
        return self.reading and not self.over

    async def _receive_body(self, receive: Receive) -> Message:
        listening = Stepped(receive())
        if not listening.done and not _holds_connection():
            self.leave()
        try:
            message = await listening
        except BaseException:  # Request.is_disconnected() cancels it, and goes on
            self.held = self.held or (not self.over and self.places.take_free())
            raise
        self.reading = message["type"] == "http.request" and message.get("more_body", False)
        if message["type"] == "http.request" and not (self.held or self.over or _holds_connection()):
            await self._return()
        return message

    def mistakes(self, status: int) -> bool:
        """Whether a response misreports the refusal as an error of the client or the application."""
        return self.refused is not None and status in _MISTAKEN

    def let_through(self, error: Exception) -> bool:
        """Whether an error is the refusal; a BaseHTTPMiddleware puts it in a group."""
        inside: tuple[Exception, ...] | None = getattr(error, "exceptions", None)
        if inside is not None:
            return all(self.let_through(one) for one in inside)
        return error is self.refused

    async def _return(self) -> None:
        """Take a place again, before newly arriving requests.

        This must not happen while a connection is held: the place's holder might be waiting for it.
        """
        self.held = await self.places.take(self.places.returning, self.timeout)
        if self.over:
            self.leave()
        elif not self.held:
            self.refused = HTTPException(503, _BUSY, _retry_after(self.timeout or 1))
            raise self.refused


@define(eq=False, repr=False)
class Admission:
    """A limit on concurrent requests, each counted until its response starts; the others wait."""

    limit: int
    timeout: float | None
    """In seconds; None waits indefinitely."""
    places: WeakKeyDictionary[asyncio.AbstractEventLoop, Places] = Factory(
        WeakKeyDictionary["asyncio.AbstractEventLoop", Places]
    )
    current: ContextVar[Admitted | None] = Factory(
        lambda: ContextVar["Admitted | None"]("fastapi_async_sqlalchemy.admitted", default=None)
    )
    """The request inside which another one may be made in process."""

    def admitted(self, scope: Scope) -> bool:
        """Whether the request needs no place: it has had one, or is part of a request that holds one."""
        outer = self.current.get()
        return self in scope.get(_ADMITTED, ()) or (outer is not None and outer.held)

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request when it gets a place; answer 503 if that is not in time."""
        scope.setdefault(_ADMITTED, set()).add(self)
        loop = asyncio.get_running_loop()
        places = self.places.get(loop)
        if places is None:
            places = self.places[loop] = Places(self.limit)
        if not await places.take(places.arriving, self.timeout):
            await unavailable(self.timeout or 1)(scope, receive, send)
            return
        request = Admitted(places, self.timeout)

        async def listen() -> Message:
            return await request.receive(receive)

        async def forward(message: Message) -> None:
            if message["type"] == "http.response.start" and not request.mistakes(message["status"]):
                request.over = True
                request.leave()
            if request.over:
                await send(message)

        token, answered = self.current.set(request), True
        try:
            await app(scope, listen, forward)
            answered = request.over or request.refused is None
        except Exception as error:
            answered = request.over or not request.let_through(error)
            if answered:
                raise
        finally:
            self.current.reset(token)
            request.over = True
            request.leave()
        if not answered:
            await unavailable(self.timeout or 1)(scope, receive, send)


def _holds_connection() -> bool:
    """Whether a unit of work visible in this context may hold a connection."""
    open_places = (place for place in bound_here() if not place.closed)
    return any(not isinstance(place, UnitOfWork) or _in_transaction(place) for place in open_places)


def _in_transaction(unit: UnitOfWork[Any]) -> bool:
    return unit._watched is not None and in_transaction(unit._watched)


def admission(limit: object, timeout: object) -> Admission | None:
    """Validate a middleware's limits and return its admission, if any."""
    seconds = optional_seconds("request_queue_timeout", timeout)
    places = optional_count("max_concurrent_requests", limit)
    if places is None:
        if seconds is not None:
            message = "request_queue_timeout goes with max_concurrent_requests, which says for what to wait."
            raise ConfigurationError(message)
        return None
    return Admission(places, seconds)


def unavailable(retry_after: float) -> PlainTextResponse:
    """Return a 503 response with ``Retry-After``."""
    return PlainTextResponse(_BUSY, 503, _retry_after(retry_after))


def _retry_after(seconds: float) -> dict[str, str]:
    """Return the header, in whole seconds."""
    return {"Retry-After": str(max(1, -int(-seconds // 1)))}
