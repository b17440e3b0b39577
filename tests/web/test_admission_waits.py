"""Under `max_concurrent_requests` nobody waits for itself, and nobody for another one's client."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from attrs import Factory, define
from fastapi import Body, FastAPI, Request, Response
from httpx2 import ASGITransport, AsyncClient
from sqlalchemy import select
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_async_sqlalchemy import create_middleware_and_session_proxy
from tests.support.requests import pass_on
from tests.support.serving import asgi_client, serve
from tests.support.site import MakeSite, Site
from tests.support.tables import Note, engine_with_tables

DEADLINE = 30
"""Seconds after which something hangs."""
TIMEOUT = 0.1
"""Seconds that a request waits for its place here."""


below = pytest.mark.parametrize(
    "inside", [[], [Middleware(BaseHTTPMiddleware, dispatch=pass_on)]], ids=["alone", "below"]
)


# An application that calls itself


async def call_inside(app: ASGIApp, path: str) -> Response:
    """Call an application in process, as an application does from within a request."""
    async with AsyncClient(transport=ASGITransport(app), base_url="http://inside") as client:
        response = await client.get(path)
    return Response(response.content, response.status_code)


def add_calls(site: Site) -> None:
    """Give a site routes that call it in process."""

    @site.app.get("/one")
    async def one() -> object:
        return await site.db.session.scalar(select(1))

    @site.app.get("/two")
    async def two() -> Response:
        return await call_inside(site.app, "/one")

    @site.app.get("/three")
    async def three() -> Response:
        return await call_inside(site.app, "/two")

    @site.app.get("/tasks")
    async def tasks() -> list[int]:
        responses = await asyncio.gather(*(call_inside(site.app, "/two") for _ in range(3)))
        return [response.status_code for response in responses]

    @site.app.get("/thread")
    def thread() -> int:
        return asyncio.run(call_inside(site.app, "/plain")).status_code  # the engine is of the other loop

    @site.app.get("/plain")
    async def plain() -> int:
        return 1

    @site.app.get("/tail")
    async def tail() -> Response:
        async def body() -> AsyncIterator[bytes]:
            yield bytes((await call_inside(site.app, "/one")).body)

        return StreamingResponse(body())


@pytest.mark.parametrize("path", ["/two", "/three", "/tasks", "/thread", "/tail"])
@pytest.mark.parametrize(
    "inside", [[], [Middleware(BaseHTTPMiddleware, dispatch=pass_on)]], ids=["", "below"]
)
async def test_application_that_calls_itself(
    make_site: MakeSite, sqlite_url: str, path: str, inside: list[Middleware]
) -> None:
    """A request that is made in process from within one that has its place needs none itself."""
    site = await make_site(sqlite_url, inside=inside, max_concurrent_requests=2)
    add_calls(site)
    async with site.client() as client, asyncio.timeout(DEADLINE):
        responses = await asyncio.gather(*(client.get(path) for _ in range(5)), client.get("/one"))
    assert [response.status_code for response in responses] == [200] * 6


async def test_call_of_another_application(sqlite_url: str) -> None:
    """Two applications that call each other do not wait for themselves, and each counts by its own limit."""
    outer, inner = FastAPI(), FastAPI()
    for app in (outer, inner):
        middleware, _ = create_middleware_and_session_proxy(AsyncSession)
        app.add_middleware(middleware, db_url=sqlite_url, max_concurrent_requests=1)

    @outer.get("/")
    async def begin() -> Response:
        return await call_inside(inner, "/")

    @inner.get("/")
    async def between() -> Response:
        return await call_inside(outer, "/end")

    @outer.get("/end")
    async def end() -> str:
        return "end"

    async with asgi_client(outer) as client, asgi_client(inner), asyncio.timeout(DEADLINE):
        responses = await asyncio.gather(*(client.get("/") for _ in range(3)))
    assert [response.text for response in responses] == ['"end"'] * 3


async def test_call_after_the_response_has_started(make_site: MakeSite, sqlite_url: str) -> None:
    """A request that is made in another one's tail, which has no place any more, takes a place."""
    site = await make_site(sqlite_url, max_concurrent_requests=1, request_queue_timeout=TIMEOUT)
    add_calls(site)
    entered, leave = asyncio.Event(), asyncio.Event()

    @site.app.get("/room")
    async def room() -> None:
        entered.set()
        await leave.wait()

    @site.app.get("/late")
    async def late() -> Response:
        async def body() -> AsyncIterator[bytes]:
            inside = asyncio.create_task(call_inside(site.app, "/room"))
            await entered.wait()
            yield str((await call_inside(site.app, "/one")).status_code).encode()
            leave.set()
            await inside

        return StreamingResponse(body())

    async with site.client() as client, asyncio.timeout(DEADLINE):
        assert (await client.get("/late")).text == "503"


