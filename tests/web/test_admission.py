"""Admission of requests, the warning of a full pool, its 503, and what none of this takes for a number."""

import asyncio
import inspect
import math
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from attrs import Factory, define
from fastapi import BackgroundTasks, FastAPI
from fastapi.responses import StreamingResponse
from sqlalchemy import NullPool, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    SessionProxy,
    SQLAlchemyMiddleware,
    add_pool_timeout_handler,
    create_middleware_and_session_proxy,
)
from tests.support.interruption import Exchange
from tests.support.serving import asgi_client
from tests.support.site import MakeSite, Site, complaints
from tests.support.tables import Note, engine_with_tables

Db = SessionProxy[AsyncSession]
DEADLINE = 30
"""Seconds after which something hangs."""
TIMEOUT = 0.1
"""Seconds that a request, or a unit, waits here."""
URL = "sqlite+aiosqlite://"


@define(eq=False)
class Room:
    """Counts the requests that are inside, and keeps them until they may leave."""

    running: int = 0
    most: int = 0
    entered: asyncio.Semaphore = Factory(lambda: asyncio.Semaphore(0))
    leave: asyncio.Event = Factory(asyncio.Event)

    async def visit(self) -> None:
        """Come in, wait, go."""
        self.running += 1
        self.most = max(self.most, self.running)
        self.entered.release()
        try:
            await self.leave.wait()
        finally:
            self.running -= 1


def add_room(site: Site) -> Room:
    """Give a site its routes."""
    room = Room()

    @site.app.get("/room")
    async def inside() -> object:
        await room.visit()
        return await site.db.session.scalar(select(1))

    @site.app.get("/quick")
    async def quick() -> str:
        return "quick"

    @site.app.get("/stream")
    async def stream() -> Response:
        async def body() -> AsyncIterator[bytes]:
            yield b"first"
            await room.visit()
            yield b"last"

        return StreamingResponse(body())

    @site.app.get("/background")
    async def background(tasks: BackgroundTasks) -> str:
        tasks.add_task(room.visit)
        return "first"

    @site.app.get("/failing")
    async def failing() -> None:
        message = "boom"
        raise ValueError(message)

    return room


async def assert_one_at_a_time(site: Site, room: Room) -> None:
    """See that there is one place, neither none nor two."""
    room.leave.clear()
    room.most = 0
    exchanges = [Exchange("/room") for _ in range(3)]
    tasks = [asyncio.create_task(exchange.call(site.app)) for exchange in exchanges]
    async with asyncio.timeout(DEADLINE):
        await room.entered.acquire()
        await site.notes()  # a round trip, in which another one could have come
        assert room.running == 1
        room.leave.set()
        await asyncio.gather(*tasks)
    assert [exchange.status for exchange in exchanges] == [200] * 3
    assert room.most == 1
    for _ in range(2):
        await room.entered.acquire()


# Admission.


async def test_queue_timeout(sqlite_url: str, make_site: MakeSite) -> None:
    """A request that waits too long is answered 503 with `Retry-After`; later ones are served."""
    site = await make_site(sqlite_url, max_concurrent_requests=1, request_queue_timeout=TIMEOUT)
    room = add_room(site)
    async with site.client() as client, asyncio.timeout(DEADLINE):
        first = asyncio.create_task(client.get("/room"))
        await room.entered.acquire()
        refused = await client.get("/room")
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert room.running == 1
        room.leave.set()
        assert (await first).status_code == 200
        assert (await client.get("/room")).status_code == 200


@pytest.mark.parametrize("limit", [1, 3])
async def test_requests_wait(sqlite_url: str, make_site: MakeSite, limit: int) -> None:
    """Without a deadline requests wait for their turn, and all are served, so many at a time."""
    site = await make_site(sqlite_url, max_concurrent_requests=limit)
    room = add_room(site)
    async with site.client() as client, asyncio.timeout(DEADLINE):
        requests = [asyncio.create_task(client.get("/room")) for _ in range(3 * limit)]
        for _ in range(limit):
            await room.entered.acquire()
        await site.notes()  # a round trip, in which another one could have come
        assert room.running == limit
        room.leave.set()
        assert {response.status_code for response in await asyncio.gather(*requests)} == {200}
    assert room.most == limit


async def test_excluded_path(sqlite_url: str, make_site: MakeSite) -> None:
    """An excluded path is served however many requests are inside."""
    site = await make_site(sqlite_url, max_concurrent_requests=1, exclude_paths=["/quick"])
    room = add_room(site)
    async with site.client() as client, asyncio.timeout(DEADLINE):
        first = asyncio.create_task(client.get("/room"))
        await room.entered.acquire()
        assert (await client.get("/quick")).status_code == 200
        room.leave.set()
        await first


