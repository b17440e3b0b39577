"""`Depends(db.dependency)` under the pair's middleware: the request's own session."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Annotated, Any

import pytest
from fastapi import Depends, Request, Response, WebSocket
from fastapi.responses import JSONResponse, PlainTextResponse
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_async_sqlalchemy import MissingSessionError
from tests.support.databases import JudgeFor
from tests.support.dependency import (
    FASTAPI,
    DomainError,
    Failure,
    add_routes,
    as_http_exception,
    each_failure,
    each_route,
    needs_function_scope,
    watched,
)
from tests.support.site import MakeSite, Site, complaints
from tests.support.tables import Note
from tests.support.worker import open_worker

# The session of the unit that the middleware has bound.


@each_route
async def test_session_of_the_middleware_s_unit(make_site: MakeSite, postgresql_url: str, path: str) -> None:
    """Under the middleware the dependency is `db.session` itself, wherever it is asked for."""
    site = await make_site(postgresql_url)
    add_routes(site)
    assert (await site.get(path)).json() is True


@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_middleware_decides_about_its_unit(
    make_site: MakeSite, database_url: str, caplog: pytest.LogCaptureFixture, *, commit_on_exit: bool
) -> None:
    """Under the middleware the dependency commits nothing by itself: the middleware's options hold."""
    site = await make_site(database_url, commit_on_exit=commit_on_exit)

    @site.app.get("/")
    async def route(session: Annotated[AsyncSession, Depends(site.db.dependency)]) -> None:
        session.add(Note(text="written"))

    assert (await site.get()).status_code == 200
    assert await site.notes() == (["written"] if commit_on_exit else [])
    assert len(complaints(caplog)) == (0 if commit_on_exit else 1)


class CopyingScope:
    """Hands a copy of the scope on, as the ASGI specification tells middlewares that change it to."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        await self.app({**scope, "copied": True}, receive, send)


@each_route
async def test_session_behind_a_copied_scope(make_site: MakeSite, postgresql_url: str, path: str) -> None:
    """A middleware between that hands on a copy of the scope changes nothing."""
    site = await make_site(postgresql_url, inside=[Middleware(CopyingScope)])
    add_routes(site)
    assert (await site.get(path)).json() is True


async def test_middleware_decides_behind_a_copied_scope(make_site: MakeSite, postgresql_url: str) -> None:
    """Behind a copy of the scope, too, the session is the middleware's, which rolls an error status back."""
    site = await make_site(postgresql_url, inside=[Middleware(CopyingScope)], commit_on_exit=True)

    @site.app.get("/")
    async def route(session: Annotated[AsyncSession, Depends(site.db.dependency)]) -> Response:
        session.add(Note(text="lost"))
        return JSONResponse("sorry", status_code=409)

    assert (await site.get()).status_code == 409
    assert await site.notes() == []


@pytest.mark.parametrize("options", [{}, {"multi_sessions": True}], ids=["unit", "units"])
async def test_inside_a_block(make_site: MakeSite, sqlite_url: str, options: dict[str, Any]) -> None:
    """Inside a block of another dependency, too, the session is that of the unit of the middleware."""
    site = await make_site(sqlite_url)

    async def block() -> AsyncGenerator[None]:
        async with site.db(**options):
            yield

    @site.app.get("/", dependencies=[Depends(block)])
    async def route(session: Annotated[AsyncSession, Depends(site.db.dependency)]) -> bool:
        session.add(Note(text="lost"))
        return session is site.db.session

    assert (await site.get()).json() is False
    assert await site.notes() == []


async def test_dependency_is_called_by_hand(make_site: MakeSite, postgresql_url: str) -> None:
    """A plain route may call the dependency itself, with its request."""
    site = await make_site(postgresql_url)

    async def route(request: Request) -> Response:
        return JSONResponse(await site.db.dependency(request) is site.db.session)

    site.app.add_route("/", route)
    assert (await site.get()).json() is True


# Where the middleware binds none.


@needs_function_scope
@each_failure
async def test_excluded_path_that_fails(
    make_site: MakeSite, database_url: str, failure: Failure, status: int
) -> None:
    """On a path that the middleware excludes, FastAPI's unit rolls back when the endpoint raises."""
    site = await make_site(database_url, exclude_paths=["/health"])

    @site.app.exception_handler(DomainError)
    async def handle(request: Request, error: Exception) -> Response:
        return PlainTextResponse("handled")

    @site.app.get("/health")
    async def route(session: Annotated[AsyncSession, Depends(site.db.dependency)]) -> None:
        session.add(Note(text="lost"))
        await session.flush()
        failure()

    app = watched(site)
    assert (await app.get("/health")).status_code == status
    assert (app.notes, app.checked_out) == ([], 0)