# A body that does not come


@define(eq=False)
class Upload:
    """A POST whose client sends each part of its body when it is told to."""

    path: str = "/upload"
    parts: "asyncio.Queue[Message]" = Factory(asyncio.Queue[Message])
    waiting: asyncio.Event = Factory(asyncio.Event)
    """Somebody waits for a part."""
    sent: list[Message] = Factory(list[Message])

    @property
    def status(self) -> object:
        """The response's status."""
        return self.sent[0]["status"]

    async def call(self, app: ASGIApp) -> None:
        """Call the application; it returns when the application does."""
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "path": self.path,
            "raw_path": self.path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "state": {},
        }
        await app(scope, self._receive, self._send)

    def come(self, text: str, *, more: bool = False) -> None:
        """Let a part of the body come."""
        self.parts.put_nowait({"type": "http.request", "body": text.encode(), "more_body": more})

    def leave(self) -> None:
        """Let the client leave."""
        self.parts.put_nowait({"type": "http.disconnect"})

    async def _receive(self) -> Message:
        if self.parts.empty():
            self.waiting.set()
        return await self.parts.get()

    async def _send(self, message: Message) -> None:
        self.sent.append(message)


@define(eq=False)
class House:
    """A site with one place, and what happens in it."""

    site: Site
    entered: asyncio.Semaphore = Factory(lambda: asyncio.Semaphore(0))
    leave: asyncio.Event = Factory(asyncio.Event)
    inside: int = 0
    most: int = 0

    def add_routes(self) -> None:
        """Give the site its routes."""
        app, db = self.site.app, self.site.db

        @app.post("/upload")
        async def upload(text: str = Body()) -> str:
            self.enter()
            self.inside -= 1
            return text

        @app.post("/raw")
        async def raw(request: Request) -> Response:
            lengths = [len(part) async for part in request.stream() if self.enter()]
            self.inside -= len(lengths)
            return PlainTextResponse(str(lengths))

        @app.post("/begun")
        async def begun(request: Request) -> Response:
            await db.session.scalar(select(1))
            return PlainTextResponse(await request.body())

        @app.get("/room")
        async def room() -> None:
            self.enter()
            self.entered.release()
            await self.leave.wait()
            self.inside -= 1

        @app.get("/quick")
        async def quick() -> None:
            self.enter()
            self.inside -= 1

    def enter(self) -> bool:
        """Count who is inside."""
        self.inside += 1
        self.most = max(self.most, self.inside)
        return True


async def make_house(make_site: MakeSite, url: str, **options: Any) -> House:
    """Make a house."""
    house = House(await make_site(url, max_concurrent_requests=1, **options))
    house.add_routes()
    return house


@below
async def test_slow_bodies(make_site: MakeSite, sqlite_url: str, inside: list[Middleware]) -> None:
    """Requests that wait for their clients keep nobody out, and go on when the bodies have come."""
    house = await make_house(make_site, sqlite_url, inside=inside, request_queue_timeout=DEADLINE)
    uploads = [Upload() for _ in range(5)]
    async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as tasks, house.site.client() as client:
        for upload in uploads:
            tasks.create_task(upload.call(house.site.app))
            await upload.waiting.wait()
        assert [(await client.get("/quick")).status_code for _ in range(3)] == [200] * 3
        for upload in uploads:
            upload.come('"body"')
    assert [upload.status for upload in uploads] == [200] * 5
    assert house.most == 1


