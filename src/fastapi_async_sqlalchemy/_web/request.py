"""A request: its unit of work, settled before the response starts, and the sending of its response."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from attrs import define, field

from .._session.ending import resume
from .._session.plain import in_transaction
from .._unit.place import bound_here
from .._unit.settling import Decision, Outcome, finish, roll_back, settle
from .._unit.unit import UnitOfWork
from ..exceptions import PartialCommitError
from .failure import NOT_KEPT, answer, drop, may_be_asked

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator

    from starlette.types import Message, Receive, Scope, Send

    from .._session.state import StatefulSession
    from .._unit.database import Database
    from .failure import KeptBodies
    from .policy import CommitPolicy

logger = logging.getLogger("fastapi_async_sqlalchemy")

_LAST_OF_A_RESPONSE: Final = frozenset(
    {"http.response.body", "http.response.pathsend", "http.response.zerocopysend"}
)
"""The messages of which the last one, without ``more_body``, ends the body."""


@define(eq=False, repr=False, weakref_slot=False)
class RequestUnit(UnitOfWork[Any]):
    """A request's unit and its response, in one object because every request creates it."""

    _policy: CommitPolicy
    _listen: Receive
    _forward: Send
    _bodies: KeptBodies | None
    """None where no COMMIT of a response can fail."""
    _outer_exception: BaseException | None = field(init=False)
    _app: object = field(init=False)
    """The application, whose exception handlers may answer for a failed commit."""
    _failure: Exception | None = None
    """The commit's error, for which the response was abandoned."""
    _standing: Decision | None = None
    """The decision of the response's start, if it holds for the rest as well."""
    _sent: Literal["nothing", "start", "end", "all", "cut"] = "nothing"
    """How much of the response has been sent, or is being sent; ``cut`` is one that stays incomplete."""
    _received: tuple[Message, ...] = ()
    """The request's body, as far as the application has read it before its response started."""
    _ahead: int = 0
    """How many messages are being sent, since the start, that later ones must not overtake."""
    _order: asyncio.Lock | None = None
    """The queue of waiting messages, created by the first one; the start holds it until it was sent."""
    _committed: list[Database[Any]] | None = None
    """The databases that inner middlewares have committed."""

    async def _in_turn(self, message: Message) -> None:
        """Pass a message on once all earlier ones, of any task, have been forwarded."""
        self._ahead += 1
        try:
            if self._order is None:
                self._order = asyncio.Lock()
                await self._order.acquire()  # on behalf of the start
            async with self._order:
                # the rest of a response whose start was cut short is dropped: another one may come
                if self._sent != "nothing" or message["type"] == "http.response.start":
                    await self._send(message, waited=True)
        finally:
            self._leave_queue()

    def _leave_queue(self) -> None:
        self._ahead -= 1
        if not self._ahead:
            self._order = None

    def _send(self, message: Message, *, waited: bool = False) -> Awaitable[None]:
        """Settle the unit before the response starts, record the response's end, pass everything on.

        A message that would overtake another one waits.
        """
        if self._ahead and not waited:
            return self._in_turn(message)
        sent = self._sent
        if sent == "nothing":
            if message["type"] == "http.response.start":
                self._sent = "start"
                session = self._watched
                if self._policy.commit_when is not None or (session is not None and self._unsettled(session)):
                    return self._start(message, sys.exception())
                if self._received:
                    self._forget_body(())
        elif sent == "start":
            if message["type"] in _LAST_OF_A_RESPONSE and not message.get("more_body"):
                return self._end(message)
        elif self._failure is not None:
            return drop()
        return self._forward(message)

    def _unsettled(self, session: StatefulSession) -> bool:
        """Whether something is left to settle when the response starts."""
        if self._hooks is not None or self._joined or in_transaction(session):
            return True
        if session._fastapi_async_sqlalchemy.committed_writes:
            self._note_commit(session)
        return False

    async def _start(self, message: Message, exception: BaseException | None) -> None:
        """Settle, then forward; messages sent meanwhile wait, and are dropped if the commit fails."""
        first = not self._ahead
        self._ahead += 1
        try:
            if exception is self._outer_exception:
                exception = None
            await self._settle(self._watched, message["status"], exception)
            await self._forward(message)
        finally:
            if first and self._order is not None:
                self._order.release()
            self._leave_queue()

    async def _settle(
        self, session: StatefulSession | None, status: int, exception: BaseException | None
    ) -> None:
        """Settle for a response; a failed commit abandons it and unwinds the application."""
        if session is not None:
            session._fastapi_async_sqlalchemy.settling = True
        try:
            decision = self._policy.response(status, exception)
            held = await settle(self, decision) is Outcome.HELD
        except Exception as error:  # noqa: BLE001  # raised again below, as it is or as a cause
            self._failure = failure = self._reported(error)
            self._sent = "cut"
            await roll_back(self)
            raise failure  # noqa: B904  # the error itself, or has it as its cause
        except BaseException:  # cut short; something inside may answer instead
            self._sent = "nothing"
            raise
        finally:
            if session is not None:
                session._fastapi_async_sqlalchemy.settling = False
        if held or self._policy.commit_when is not None:
            self._standing = decision
        if self._received:
            self._forget_body(())
        if session is not None:
            resume(session)
        self._note_commit(self._watched)

    async def _end(self, message: Message) -> None:
        """Forward the last message of the body, and record that it was sent."""
        self._sent = "end"
        await self._forward(message)
        self._sent = "all"

    async def _receive(self) -> Message:
        """Pass on the client's messages; record a disconnect, as some middlewares end the body then."""
        message = await self._listen()
        if message["type"] == "http.request":
            if self._bodies is not None:
                self._keep(self._bodies, message)
        elif self._sent == "start":
            self._sent = "cut"
        return message

    def _keep(self, bodies: KeptBodies, message: Message) -> None:
        """Keep a part of the request's body while the response's commit may fail."""
        asked = not message.get("body") or may_be_asked(self._app, self._scope or {})
        session = self._watched
        undecided = self._sent == "nothing" or (
            session is not None and session._fastapi_async_sqlalchemy.settling and self._sent == "start"
        )
        if asked and undecided:
            self._received = bodies.keep(self._received, message)
        else:
            self._forget_body(NOT_KEPT)

    def _forget_body(self, rest: tuple[Message, ...]) -> None:
        """Stop keeping the request's body; ``rest`` is given to the handler instead."""
        if self._bodies is not None:
            self._bodies.release(self._received)
        self._received = rest

    async def _replay(self) -> Message:
        """Replay the request's body to the handler of a failed commit."""
        if not self._received:
            return await self._listen()
        message, *rest = self._received
        if self._bodies is not None:
            self._bodies.release((message,))
        self._received = tuple(rest)
        return message

    async def _answer(self) -> None:
        """Answer for the failed commit."""
        scope, failure = cast("Scope", self._scope), cast("Exception", self._failure)
        await answer(failure, self._app, scope, replay=self._replay, receive=self._listen, send=self._forward)

    async def _finish_tail(self) -> None:
        """Settle work begun after the response's start, or still held by its owner, and close the unit."""
        decision = Decision.ROLLBACK
        if self._failure is None:
            decision = self._policy.tail(self._standing, complete=self._sent == "all")
        session = self._watched
        try:
            await finish(self, decision)
        except Exception as error:
            logger.exception(
                "COMMIT on %s failed after the response had started: the client has received a success "
                "that does not include what came later.",
                self._database.name,
                extra=self._database.shared.fields(None if session is None else session.hash_key),
            )
            raise self._reported(error)  # noqa: B904  # the error itself, or has it as its cause
        self._note_commit(session)

    def _note_commit(self, session: StatefulSession | None) -> None:
        """Inform outer middlewares that this database has committed writes."""
        if session is not None and session._fastapi_async_sqlalchemy.committed_writes:
            for unit in self._others():
                unit._committed = [*(unit._committed or ()), self._database]

    def _others(self) -> Iterator[RequestUnit]:
        """Yield the units of other middlewares that the request has passed and that this context shows.

        Each is bound to a separate variable in this context; the scope may be a copy on either side.
        """
        scope = cast("Scope", self._scope)
        for place in bound_here():
            if isinstance(place, RequestUnit) and place is not self and place._belongs_to(scope):
                yield place

    def _reported(self, error: Exception) -> Exception:
        """Return the error of a commit, or one that names the databases which committed before it."""
        sessions = [(unit._database, unit._watched) for unit in self._others()]
        explicitly = [
            database
            for database, session in sessions
            if session is not None and session._fastapi_async_sqlalchemy.committed_writes
        ]
        names = dict.fromkeys(database.name for database in (*(self._committed or ()), *explicitly))
        if not names:
            return error
        failure = PartialCommitError([*names], self._database.name)
        failure.__cause__ = error
        logger.error("%s", failure, extra=self._fields())
        return failure
