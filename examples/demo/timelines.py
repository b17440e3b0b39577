"""Timelines of requests, recorded by an observer, SQLAlchemy's statement events and a middleware.

The observer is notified of transactions and connections. Statements come from the engine's events, and the
response from the messages that pass the middleware. Nothing here waits or writes to the database.
"""

from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count
from time import perf_counter
from typing import Literal

from attrs import define, field
from pydantic import BaseModel
from sqlalchemy import Engine, ExceptionContext, event
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import override

from fastapi_async_sqlalchemy import ObservedTransaction, ObservedUnit, Observer

Kind = Literal["connection", "statement", "commit", "rollback", "response", "left"]


class Mark(BaseModel):
    """A part of a timeline, in milliseconds since the request began."""

    kind: Kind
    text: str
    start: float
    end: float
    error: str | None = None
    """The class of the error that ended it."""


class StoredTimeline(BaseModel):
    """A request that has ended."""

    number: int
    request: str
    status: int | None
    marks: list[Mark]
    statements: int = 0
    held: float = 0
    committing: float = 0


@define(eq=False)
class Timeline:
    """A request in progress."""

    stored: StoredTimeline
    began: float = field(factory=perf_counter)
    held: Mark | None = None
    """The connection, while one is held."""
    settling: Mark | None = None
    """COMMIT or ROLLBACK of the current transaction, once it has been sent."""

    def mark(self, kind: Kind, text: str, *, error: str | None = None) -> Mark:
        """Add a mark at the current time."""
        now = (perf_counter() - self.began) * 1e3
        mark = Mark(kind=kind, text=text, start=now, end=now, error=error)
        self.stored.marks.append(mark)
        return mark

    def end(self, mark: Mark) -> None:
        """End a mark at the current time."""
        mark.end = (perf_counter() - self.began) * 1e3


RECORDED = {"/transfers", "/payday"}

here = ContextVar[Timeline | None]("timeline", default=None)
"""The request's timeline; a task that the request starts inherits it."""


class Timelines(Observer):
    """The last hundred requests."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._last = deque[StoredTimeline](maxlen=100)

    def ended(self, after: int) -> list[StoredTimeline]:
        """Return the requests that have ended since a number, in order."""
        return [timeline for timeline in self._last if timeline.number > after]

    @contextmanager
    def record(self, request: str) -> Generator[Timeline]:
        """Give a request a timeline, and store it when the application has returned."""
        timeline = Timeline(StoredTimeline(number=0, request=request, status=None, marks=[]))
        token = here.set(timeline)
        try:
            yield timeline
        finally:
            here.reset(token)
            timeline.stored.number = next(self._numbers)
            timeline.stored.marks.sort(key=lambda mark: mark.start)
            self._last.append(timeline.stored)

    @override
    def wait_ended(self, unit: ObservedUnit, seconds: float, error: BaseException | None) -> None:
        """Note that a connection is held from now on, unless none became free."""
        if timeline := here.get():
            mark = timeline.mark("connection", "connection", error=type(error).__name__ if error else None)
            timeline.held = None if error else mark

    @override
    def transaction_ended(self, unit: ObservedUnit, transaction: ObservedTransaction) -> None:
        """Note that the connection is released, and that COMMIT or ROLLBACK has ended."""
        timeline = here.get()
        if timeline is None:
            return
        for mark in (timeline.held, timeline.settling):
            if mark is not None:
                timeline.end(mark)
        commit = timeline.settling
        if commit is not None and transaction.commit_error:
            rollback = timeline.mark("rollback", "ROLLBACK")
            commit.error = transaction.commit_error
            commit.end = rollback.start = min(commit.start + transaction.committing * 1e3, rollback.end)
        timeline.held = timeline.settling = None

    @override
    def unit_closed(self, unit: ObservedUnit) -> None:
        """Add the outcome of the whole unit."""
        if timeline := here.get():
            stored, stats = timeline.stored, unit.stats
            stored.statements = stats.statements
            stored.held, stored.committing = stats.held * 1e3, stats.committing * 1e3

    def watch(self, engine: Engine) -> None:
        """Add the statements of an engine."""
        watch_statements(engine)

        def commit(_: object) -> None:
            if timeline := here.get():
                timeline.settling = timeline.mark("commit", "COMMIT")

        def rollback(_: object) -> None:
            if timeline := here.get():
                timeline.settling = timeline.mark("rollback", "ROLLBACK")

        event.listen(engine, "commit", commit)
        event.listen(engine, "rollback", rollback)


def watch_statements(engine: Engine) -> None:
    """Add each statement of an engine, from sending it until its result or error."""
    sent: dict[object, Mark] = {}

    def before(_: object, cursor: object, statement: str, *__: object) -> None:
        if timeline := here.get():
            sent[cursor] = timeline.mark("statement", shorten(statement))

    def after(_: object, cursor: object, *__: object) -> None:
        if (timeline := here.get()) and (mark := sent.pop(cursor, None)):
            timeline.end(mark)

    def failed(context: ExceptionContext) -> None:
        cursor = getattr(context.execution_context, "cursor", None)
        if (timeline := here.get()) and (mark := sent.pop(cursor, None)):
            timeline.end(mark)
            mark.error = type(context.sqlalchemy_exception).__name__

    event.listen(engine, "before_cursor_execute", before)
    event.listen(engine, "after_cursor_execute", after)
    event.listen(engine, "handle_error", failed)


def shorten(statement: str) -> str:
    """Return a statement's verb and its table."""
    words = statement.split()
    before_table = {"SELECT": "FROM", "INSERT": "INTO", "DELETE": "FROM", "UPDATE": "UPDATE"}.get(words[0])
    if before_table not in words[:-1]:
        return words[0]
    table = words[words.index(before_table) + 1]
    return f"{words[0]} {table}"


class TimelinesMiddleware:
    """Records each request, but not the page itself."""

    def __init__(self, app: ASGIApp, timelines: Timelines) -> None:
        self._app = app
        self._timelines = timelines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Record a request, from its arrival until the application has returned."""
        if scope["type"] != "http" or scope["path"] not in RECORDED:
            await self._app(scope, receive, send)
            return
        with self._timelines.record(f"{scope['method']} {scope['path']}") as timeline:
            response: Mark | None = None
            complete = False

            async def listen() -> Message:
                message = await receive()
                if message["type"] == "http.disconnect" and not complete:
                    timeline.mark("left", "the client left")
                return message

            async def forward(message: Message) -> None:
                nonlocal response, complete
                if message["type"] == "http.response.start":
                    timeline.stored.status = message["status"]
                    response = timeline.mark("response", f"response {message['status']}")
                await send(message)
                complete = message["type"] == "http.response.body" and not message.get("more_body")
                if response is not None:
                    timeline.end(response)

            await self._app(scope, listen, forward)
