"""Admission: only so many requests at a time get as far as the application."""

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
from .._unit.place import bound_here
from .._unit.unit import UnitOfWork
from ..exceptions import ConfigurationError
from .stepping import Stepped

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_ADMITTED: Final = "fastapi_async_sqlalchemy.admitted"
"""The scope's key of the set of admissions that the request has passed."""
_MISTAKEN: Final = (400, 500)
"""How FastAPI and others answer for an error of reading the body that they do not know."""
_BUSY: Final = "Too busy, try again later."


@define(eq=False, repr=False)
class Places:
    """The places of one event loop; a place that is given back goes to whoever has waited longest."""

    free: int
    returning: deque[asyncio.Future[None]] = Factory(deque["asyncio.Future[None]"])
    """Requests that had a place before, and come first."""
    arriving: deque[asyncio.Future[None]] = Factory(deque["asyncio.Future[None]"])

    def take_free(self) -> bool:
        """Take a place if there is one that nobody waits for."""
        taken = self.free > 0
        self.free -= taken
        return taken

    async def take(self, waiting: deque[asyncio.Future[None]], seconds: float | None) -> bool:
        """Take a place, or wait for one; returns whether it came in time."""
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
                with suppress(ValueError):  # it was passed over meanwhile
                    waiting.remove(turn)
            else:  # it has come, too late
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
    """A request that has been let in, and its place."""

    places: Places
    timeout: float | None
    held: bool = True
    """Not while it waits for its client's body, and not once it is over."""
    over: bool = False
    """Whether its response has started, or it has ended without one."""
    reading: bool = True
    """Whether more of its body is to come."""
    refused: HTTPException | None = None
    """What it was told when it did not have its place back in time."""

    def leave(self) -> None:
        """Give the place back, for good or for a while."""
        if self.held:
            self.held = False
            self.places.give()

    async def receive(self, receive: Receive) -> Message:
        """Hand out what the client sends; the place is another request's while the body is awaited."""
        if self.at_body():
            return await self._receive_body(receive)
        return await receive()

    def at_body(self) -> bool:
        """Whether what the client sends next may be awaited without a place."""
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
        """Whether an answer takes the refusal for a mistake of the client's or of the application's."""
        return self.refused is not None and status in _MISTAKEN

    def let_through(self, error: Exception) -> bool:
        """Whether an error is the refusal; a BaseHTTPMiddleware puts it in a group."""
        inside: tuple[Exception, ...] | None = getattr(error, "exceptions", None)
        if inside is not None:
            return all(self.let_through(one) for one in inside)
        return error is self.refused

    async def _return(self) -> None:
        """Take a place again, before those who come only now.

        Not with a connection in hand: who has the place might be waiting for a connection.
        """
        self.held = await self.places.take(self.places.returning, self.timeout)
        if self.over:
            self.leave()
        elif not self.held:
            self.refused = HTTPException(503, _BUSY, _retry_after(self.timeout or 1))
            raise self.refused


@define(eq=False, repr=False)
class Admission:
    """Lets so many requests in at a time, each until its response starts; the others wait."""

    limit: int
    timeout: float | None
    """In seconds; None waits as long as it takes."""
    places: WeakKeyDictionary[asyncio.AbstractEventLoop, Places] = Factory(
        WeakKeyDictionary["asyncio.AbstractEventLoop", Places]
    )
    current: ContextVar[Admitted | None] = Factory(
        lambda: ContextVar["Admitted | None"]("fastapi_async_sqlalchemy.admitted", default=None)
    )
    """The request from within which another one may be made in process."""

    def admitted(self, scope: Scope) -> bool:
        """Whether the request needs no place: it has had its own, or is part of one that holds its place."""
        outer = self.current.get()
        return self in scope.get(_ADMITTED, ()) or (outer is not None and outer.held)

    async def serve(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request when it is its turn; answer 503 if that does not come in time."""
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
    """Whether a unit of work that can be seen here may hold a connection."""
    open_places = (place for place in bound_here() if not place.closed)
    return any(not isinstance(place, UnitOfWork) or _in_transaction(place) for place in open_places)


def _in_transaction(unit: UnitOfWork[Any]) -> bool:
    return unit._watched is not None and unit._watched.in_transaction()


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
    """Return 503 with ``Retry-After``."""
    return PlainTextResponse(_BUSY, 503, _retry_after(retry_after))


def _retry_after(seconds: float) -> dict[str, str]:
    """Return the header, in whole seconds."""
    return {"Retry-After": str(max(1, -int(-seconds // 1)))}
