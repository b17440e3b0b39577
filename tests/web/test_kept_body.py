"""A request's body is kept for the handler of a failed COMMIT, where one could ask for it, and no longer."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any
from weakref import WeakSet

import pytest
from attrs import Factory, define
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import PlainTextResponse, StreamingResponse
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Scope

from fastapi_async_sqlalchemy import add_pool_timeout_handler
from tests.support.requests import conflict
from tests.support.site import MakeSite, Site
from tests.support.tables import ORPHAN, Note, Reply

MEBIBYTE = bytes(1 << 20)


class Part(dict[str, Any]):
    """A message that tells whether anybody keeps it."""

    def __hash__(self) -> int:  # type: ignore[override]  # pyright: ignore[reportIncompatibleVariableOverride]
        return id(self)


@define(eq=False)
class Upload:
    """A POST as a server sees it: its parts, while somebody keeps them, and what the application has sent."""

    path: str = "/"
    content: bytes = b"body"
    kept: WeakSet[Part] = Factory(WeakSet[Part])
    sent: list[Message] = Factory(list[Message])
    spec_version: str = "2.4"
    _parts: int = 2

    async def call(self, app: ASGIApp) -> None:
        """Call the application; it returns when the application does."""
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": self.spec_version},
            "http_version": "1.1",
            "method": "POST",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [],
            "state": {},
        }
        await app(scope, self._receive, self._send)

    def count(self) -> int:
        """Count the parts that are kept."""
        return len(self.kept)

    async def _receive(self) -> Message:
        if not self._parts:
            await asyncio.Event().wait()
        self._parts -= 1
        part = Part(type="http.request", body=self.content if self._parts else b"", more_body=self._parts > 0)
        self.kept.add(part)
        return part

    async def _send(self, message: Message) -> None:
        self.sent.append(message)


async def read(request: Request) -> None:
    """Read the body, and keep nothing of it."""
    async for _ in request.stream():
        pass


USES: dict[str, Callable[[AsyncSession], Any]] = {
    "no session": lambda _: None,
    "reads": lambda session: session.scalar(select(1)),
    "writes": lambda session: session.add(Note(text="new")),
}


@pytest.mark.parametrize("use", USES)
async def test_body_after_the_start(make_site: MakeSite, sqlite_url: str, use: str) -> None:
    """No part of the body is kept once the response has started, whether the request has a session or not."""
    site = await make_site(sqlite_url, commit_on_exit=True)
    site.app.add_exception_handler(IntegrityError, conflict)
    upload, counts = Upload(), list[int]()

    async def body() -> AsyncIterator[bytes]:
        counts.append(upload.count())
        yield b"body"

    @site.app.post("/")
    async def route(request: Request) -> Response:
        await read(request)
        done = None if use == "no session" else USES[use](site.db.session)
        if done is not None:
            await done
        counts.append(upload.count())
        return StreamingResponse(body())

    await upload.call(site.app)
    assert counts == [2, 0]


async def never(request: Request, error: Exception) -> Response:
    """Take the place of a handler that could read the body."""
    return PlainTextResponse(await request.body(), 409)


HANDLERS: dict[str, tuple[Callable[[FastAPI], object], bool]] = {
    "none": (lambda app: None, False),
    "of everything": (lambda app: app.add_exception_handler(Exception, never), False),
    "of status 500": (lambda app: app.add_exception_handler(500, never), False),
    "the package's own": (add_pool_timeout_handler, False),
    "of the error": (lambda app: app.add_exception_handler(IntegrityError, never), True),
    "of a status": (lambda app: app.add_exception_handler(409, never), True),
    "of Starlette's error": (lambda app: app.add_exception_handler(HTTPException, never), True),
}
"""Ways to add a handler; and whether it could ask for the body of a request whose COMMIT failed."""


def always(status: int, error: BaseException | None) -> bool:
    """Commit."""
    return True


POLICIES: dict[str, dict[str, Any]] = {
    "none": {},
    "commit_on_exit": {"commit_on_exit": True},
    "commit_when": {"commit_when": always},
}


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mounted", [True, False])
async def test_body_that_nobody_could_ask_for(
    make_site: MakeSite, sqlite_url: str, handler: str, policy: str, *, mounted: bool
) -> None:
    """A body is kept only if the middleware may commit and a handler that may read it could answer."""
    site = await make_site(sqlite_url, **POLICIES[policy])
    app = site.app
    if mounted:
        app = FastAPI()
        site.app.mount("/inner", app)
    add, could_ask = HANDLERS[handler]
    add(app)
    upload, counts = Upload("/inner/" if mounted else "/"), list[int]()

    @app.post("/")
    async def route(request: Request) -> None:
        await read(request)
        counts.append(upload.count())

    await upload.call(site.app)
    assert counts == [2 if could_ask and policy != "none" else 0]
    assert upload.sent[0]["status"] == 200


async def read_first(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Read the body before it is known who will serve the request."""
    await request.body()
    return await call_next(request)


