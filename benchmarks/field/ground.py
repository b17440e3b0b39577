"""What a scenario stands on: an application with a contender's session, and ways to drive it."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from typing import Any

from attrs import define, field
from fastapi import FastAPI, Request, Response
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from starlette.middleware import Middleware
from starlette.types import Message, Scope

from tests.support.databases import Judge
from tests.support.serving import run_lifespan

NOTES = "SELECT text FROM note ORDER BY text"
Look = Callable[[], Awaitable[None]]


@define(eq=False)
class Ground:
    """An application without routes yet, and the session that a contender gives it."""

    app: FastAPI
    engine: AsyncEngine
    """The contender's: it has two connections at most."""
    session: Any
    """What a route takes as the default of its parameter: a `Depends`."""
    block: Callable[[], AbstractAsyncContextManager[AsyncSession]]
    """A session outside requests, committed at the end of its block."""
    ambient: Callable[[], Awaitable[AsyncSession]] | None = None
    """The request's session, for a function that has no parameter for it."""
    judge: Judge = field(init=False)
    used: list[AsyncSession] = field(factory=list[AsyncSession])
    """Sessions that are closed when the scenario has ended, whatever it left."""

    async def current(self, session: AsyncSession) -> AsyncSession:
        """Return the session as code outside the signature has it: asked for anew, or else passed on."""
        if self.ambient is not None:
            session = await self.ambient()
        self.used.append(session)
        return session

    async def notes(self) -> list[object]:
        """Return the texts of the notes that are committed."""
        return [text for (text,) in await self.judge.rows(NOTES)]

    def out(self) -> int:
        """Return how many connections are out of the pool."""
        pool: Any = self.engine.pool
        return int(pool.checkedout())


Open = Callable[[FastAPI, str], AbstractAsyncContextManager[Ground]]
"""Gives an application a contender's session, on the database of a URL."""


async def _conflict(_: Request, __: Exception) -> Response:
    return Response(status_code=409)


@asynccontextmanager
async def standing(opened: Open, url: str, *inside: Middleware) -> AsyncGenerator[Ground]:
    """Stand on a contender, its application started; afterwards what the scenario left is closed."""
    app = FastAPI(exception_handlers={IntegrityError: _conflict}, middleware=inside)
    async with opened(app, url) as ground, Judge(url) as ground.judge, run_lifespan(app):
        try:
            yield ground
        finally:
            for session in ground.used:
                with suppress(Exception):
                    closing: Any = session.close()
                    if closing is not None:  # as it is of a synchronous contender
                        await closing


@define
class Answer:
    """What came of a request."""

    status: int | None = None
    error: BaseException | None = None


async def ask(app: FastAPI, *, at_start: Look | None = None, at_body: Look | None = None) -> Answer:
    """Make one request to `/` and look around when the response starts, or when its body is sent."""
    answer = Answer()
    asked = False

    async def receive() -> Message:
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            if at_start is not None:
                await at_start()
        elif at_body is not None:
            await at_body()

    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": "/",
        "raw_path": b"/",
        "query_string": b"",
        "root_path": "",
        "headers": [],
        "server": ("testserver", 80),
        "client": ("testclient", 1),
        "state": {},
    }
    try:
        await app(scope, receive, send)
    except Exception as error:  # noqa: BLE001  # ServerErrorMiddleware raises again what it has answered
        answer.error = error
    return answer


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def logged() -> Generator[list[logging.LogRecord]]:
    """Give the records from WARNING on that are logged in the block."""
    kept = _Kept()
    root = logging.getLogger()
    root.addHandler(kept)
    try:
        yield kept.records
    finally:
        root.removeHandler(kept)
