"""A request has one unit of work of its own, the same everywhere."""

import asyncio
import gc
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from typing import Any
from weakref import WeakSet

import pytest
from anyio import from_thread
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import event, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint

from fastapi_async_sqlalchemy import MissingSessionError
from tests.support.requests import DomainError, around, fail
from tests.support.serving import serve
from tests.support.site import MakeSite
from tests.support.tables import Note

# A unit of its own


async def test_each_request_has_a_session_of_its_own(make_site: MakeSite, database_url: str) -> None:
    """Ten requests at once have ten sessions, and each commits its own note."""
    site = await make_site(database_url, commit_on_exit=True)
    seen: list[AsyncSession] = []
    gate = asyncio.Barrier(10)

    @site.app.get("/{number}")
    async def write(number: int) -> None:
        seen.append(site.db.session)
        await gate.wait()
        site.db.session.add(Note(text=str(number)))

    async with site.client() as client:
        await asyncio.gather(*(client.get(f"/{number}") for number in range(10)))
    assert len({id(session) for session in seen}) == 10
    assert await site.notes() == [str(number) for number in range(10)]


async def test_request_from_inside_an_open_unit(make_site: MakeSite, database_url: str) -> None:
    """A request made inside `async with db()` has its own unit, and the block its own again afterwards."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.get("/")
    async def write() -> None:
        site.db.session.add(Note(text="request"))

    async with site.client() as client:
        async with site.db() as unit:
            session = unit.session
            await client.get("/")
            assert site.db.session is session
            assert not session.new
            assert await site.notes() == ["request"]
        with pytest.raises(MissingSessionError, match="no unit of work here"):
            _ = site.db.session


async def test_requests_of_one_connection_let_go_of_each_other(make_site: MakeSite, sqlite_url: str) -> None:
    """A server that starts a connection's next request from within the one before keeps no chain of them."""
    site = await make_site(sqlite_url)
    seen: WeakSet[Request] = WeakSet()

    @site.app.get("/")
    async def route(request: Request) -> None:
        site.db.unit.info["request"] = request
        seen.add(request)

    async with serve(site.app) as address:
        reader, writer = await asyncio.open_connection(address.host, address.port)
        try:
            writer.write(f"GET / HTTP/1.1\r\nHost: {address.host}\r\n\r\n".encode() * 500)
            for _ in range(500):
                await reader.readuntil(b"\r\n\r\nnull")
            gc.collect()
            assert len(seen) < 250  # asyncio keeps a hundred timers that were cancelled, and their contexts
        finally:
            writer.close()
            await writer.wait_closed()


async def test_request_from_a_task_of_a_finished_request(make_site: MakeSite, database_url: str) -> None:
    """A task that outlived its request calls the application: the new request has a unit of its own."""
    site = await make_site(database_url, commit_on_exit=True)
    finished = asyncio.Event()
    tasks: list[asyncio.Task[Any]] = []

    @site.app.get("/")
    async def write() -> None:
        site.db.session.add(Note(text="second"))

    async with site.client() as client:

        async def later() -> int:
            await finished.wait()
            return (await client.get("/")).status_code

        @site.app.get("/first")
        async def start() -> None:
            site.db.session.add(Note(text="first"))
            tasks.append(asyncio.create_task(later()))

        await client.get("/first")
        finished.set()
        assert await tasks[0] == 200
    assert await site.notes() == ["first", "second"]


@pytest.mark.parametrize("path", ["/good", "/bad"])
async def test_application_called_from_another_ones_handler(
    make_site: MakeSite, database_url: str, path: str
) -> None:
    """An application called in process from a handler settles its own unit and leaves the caller's alone."""
    site = await make_site(database_url, commit_on_exit=True)
    outer = FastAPI()
    site.app.mount("/outer", outer)

    async with site.client() as client:

        @outer.get("/{then}")
        async def call(then: str) -> None:
            session = site.db.session
            await client.get(f"/{then}")
            assert site.db.session is session
            assert await session.scalar(select(func.count()).select_from(Note)) == (then == "good")
            session.add(Note(text="outer"))
            if then == "good":
                raise HTTPException(400)

        @site.app.get("/good")
        async def good() -> None:
            site.db.session.add(Note(text="inner"))

        @site.app.get("/bad")
        async def bad() -> None:
            site.db.session.add(Note(text="inner"))
            raise HTTPException(400)

        await client.get(f"/outer{path}")
    assert await site.notes() == (["inner"] if path == "/good" else ["outer"])


# No use, no cost