async def test_body_that_a_middleware_reads_before_an_application_is_mounted(
    make_site: MakeSite, deferring_url: str
) -> None:
    """The handler of a mounted application gets a body that a middleware outside of it has read."""
    inside = [Middleware(BaseHTTPMiddleware, dispatch=read_first)]
    site = await make_site(deferring_url, inside=inside, commit_on_exit=True)
    inner = FastAPI()
    site.app.mount("/inner", inner)
    inner.add_exception_handler(IntegrityError, never)

    @inner.post("/")
    async def write() -> None:
        site.db.session.add(Reply(**ORPHAN))

    async with site.client() as client:
        response = await client.post("/inner/", content=b"sent")
    assert (response.status_code, response.text) == (409, "sent")


async def test_handler_that_comes_after_the_body(make_site: MakeSite, deferring_url: str) -> None:
    """A handler that was added when the body had been read does not wait for it."""
    site = await make_site(deferring_url, commit_on_exit=True)

    @site.app.post("/")
    async def write(request: Request) -> None:
        await read(request)
        site.app.add_exception_handler(IntegrityError, never)
        site.db.session.add(Reply(**ORPHAN))

    async with asyncio.timeout(30):
        with pytest.raises(ClientDisconnect, match=r"^$"):
            await Upload().call(site.app)


async def echo(request: Request, _: Exception) -> Response:
    """Answer with the request's body."""
    return PlainTextResponse(await request.body(), 409)


async def test_body_of_which_a_part_comes_during_the_settlement(
    make_site: MakeSite, deferring_url: str
) -> None:
    """The handler of a failed COMMIT gets a body that was read during the settlement."""
    site = await make_site(deferring_url, commit_on_exit=True)
    site.app.add_exception_handler(IntegrityError, echo)

    @site.app.post("/")
    async def write(request: Request) -> None:
        site.db.unit.before_commit(lambda: read(request))
        site.db.session.add(Reply(**ORPHAN))

    upload = Upload()
    async with asyncio.timeout(30):
        await upload.call(site.app)
    assert [upload.sent[0]["status"], upload.sent[1]["body"]] == [409, b"body"]


async def test_body_that_a_middleware_reads_during_the_settlement(
    make_site: MakeSite, deferring_url: str
) -> None:
    """So it does where a BaseHTTPMiddleware listens for the client while a stream's COMMIT fails."""
    site = await make_site(deferring_url, commit_on_exit=True)
    site.app.add_exception_handler(IntegrityError, echo)

    @site.app.post("/")
    async def write() -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b"never sent"

        site.db.session.add(Reply(**ORPHAN))
        return StreamingResponse(body())

    async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)

    site.app.user_middleware.append(Middleware(BaseHTTPMiddleware, dispatch=pass_on))
    upload = Upload(spec_version="2.0")
    async with asyncio.timeout(30):
        await upload.call(site.app)
    assert [upload.sent[0]["status"], upload.sent[1]["body"]] == [409, b"body"]


async def add_parked(site: Site) -> tuple[asyncio.Semaphore, asyncio.Event]:
    """Add a route that waits when it has read its body, and whose COMMIT fails."""
    entered, leave = asyncio.Semaphore(0), asyncio.Event()

    @site.app.exception_handler(IntegrityError)
    async def answer(request: Request, error: Exception) -> Response:
        try:
            return PlainTextResponse(str(len(await request.body())), 409)
        except ClientDisconnect:
            return PlainTextResponse("gone", 409)

    @site.app.post("/")
    async def park(request: Request) -> None:
        await read(request)
        entered.release()
        await leave.wait()
        site.db.session.add(Reply(**ORPHAN))

    return entered, leave


async def test_bodies_of_all_requests(make_site: MakeSite, sqlite_url: str) -> None:
    """A middleware keeps 64 MiB in all: a body beyond that is gone, and later ones are kept again."""
    site = await make_site(sqlite_url, commit_on_exit=True)
    entered, leave = await add_parked(site)
    uploads = [Upload(content=MEBIBYTE) for _ in range(66)]
    async with AsyncExitStack() as stack, asyncio.timeout(60):
        group = await stack.enter_async_context(asyncio.TaskGroup())
        for upload in uploads:
            group.create_task(upload.call(site.app))
            await entered.acquire()
        counts = [upload.count() for upload in uploads]
        leave.set()
    assert counts == [2] * 64 + [0, 0]
    answers = [upload.sent[-1]["body"] for upload in uploads]
    assert answers == [b"1048576"] * 64 + [b"gone"] * 2
    last = Upload(content=MEBIBYTE)
    await last.call(site.app)
    assert last.sent[-1]["body"] == b"1048576"


@pytest.mark.parametrize("end", ["an error", "cancelled", "answered"])
async def test_bodies_of_requests_that_have_ended(make_site: MakeSite, sqlite_url: str, end: str) -> None:
    """However requests end, their bodies count no more, and nothing holds them."""
    site = await make_site(sqlite_url, commit_on_exit=True)
    site.app.add_exception_handler(IntegrityError, conflict)
    counts = list[int]()

    @site.app.post("/")
    async def route(request: Request) -> None:
        await read(request)
        counts.append(upload.count())
        if end == "an error":
            message = "boom"
            raise ValueError(message)
        if end == "cancelled":
            raise asyncio.CancelledError

    for _ in range(65):
        upload = Upload(content=MEBIBYTE)
        (error,) = await asyncio.gather(upload.call(site.app), return_exceptions=True)
        del error
        assert upload.count() == 0
    assert counts == [2] * 65