@pytest.mark.parametrize("path", ["/stream", "/background"])
async def test_tail(sqlite_url: str, make_site: MakeSite, path: str) -> None:
    """A request whose response has started lets the next one in, and gives no second place back."""
    site = await make_site(sqlite_url, max_concurrent_requests=1)
    room = add_room(site)
    async with asyncio.timeout(DEADLINE):
        first, second = Exchange(path), Exchange("/quick")
        running = asyncio.create_task(first.call(site.app))
        await room.entered.acquire()
        await second.call(site.app)
        assert (second.status, room.running, running.done()) == (200, 1, False)
        room.leave.set()
        await running
    assert first.status == 200
    await assert_one_at_a_time(site, room)


@pytest.mark.parametrize("which", ["the one that waits", "the one inside"])
async def test_cancelled_request(sqlite_url: str, make_site: MakeSite, which: str) -> None:
    """A request that is cancelled, inside or while it waits, gives its place back and no other one."""
    site = await make_site(sqlite_url, max_concurrent_requests=1)
    room = add_room(site)
    async with asyncio.timeout(DEADLINE):
        inside = asyncio.create_task(Exchange("/room").call(site.app))
        await room.entered.acquire()
        waiting = asyncio.create_task(Exchange("/room").call(site.app))
        await site.notes()
        cancelled, other = (waiting, inside) if which == "the one that waits" else (inside, waiting)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError, match=r"^$"):
            await cancelled
        room.leave.set()
        await other
    if other is waiting:
        await room.entered.acquire()
    await assert_one_at_a_time(site, room)


async def test_request_that_fails(sqlite_url: str, make_site: MakeSite) -> None:
    """A request that raises gives its place back, once."""
    site = await make_site(sqlite_url, max_concurrent_requests=1)
    room = add_room(site)
    for _ in range(2):
        with pytest.raises(ValueError, match="boom"):
            await Exchange("/failing").call(site.app)
    await assert_one_at_a_time(site, room)