async def test_slow_bodies_on_a_server(make_site: MakeSite, sqlite_url: str) -> None:
    """Sockets that announce a body and never send it keep nobody out."""
    house = await make_house(make_site, sqlite_url, request_queue_timeout=DEADLINE)
    head = b"POST /raw HTTP/1.1\r\nHost: site\r\nContent-Length: 9\r\n\r\n"
    async with serve(house.site.app) as address, asyncio.timeout(DEADLINE):
        connections = [await asyncio.open_connection(address.host, address.port) for _ in range(5)]
        for _, writer in connections:
            writer.write(head)
        async with AsyncClient(base_url=address.url) as client:
            assert [(await client.get("/quick")).status_code for _ in range(3)] == [200] * 3
        for _, writer in connections:
            writer.write(b"123456789")
        for reader, writer in connections:
            assert (await reader.readuntil(b"]")).endswith(b"[9, 0]")
            writer.close()


async def test_body_that_comes_in_parts(make_site: MakeSite, sqlite_url: str) -> None:
    """A request has its place again whenever a part has come, before any that come later."""
    house = await make_house(make_site, sqlite_url)
    upload, order = Upload("/raw"), list[str]()

    async def note(name: str, call: Any) -> None:
        await call
        order.append(name)

    async with asyncio.timeout(DEADLINE), asyncio.TaskGroup() as tasks, house.site.client() as client:
        tasks.create_task(note("upload", upload.call(house.site.app)))
        await upload.waiting.wait()
        tasks.create_task(note("room", client.get("/room")))
        await house.entered.acquire()  # it has the place
        tasks.create_task(note("later", client.get("/quick")))
        upload.come("a", more=True)
        upload.come("bc")
        for _ in range(10):
            await asyncio.sleep(0)  # the upload could go on here, if it were let
        assert order == []
        house.leave.set()
    assert upload.sent[-1]["body"] == b"[1, 2, 0]"
    assert order.index("upload") < order.index("later")