@pytest.mark.parametrize("commit_on_exit", [True, False])
@pytest.mark.parametrize("path", ["/", "/looked-up", "/missing", "/broken"])
async def test_request_that_does_not_use_the_database(
    make_site: MakeSite, database_url: str, path: str, *, commit_on_exit: bool
) -> None:
    """A request that sends no statement makes no session, checks out no connection and sends no SQL."""
    made: list[str] = []

    class Counted(AsyncSession):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append("session")
            super().__init__(*args, **kwargs)

    site = await make_site(database_url, commit_on_exit=commit_on_exit, session_args={"class_": Counted})

    @site.app.get("/")
    async def untouched() -> None:
        pass

    @site.app.get("/looked-up")
    async def looked_up() -> None:
        assert site.db.unit.opened is None
        assert isinstance(site.db.session, Counted)

    @site.app.get("/broken")
    async def broken() -> None:
        raise DomainError

    def note(name: str) -> Callable[..., None]:
        def listener(*args: Any) -> None:
            made.append(name)

        return listener

    event.listen(site.engine.sync_engine, "before_cursor_execute", note("statement"))
    event.listen(site.engine.sync_engine, "commit", note("commit"))
    event.listen(site.engine.sync_engine, "rollback", note("rollback"))
    event.listen(site.engine.pool, "connect", note("connect"))
    event.listen(site.engine.pool, "checkout", note("checkout"))
    async with site.client(raise_app_exceptions=False) as client:
        made.clear()
        await client.get(path)
    assert made == (["session"] if path == "/looked-up" else [])


# The same object everywhere


@around
async def test_same_session_everywhere(
    make_site: MakeSite, postgresql_url: str, outside: list[Middleware], inside: list[Middleware]
) -> None:
    """Dependencies, routes, teardowns, tasks and bodies, in the loop and in threads, see one session."""
    site = await make_site(postgresql_url, outside=outside, inside=inside, commit_on_exit=True)
    seen: dict[str, object] = {}

    def look(place: str) -> None:
        seen[place] = site.db.session
        seen[f"{place}, unit"] = site.db.unit

    async def look_async(place: str) -> None:
        look(place)

    async def async_dependency() -> AsyncGenerator[None]:
        look("async dependency")
        yield
        look("async teardown")

    def sync_dependency() -> Iterator[None]:
        look("sync dependency")
        yield
        look("sync teardown")

    @site.app.get("/async", dependencies=[Depends(async_dependency), Depends(sync_dependency)])
    async def async_route(background: BackgroundTasks) -> StreamingResponse:
        look("async route")
        background.add_task(look, "sync task")
        background.add_task(look_async, "async task")

        async def body() -> AsyncIterator[str]:
            look("body")
            yield "done"

        return StreamingResponse(body())

    @site.app.get("/sync", dependencies=[Depends(async_dependency), Depends(sync_dependency)])
    def sync_route() -> StreamingResponse:
        look("sync route")

        def body() -> Iterator[str]:
            look("sync body")
            yield "done"

        return StreamingResponse(body())

    async with site.client() as client:
        for path, places in [("/async", 8), ("/sync", 6)]:
            seen.clear()
            assert (await client.get(path)).text == "done"
            assert len(seen) == 2 * places
            assert len({id(found) for found in seen.values()}) == 2


async def test_route_in_a_thread(make_site: MakeSite, database_url: str) -> None:
    """A `def` route writes in its thread, and by the loop from there, in the request's one unit."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.get("/")
    def write() -> int | None:
        site.db.session.add(Note(text="new"))
        return from_thread.run(site.db.session.scalar, select(func.count()).select_from(Note))

    assert (await site.get()).json() == 1
    assert await site.notes() == ["new"]


async def test_handlers_and_inner_middlewares_see_the_unit(make_site: MakeSite, postgresql_url: str) -> None:
    """Exception handlers, inner middlewares and mounted applications see the request's session too."""
    seen: list[AsyncSession] = []

    async def look(request: Request, call_next: RequestResponseEndpoint) -> Response:
        seen.append(site.db.session)
        response = await call_next(request)
        seen.append(site.db.session)
        return response

    site = await make_site(
        postgresql_url, inside=[Middleware(BaseHTTPMiddleware, dispatch=look)], commit_on_exit=True
    )
    inner = FastAPI()
    site.app.mount("/inner", inner)

    @inner.exception_handler(DomainError)
    async def answer(request: Request, error: Exception) -> Response:
        seen.append(site.db.session)
        return Response()

    @inner.get("/")
    async def route() -> None:
        seen.append(site.db.session)
        fail()

    await site.get("/inner/")
    assert len(seen) == 4
    assert len(set(seen)) == 1