@define(eq=False)
class Turnstile:
    """An application that counts how many are inside."""

    running: int = 0
    most: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve anything."""
        self.running += 1
        self.most = max(self.most, self.running)
        for _ in range(5):
            await asyncio.sleep(0)  # the others have their turns
        self.running -= 1
        if scope["type"] == "http":
            await PlainTextResponse("served")(scope, receive, send)


async def serve_three(app: ASGIApp) -> None:
    """Make three requests at once."""
    exchanges = [Exchange("/") for _ in range(3)]
    async with asyncio.timeout(DEADLINE):
        await asyncio.gather(*(exchange.call(app) for exchange in exchanges))
    assert [exchange.status for exchange in exchanges] == [200] * 3


@pytest.mark.parametrize("how", ["one after the other", "in threads"])
def test_several_loops(how: str) -> None:
    """One middleware object serves several event loops, so many requests at a time in each."""
    middleware, _ = create_middleware_and_session_proxy(AsyncSession)
    inner = Turnstile()
    app = middleware(inner, custom_engine=create_async_engine(URL), max_concurrent_requests=1)
    if how == "one after the other":
        asyncio.run(serve_three(app))
        asyncio.run(serve_three(app))
        assert inner.most == 1
        return
    errors, together = list[BaseException](), threading.Barrier(2)

    async def meet() -> None:
        together.wait(DEADLINE)
        await serve_three(app)

    def run() -> None:
        try:
            asyncio.run(meet())
        except BaseException as error:  # noqa: BLE001  # for the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
async def test_what_is_no_request(kind: str) -> None:
    """A WebSocket and the lifespan need no place, and take none."""
    middleware, _ = create_middleware_and_session_proxy(AsyncSession)
    served = asyncio.Event()

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await asyncio.Event().wait()
        served.set()
        await Turnstile()(scope, receive, send)

    async def nothing(*_: Message) -> Any:
        return {"type": "nothing"}

    app = middleware(inner, custom_engine=create_async_engine(URL), max_concurrent_requests=1)
    request = asyncio.create_task(Exchange("/").call(app))
    for _ in range(3):
        await asyncio.sleep(0)  # it goes inside
    async with asyncio.timeout(DEADLINE):
        await app({"type": kind, "path": "/", "state": {}}, nothing, nothing)
    assert served.is_set()
    request.cancel()
    await asyncio.wait({request})


async def test_two_pairs() -> None:
    """Two pairs have a limit each."""
    outer, _ = create_middleware_and_session_proxy(AsyncSession)
    inner, _ = create_middleware_and_session_proxy(AsyncSession)
    innermost = Turnstile()
    limited = inner(innermost, custom_engine=create_async_engine(URL), max_concurrent_requests=1)
    between = Room()
    between.leave.set()

    async def count(scope: Scope, receive: Receive, send: Send) -> None:
        between.running += 1
        between.most = max(between.most, between.running)
        await limited(scope, receive, send)
        between.running -= 1

    app = outer(count, custom_engine=create_async_engine(URL), max_concurrent_requests=2)
    await serve_three(app)
    assert innermost.most == 1
    assert between.most >= 2


# The warning.


async def fill(engine: AsyncEngine, connections: int) -> None:
    """Have so many connections out at the same time."""
    async with AsyncExitStack() as stack:
        for _ in range(connections):
            await stack.enter_async_context(engine.connect())


@pytest.mark.parametrize(("threshold", "enough"), [(1, 2), (0.5, 1)])
async def test_warning(
    sqlite_url: str, caplog: pytest.LogCaptureFixture, threshold: float, enough: int
) -> None:
    """One WARNING tells the numbers when the pool fills, and none follows within the interval."""
    middleware, _ = create_middleware_and_session_proxy(AsyncSession)
    async with engine_with_tables(sqlite_url, pool_size=1, max_overflow=1) as engine:
        middleware(Starlette(), custom_engine=engine, pool_warn_threshold=threshold)
        await fill(engine, enough - 1)
        assert complaints(caplog) == []
        for _ in range(3):
            await fill(engine, 2)
    (complaint,) = complaints(caplog)
    assert complaint.startswith("WARNING: AsyncSession (sqlite+aiosqlite:")
    assert f": {enough} of 2 connections are checked out: " in complaint


async def test_warning_after_the_interval(sqlite_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """After the interval there is another WARNING, also when the engine was disposed meanwhile."""
    middleware, _ = create_middleware_and_session_proxy(AsyncSession)
    async with engine_with_tables(sqlite_url, pool_size=2, max_overflow=0) as engine:
        middleware(Starlette(), custom_engine=engine, pool_warn_threshold=1.0, pool_warn_interval=1e-9)
        await fill(engine, 2)
        await fill(engine, 1)
        assert len(complaints(caplog)) == 1
        await engine.dispose()
        await fill(engine, 2)
        assert len(complaints(caplog)) == 2


@pytest.mark.parametrize("engine_args", [{"poolclass": NullPool}, {"max_overflow": -1}], ids=repr)
def test_warning_of_a_pool_without_a_limit(engine_args: dict[str, Any]) -> None:
    """A threshold says nothing of a pool without a limit, and is refused."""
    middleware, _ = create_middleware_and_session_proxy(AsyncSession)
    engine = create_async_engine("postgresql+asyncpg://h/db", **engine_args)
    with pytest.raises(ConfigurationError, match="pool_warn_threshold needs a pool with a limit"):
        middleware(Starlette(), custom_engine=engine, pool_warn_threshold=0.5)


# The handler.


@pytest.mark.parametrize("make_app", [Starlette, FastAPI])
@pytest.mark.parametrize("path", ["/read", "/add"])
async def test_pool_timeout_handler(sqlite_url: str, make_app: type[Starlette], path: str) -> None:
    """`add_pool_timeout_handler` answers 503 with `Retry-After`, in a route as in its commit."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    pool: dict[str, Any] = {"pool_size": 1, "max_overflow": 0, "pool_timeout": TIMEOUT}
    async with engine_with_tables(sqlite_url, **pool) as engine:

        async def read(request: Request) -> Response:
            await db.session.scalar(select(1))
            return PlainTextResponse("read")

        async def add(request: Request) -> Response:
            db.session.add(Note(text="added"))
            return PlainTextResponse("added")

        app = make_app(routes=[Route("/read", read), Route("/add", add)])
        app.add_middleware(middleware, custom_engine=engine, commit_on_exit=True)
        add_pool_timeout_handler(app)
        async with asgi_client(app) as client:
            async with engine.connect():
                response = await client.get(path)
            assert (response.status_code, response.headers["retry-after"]) == (503, "1")
            assert (await client.get(path)).status_code == 200


# Bad values.