@below
@pytest.mark.parametrize("path", ["/upload", "/raw", "/bare", "/silent"])
async def test_place_that_does_not_come_again(
    make_site: MakeSite, sqlite_url: str, inside: list[Middleware], path: str
) -> None:
    """A request that does not have its place back in time is answered 503 with `Retry-After`."""
    house = await make_house(make_site, sqlite_url, inside=inside, request_queue_timeout=TIMEOUT)

    async def bare(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()

    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        with pytest.raises(HTTPException, match="Too busy"):
            await receive()

    app: ASGIApp = house.site.app
    if path in {"/bare", "/silent"}:
        middleware, _ = create_middleware_and_session_proxy(AsyncSession)
        inner = {"/bare": bare, "/silent": silent}[path]

        async def either(scope: Scope, receive: Receive, send: Send) -> None:
            await (inner if scope["path"] == path else house.site.app)(scope, receive, send)

        app = middleware(either, db_url=sqlite_url, max_concurrent_requests=1, request_queue_timeout=TIMEOUT)
    upload = Upload(path)
    async with asyncio.timeout(DEADLINE):
        call = asyncio.create_task(upload.call(app))
        await upload.waiting.wait()
        async with AsyncClient(transport=ASGITransport(app), base_url="http://site") as client:
            room = asyncio.create_task(client.get("/room"))
            await house.entered.acquire()
            upload.come('"body"')
            await call
            house.leave.set()
            assert (await room).status_code == 200
            assert (await client.get("/quick")).status_code == 200
    assert upload.status == 503
    assert (b"retry-after", b"1") in upload.sent[0]["headers"]


async def test_body_is_awaited_in_a_transaction(make_site: MakeSite, sqlite_url: str) -> None:
    """A request that holds a connection keeps its place while it waits, as it would need both to go on."""
    house = await make_house(make_site, sqlite_url, request_queue_timeout=TIMEOUT)
    upload = Upload("/begun")
    async with asyncio.timeout(DEADLINE), house.site.client() as client:
        call = asyncio.create_task(upload.call(house.site.app))
        await upload.waiting.wait()
        assert (await client.get("/quick")).status_code == 503
        upload.come("body")
        await call
        assert (await client.get("/quick")).status_code == 200
    assert upload.status == 200


async def test_places_and_connections(sqlite_url: str) -> None:
    """Places and pool do not lock up: who has begun a transaction meanwhile waits for no place."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    app, begun = FastAPI(), asyncio.Event()
    upload = Upload("/begin")
    pool: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout": DEADLINE}
    async with engine_with_tables(sqlite_url, **pool) as engine:
        app.add_middleware(middleware, custom_engine=engine, max_concurrent_requests=1)

        @app.post("/begin")
        async def begin(request: Request) -> Response:
            async def read() -> bytes:
                return await request.body()

            reading = asyncio.create_task(read())
            await upload.waiting.wait()
            db.session.add(Note(text="new"))
            await db.session.flush()
            begun.set()
            return PlainTextResponse(await reading)

        @app.get("/other")
        async def other() -> object:
            asyncio.get_running_loop().call_soon(upload.come, "body")
            try:
                return await db.session.scalar(select(1))
            except PoolTimeout:
                return "locked up"

        async with asgi_client(app) as client, asyncio.timeout(DEADLINE / 2):
            call = asyncio.create_task(upload.call(app))
            await begun.wait()
            assert (await client.get("/other")).text == "1"
            await call
    assert upload.status == 200


ENDS: dict[str, Callable[[Upload, "asyncio.Task[None]"], object]] = {
    "the client leaves": lambda upload, _: upload.leave(),
    "the request is cancelled": lambda _, call: call.cancel(),
    "the body comes": lambda upload, _: upload.come('"body"'),
}


@below
@pytest.mark.parametrize("end", ENDS)
async def test_place_is_given_back_once(
    make_site: MakeSite, sqlite_url: str, inside: list[Middleware], end: str
) -> None:
    """However the wait for a body ends, there is one place afterwards, neither none nor two."""
    house = await make_house(make_site, sqlite_url, inside=inside)
    async with asyncio.timeout(DEADLINE), house.site.client() as client:
        for _ in range(3):
            upload = Upload()
            call = asyncio.create_task(upload.call(house.site.app))
            await upload.waiting.wait()
            ENDS[end](upload, call)
            await asyncio.wait({call})
        rooms = [asyncio.create_task(client.get("/room")) for _ in range(3)]
        await house.entered.acquire()
        await house.site.notes()  # a round trip, in which another one could have come
        assert house.inside == 1
        house.leave.set()
        assert {response.status_code for response in await asyncio.gather(*rooms)} == {200}
    assert house.most == 1


async def test_asking_whether_the_client_has_left(make_site: MakeSite, sqlite_url: str) -> None:
    """A request that looks for its client while the body is awaited goes on at once, with its place."""
    house = await make_house(make_site, sqlite_url, request_queue_timeout=TIMEOUT)
    upload, left = Upload("/look"), list[bool]()

    @house.site.app.post("/look")
    async def look(request: Request) -> None:
        for _ in range(3):
            left.append(await request.is_disconnected())
        house.entered.release()
        await house.leave.wait()

    async with asyncio.timeout(DEADLINE), house.site.client() as client:
        call = asyncio.create_task(upload.call(house.site.app))
        await house.entered.acquire()
        assert (await client.get("/quick")).status_code == 503
        house.leave.set()
        await call
        assert (await client.get("/quick")).status_code == 200
    assert left == [False] * 3


async def test_watching_for_the_client_to_leave(make_site: MakeSite, sqlite_url: str) -> None:
    """A task that waits for the client to leave, when the body is whole, gives no place away."""
    house = await make_house(make_site, sqlite_url, request_queue_timeout=TIMEOUT)
    upload = Upload("/watch")

    @house.site.app.post("/watch")
    async def watch(request: Request) -> None:
        await request.body()

        async def wait() -> Message:
            return await request.receive()

        watching = asyncio.create_task(wait())
        await upload.waiting.wait()
        house.entered.release()
        await house.leave.wait()
        watching.cancel()

    upload.come("body")
    async with asyncio.timeout(DEADLINE), house.site.client() as client:
        call = asyncio.create_task(upload.call(house.site.app))
        await house.entered.acquire()
        assert (await client.get("/quick")).status_code == 503
        house.leave.set()
        await call
