"""A request: its unit of work, settled before the response starts, and the response's way to the client."""

from __future__ import annotations

import inspect
import logging
import sys
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from attrs import define, field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request

from ._lifecycle import Lifecycle
from ._task_units import TaskUnits
from ._unit import UnitOfWork
from .exceptions import PartialCommitError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping

    from starlette.types import Message, Receive, Scope, Send

    from ._database import Database
    from ._options import CommitPolicy
    from ._session import ObservedSession

logger = logging.getLogger("fastapi_async_sqlalchemy")

_KEPT_PARTS: Final = 256
_KEPT_BYTES: Final = 1 << 20
"""As much of a request's body is kept for the handler of a failed commit."""
_TOO_LONG: Final = ({"type": "http.disconnect"},)
"""What that handler is given in place of a longer body, so that it does not wait for one that has gone."""
_LAST_OF_A_RESPONSE: Final = frozenset(
    {"http.response.body", "http.response.pathsend", "http.response.zerocopysend"}
)
"""The messages of which the last one, without ``more_body``, ends the body."""


@define(eq=False, repr=False, weakref_slot=False)
class RequestUnit(UnitOfWork[Any]):
    """A request's unit, and its response on its way to the client: one object, as every request makes it."""

    policy: CommitPolicy = field(init=False)
    listen: Receive = field(init=False)
    forward: Send = field(init=False)
    app: object = field(init=False)
    outer_exception: BaseException | None = field(init=False)
    failure: Exception | None = None
    """Why the response was abandoned: its commit failed."""
    standing: bool | None = None
    """What the start of the response decided for the rest as well; None if that is decided anew."""
    sent: Literal["nothing", "start", "end", "all", "cut"] = "nothing"
    """How much of the response has gone out, or is about to; cut is one that will not go out whole."""
    heard: tuple[Message, ...] = ()
    """The request's body, as far as the application has asked for it."""
    committed: list[Database[Any]] | None = None
    """The databases that middlewares inside have committed."""

    @property
    def scope(self) -> Scope:
        """The request's scope."""
        return cast("Scope", self.request)

    def send(self, message: Message) -> Awaitable[None]:
        """Settle the unit before the response starts, note the response's end, pass everything on."""
        sent = self.sent
        if sent == "nothing":
            if message["type"] == "http.response.start":
                self.sent = "start"
                if self.opened is not None or self.policy.commit_when is not None:
                    return self.start(message, sys.exception())
        elif sent == "start":
            if message["type"] in _LAST_OF_A_RESPONSE and not message.get("more_body"):
                return self.end(message)
        elif self.failure is not None:
            return _drop()
        return self.forward(message)

    async def end(self, message: Message) -> None:
        """Forward the last message of the body, and note that it went out."""
        self.sent = "end"
        await self.forward(message)
        self.sent = "all"

    async def receive(self) -> Message:
        """Pass on what the client sends; that it left is noted, as some middlewares end the body then."""
        message = await self.listen()
        if message["type"] == "http.request":
            self.heard = _with(self.heard, message)
        elif self.sent == "start":
            self.sent = "cut"
        return message

    async def replay(self) -> Message:
        """Hand the request's body out once more, to whoever answers for a failed commit."""
        if not self.heard:
            return await self.listen()
        message, *rest = self.heard
        self.heard = tuple(rest)
        return message

    async def start(self, message: Message, exception: BaseException | None) -> None:
        """Settle, then forward at once; a failed commit abandons the response and unwinds the application."""
        if exception is self.outer_exception:
            exception = None
        session = self.watched
        if session is not None and not (self.hooks or session.in_transaction()):
            session = None  # nothing is awaited for it
        if session is not None:
            session.uow_settling = True
        try:
            decision = self.policy.response(message["status"], exception)
            held = await self.settle(commit=decision)
        except Exception as error:  # noqa: BLE001  # raised again below, as it is or as a cause
            self.failure = failure = self.told(error)
            self.sent = "cut"
            await self.roll_back()
            raise failure  # noqa: B904  # it is the error itself, or has it as its cause
        except BaseException:  # cut short, and something inside may answer for it
            self.sent = "nothing"
            raise
        finally:
            if session is not None:
                session.uow_settling = False
        if held or self.policy.commit_when is not None:
            self.standing = decision
        self.heard = ()
        if session is not None:
            session.uow_resume()
        self.note(self.watched)
        await self.forward(message)

    def note(self, session: ObservedSession | None) -> None:
        """Let the middlewares outside know that this database has committed something."""
        if session is not None and session.uow_wrote:
            for unit in self.others():
                unit.committed = [*(unit.committed or ()), self.database]

    def others(self) -> Iterator[RequestUnit]:
        """Find the units of other middlewares that the request has passed, as far as they can be seen here.

        Each is bound to a variable of its own in this very context; the scope may be a copy on either side.
        """
        for bound in copy_context().values():
            unit = bound
            while isinstance(unit, Lifecycle | TaskUnits):
                if isinstance(unit, RequestUnit) and unit is not self and unit.belongs_to(self.scope):
                    yield unit
                unit = unit.outer

    def told(self, error: Exception) -> Exception:
        """Return the error of a commit, or what tells that other databases have committed before it."""
        sessions = [(unit.database, unit.watched) for unit in self.others()]
        by_hand = [database for database, session in sessions if session is not None and session.uow_wrote]
        names = dict.fromkeys(database.name for database in (*(self.committed or ()), *by_hand))
        if not names:
            return error
        failure = PartialCommitError([*names], self.database.name)
        failure.__cause__ = error
        logger.error("%s", failure)
        return failure

    async def finish_tail(self) -> None:
        """Settle what the tail began, or what its owner still holds, and close the unit."""
        commit: bool | None = False
        if self.failure is None:
            commit = self.policy.tail(self.standing, complete=self.sent == "all")
        session = self.watched
        try:
            await self.finish(commit=commit)
        except Exception as error:
            logger.exception(
                "COMMIT on %s failed after the response had started: the client has been told of a success "
                "that does not include what came later.",
                self.database.name,
            )
            raise self.told(error)  # noqa: B904  # as above
        self.note(session)

    async def answer(self) -> None:
        """Answer for a failed commit by the application's own handler; without one the error goes on."""
        failure = cast("Exception", self.failure)
        handler = self.handler(failure)
        if handler is None:
            raise failure
        request = Request(self.scope, self.replay)
        if inspect.iscoroutinefunction(handler):
            response = await handler(request, failure)
        else:
            response = await run_in_threadpool(handler, request, failure)
            if inspect.isawaitable(response):  # an object whose __call__ is a coroutine function
                response = await response
        await response(self.scope, self.listen, self.forward)

    def handler(self, error: Exception) -> Callable[..., Any] | None:
        """Find the handler of an error as Starlette does."""
        # a mounted application has put itself into the scope: its handlers come first, as for any error;
        # those for Exception belong to Starlette's ServerErrorMiddleware, outside, which also re-raises
        for app in (self.scope.get("app"), self.app):
            handlers: Mapping[Any, Callable[..., Any]] = getattr(app, "exception_handlers", {})
            if isinstance(error, HTTPException) and error.status_code in handlers:
                return handlers[error.status_code]
            for class_ in type(error).__mro__:
                if class_ is not Exception and class_ in handlers:
                    return handlers[class_]
        return ExceptionMiddleware(_drop).http_exception if isinstance(error, HTTPException) else None


def _with(heard: tuple[Message, ...], message: Message) -> tuple[Message, ...]:
    """Add a part to a body, unless that gets too long."""
    if heard is _TOO_LONG or len(heard) >= _KEPT_PARTS:
        return _TOO_LONG
    size = sum(len(part.get("body", b"")) for part in (*heard, message))
    return (*heard, message) if size <= _KEPT_BYTES else _TOO_LONG


async def _drop(*_: object) -> None:
    """Take the place of sending a message of an abandoned response."""