NUMBERS: list[object] = [0, -1, math.nan, math.inf, True, "3"]
NO_COUNTS: list[object] = [*NUMBERS, 1.5]
NO_FLAGS: list[object] = [1, "yes"]
Pair = tuple[type[SQLAlchemyMiddleware[AsyncSession]], Db]
Call = Callable[[Pair, Any], object]


def of_middleware(name: str, **others: Any) -> Call:
    """Return what makes a middleware with a value."""
    return lambda pair, value: pair[0](Starlette(), **{**others, name: value})


def of_db(name: str, **others: Any) -> Call:
    """Return what calls the proxy with a value."""
    return lambda pair, value: pair[1](**{**others, name: value})


def of_method(method: str, name: str) -> Call:
    """Return what calls one of the proxy's methods with a value."""
    return lambda pair, value: getattr(pair[1], method)(**{name: value})


CALLS: dict[str, tuple[Call, list[object]]] = {
    "middleware max_concurrent_requests": (of_middleware("max_concurrent_requests"), NO_COUNTS),
    "middleware request_queue_timeout": (
        of_middleware("request_queue_timeout", max_concurrent_requests=1),
        NUMBERS,
    ),
    "middleware pool_warn_threshold": (of_middleware("pool_warn_threshold"), [*NUMBERS, 1.5]),
    "middleware pool_warn_interval": (of_middleware("pool_warn_interval"), [*NUMBERS, None]),
    "db max_concurrent": (of_db("max_concurrent", multi_sessions=True), NO_COUNTS),
    "db pool_timeout": (of_db("pool_timeout"), NUMBERS),
    "db multi_sessions": (of_db("multi_sessions"), [*NO_FLAGS, 0, None]),
    "connection timeout": (of_method("connection", "timeout"), NUMBERS),
    "connection commit_on_exit": (of_method("connection", "commit_on_exit"), NO_FLAGS),
    "gather max_concurrent": (of_method("gather", "max_concurrent"), NO_COUNTS),
    "gather commit_on_exit": (of_method("gather", "commit_on_exit"), NO_FLAGS),
    "gather return_exceptions": (of_method("gather", "return_exceptions"), [*NO_FLAGS, None]),
    "task_group max_concurrent": (of_method("task_group", "max_concurrent"), NO_COUNTS),
    "task_group commit_on_exit": (of_method("task_group", "commit_on_exit"), NO_FLAGS),
}


async def give(call: Call, pair: Pair, value: object) -> None:
    """Make the call, and await what has to be awaited."""
    result = call(pair, value)
    if inspect.iscoroutine(result):
        await result


@pytest.mark.parametrize("what", CALLS)
async def test_bad_values(what: str) -> None:
    """A wrong value is refused where it is given, by the parameter's name."""
    call, values = CALLS[what]
    pair = create_middleware_and_session_proxy(AsyncSession)
    pair[1].bind(create_async_engine("postgresql+asyncpg://h/db"))
    for value in values:
        with pytest.raises(ConfigurationError, match=rf"^{what.split()[1]} must be "):
            await give(call, pair, value)


def test_queue_timeout_without_a_limit() -> None:
    """A time to wait without a limit to wait for is refused."""
    middleware, _ = create_middleware_and_session_proxy(AsyncSession)
    with pytest.raises(ConfigurationError, match="request_queue_timeout goes with max_concurrent_requests"):
        middleware(Starlette(), custom_engine=create_async_engine(URL), request_queue_timeout=1)


@pytest.mark.parametrize(
    "wrong", [{"max_concurrent_requests": 0}, {"pool_warn_interval": 0}, {"pool_warn_threshold": 2}], ids=repr
)
def test_refused_middleware_leaves_the_pair_free(wrong: dict[str, Any]) -> None:
    """After a middleware was refused the pair takes another engine, as if nothing had been."""
    middleware, _ = create_middleware_and_session_proxy(AsyncSession)
    url = "postgresql+asyncpg://h/db"
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        middleware(Starlette(), db_url=url, **wrong)
    middleware(Starlette(), db_url=url)


async def test_admission_as_starlette_adds_it(sqlite_url: str) -> None:
    """The arguments pass through `Middleware(...)` of Starlette and FastAPI alike."""
    middleware, _ = create_middleware_and_session_proxy(AsyncSession)

    async def route(request: Request) -> Response:
        return PlainTextResponse("served")

    added = Middleware(
        middleware, db_url=sqlite_url, max_concurrent_requests=2, request_queue_timeout=TIMEOUT
    )
    app = Starlette(routes=[Route("/", route)], middleware=[added])
    async with asgi_client(app) as client:
        assert [(await client.get("/")).status_code for _ in range(5)] == [200] * 5