@needs_function_scope
async def test_excluded_path(make_site: MakeSite, database_url: str) -> None:
    """On a path that the middleware excludes, FastAPI opens a unit for the endpoint that asks for one."""
    site = await make_site(database_url, exclude_paths=["/health", "/plain"])

    @site.app.get("/health")
    async def health(session: Annotated[AsyncSession, Depends(site.db.dependency)]) -> bool:
        session.add(Note(text="written"))
        return session is site.db.session

    @site.app.get("/plain")
    async def plain() -> None:
        with pytest.raises(MissingSessionError, match="on an excluded path"):
            _ = site.db.session

    app = watched(site)
    assert (await app.get("/health")).json() is True
    assert (app.notes, app.checked_out) == (["written"], 0)
    assert (await app.get("/plain")).status_code == 200


async def call_websocket(app: ASGIApp) -> None:
    """Call an application as a server would for a WebSocket."""
    scope: Scope = {"type": "websocket", "path": "/", "headers": [], "query_string": b"", "subprotocols": []}

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        """Take what comes."""

    await app(scope, receive, send)


def add_websocket(site: Site) -> None:
    """Add a WebSocket that asks for the session."""

    @site.app.websocket("/")
    async def talk(
        websocket: WebSocket, session: Annotated[AsyncSession, Depends(site.db.dependency)]
    ) -> None:
        await websocket.accept()


async def test_websocket_under_the_middleware(make_site: MakeSite, postgresql_url: str) -> None:
    """A WebSocket has no unit: the dependency raises, and says to open one for each message."""
    site = await make_site(postgresql_url)
    add_websocket(site)
    with pytest.raises(
        MissingSessionError, match=r"in a WebSocket: open `async with db\(\):` for each message"
    ):
        await call_websocket(site.app)


async def test_websocket_without_a_middleware(bare_postgresql: Site) -> None:
    """Without a middleware FastAPI opens no unit for a WebSocket either."""
    add_websocket(bare_postgresql)
    with pytest.raises(MissingSessionError, match=r"open `async with db\(\):`"):
        await call_websocket(bare_postgresql.app)


@pytest.mark.skipif(
    not needs_function_scope.args[0], reason=f"FastAPI {FASTAPI} has dependencies of function scope"
)
async def test_fastapi_without_function_scope(bare_postgresql: Site) -> None:
    """An older FastAPI cannot end a unit before the response: the dependency raises."""

    @bare_postgresql.app.get("/")
    async def route(session: Annotated[AsyncSession, Depends(bare_postgresql.db.dependency)]) -> None:
        raise AssertionError

    with pytest.raises(MissingSessionError, match=r"open `async with db\(\):`"):
        await bare_postgresql.get()


async def test_request_that_is_not_fastapi_s(bare_postgresql: Site) -> None:
    """A request without FastAPI's stack, such as a plain route's, has no unit without a middleware."""

    async def route(request: Request) -> Response:
        return JSONResponse(str(await bare_postgresql.db.dependency(request)))

    bare_postgresql.app.add_route("/", route)
    with pytest.raises(MissingSessionError, match=r"open `async with db\(\):`"):
        await bare_postgresql.get()


# Several databases, and tests of applications.


@needs_function_scope
@pytest.mark.parametrize(("path", "status"), [("/good", 200), ("/bad", 404)])
async def test_dependencies_of_two_pairs(
    bare_postgresql: Site, sqlite_url: str, judge_for: JudgeFor, path: str, status: int
) -> None:
    """An endpoint with two databases has a unit of each; both are committed, or both rolled back."""
    async with open_worker(sqlite_url, judge_for) as other:
        first, second = bare_postgresql, other

        async def write(
            one: Annotated[AsyncSession, Depends(first.db.dependency)],
            two: Annotated[AsyncSession, Depends(second.db.dependency)],
        ) -> None:
            assert one is first.db.session
            assert two is second.db.session
            assert one is not two
            for session, note in ((one, "first"), (two, "second")):
                session.add(Note(text=note))
                await session.flush()

        first.app.get("/good", dependencies=[Depends(write)])(lambda: "written")
        first.app.get("/bad", dependencies=[Depends(write)])(as_http_exception)

        assert (await first.get(path)).status_code == status
        assert await first.notes() == (["first"] if status == 200 else [])
        assert await second.notes() == (["second"] if status == 200 else [])
        assert [site.checked_out() for site in (first, second)] == [0, 0]


Override = Callable[[], Awaitable[AsyncSession]]


@pytest.mark.parametrize("with_middleware", [True, False])
async def test_dependency_overrides(
    make_site: MakeSite, bare_postgresql: Site, sqlite_url: str, *, with_middleware: bool
) -> None:
    """A test may put a session of its own in the dependency's place, and roll back what was written by it."""
    site = await make_site(sqlite_url) if with_middleware else bare_postgresql
    given: list[AsyncSession] = []

    @site.app.get("/")
    async def route(session: Annotated[AsyncSession, Depends(site.db.dependency)]) -> None:
        given.append(session)
        session.add(Note(text="from the route"))
        await session.flush()

    async with AsyncExitStack() as exits:
        client = await exits.enter_async_context(site.client())
        session = await exits.enter_async_context(AsyncSession(site.engine))
        site.app.dependency_overrides[site.db.dependency] = lambda: session
        assert (await client.get("/")).status_code == 200
        assert given == [session]
        assert await session.scalar(select(Note.text)) == "from the route"
        await session.rollback()
    assert await site.notes() == []
