"""`Depends(db.dependency)`: the request's own session, with the pair's middleware and without any."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from importlib.metadata import version
from typing import Annotated, Any

import pytest
from attrs import define
from fastapi import BackgroundTasks, Depends, HTTPException, Request, Response, WebSocket
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from httpx2 import Response as Answer
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_async_sqlalchemy import MissingSessionError, UnitClosedError
from tests.support.databases import JudgeFor
from tests.support.interruption import Exchange
from tests.support.serving import asgi_client
from tests.support.site import MakeSite, Site, complaints
from tests.support.tables import ORPHAN, Note, Reply
from tests.support.worker import open_worker

FASTAPI = version("fastapi")
needs_function_scope = pytest.mark.skipif(
    tuple(int(part) for part in re.findall(r"\d+", FASTAPI)[:2]) < (0, 121),
    reason=f"FastAPI {FASTAPI} ends no dependency before the response: 0.121.0 is the first that does",
)
"""For tests without a middleware: FastAPI itself then opens the unit around the endpoint."""


class DomainError(Exception):
    """An error of the application's own."""


@pytest.fixture
async def bare(database_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """An application without any middleware, whose pair is bound to each of the three databases."""
    async with open_worker(database_url, judge_for) as bare:
        yield bare


@pytest.fixture
async def bare_postgresql(postgresql_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """An application without any middleware, whose pair is bound to PostgreSQL."""
    async with open_worker(postgresql_url, judge_for) as bare:
        yield bare


@pytest.fixture
async def deferring_bare(deferring_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """An application without any middleware, on each of the two databases whose COMMIT can fail."""
    async with open_worker(deferring_url, judge_for) as bare:
        yield bare


@define(eq=False)
class Watched:
    """Stands around an application and looks from outside at the moment when its response starts."""

    app: ASGIApp
    site: Site
    status: int | None = None
    notes: list[object] | None = None
    checked_out: int | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""

        async def watching(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.checked_out = self.site.checked_out()
                self.status = message["status"]
                self.notes = await self.site.notes()
            await send(message)

        await self.app(scope, receive, watching)

    async def get(self, path: str = "/") -> Answer:
        """Make one request; an error of the application answers 500."""
        async with asgi_client(self, raise_app_exceptions=False) as client:
            return await client.get(path)


def watched(site: Site) -> Watched:
    """Return a site's application, watched."""
    return Watched(site.app, site)


# The session of the unit that the middleware has bound.


def add_routes(site: Site) -> None:
    """Add a route for each way to come by the session; each says whether it is the unit's own."""
    dependency = site.db.dependency

    async def wrapped(session: Annotated[AsyncSession, Depends(dependency)]) -> AsyncSession:
        return session

    def wrapped_in_a_thread(session: Annotated[AsyncSession, Depends(dependency)]) -> AsyncSession:
        assert session is site.db.session
        return session

    @site.app.get("/async")
    async def async_route(session: Annotated[AsyncSession, Depends(dependency)]) -> bool:
        return session is site.db.session is site.db.unit.session

    @site.app.get("/def")
    def def_route(session: Annotated[AsyncSession, Depends(dependency)]) -> bool:
        return session is site.db.session is site.db.unit.session

    @site.app.get("/nested")
    async def nested_route(
        first: Annotated[AsyncSession, Depends(wrapped)],
        second: Annotated[AsyncSession, Depends(wrapped_in_a_thread)],
        session: Annotated[AsyncSession, Depends(dependency)],
    ) -> bool:
        return first is second is session is site.db.session

    @site.app.get("/uncached")
    async def uncached_route(
        first: Annotated[AsyncSession, Depends(dependency, use_cache=False)],
        second: Annotated[AsyncSession, Depends(dependency, use_cache=False)],
        third: Annotated[AsyncSession, Depends(wrapped, use_cache=False)],
    ) -> bool:
        return first is second is third is site.db.session

    @site.app.get("/decorated", dependencies=[Depends(dependency)])
    async def decorated_route() -> bool:
        return site.db.session is site.db.unit.session


each_route = pytest.mark.parametrize("path", ["/async", "/def", "/nested", "/uncached", "/decorated"])


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


# Without a middleware: a unit around the endpoint.


@needs_function_scope
@each_route
async def test_session_of_fastapi_s_unit(bare_postgresql: Site, path: str) -> None:
    """Without a middleware the dependency is `db.session` of the one unit that FastAPI opens."""
    add_routes(bare_postgresql)
    assert (await bare_postgresql.get(path)).json() is True


@needs_function_scope
@pytest.mark.parametrize("path", ["/async", "/def", "/router"])
async def test_committed_before_the_response(bare: Site, path: str) -> None:
    """When the response starts the writes are committed and no connection is out."""

    @bare.app.get("/async")
    async def async_route(session: Annotated[AsyncSession, Depends(bare.db.dependency)]) -> int:
        session.add(note := Note(text="written"))
        await session.flush()
        assert bare.checked_out() == 1
        return note.id

    @bare.app.get("/def")
    def def_route(session: Annotated[AsyncSession, Depends(bare.db.dependency)]) -> int:
        session.add(Note(text="written"))
        return 1

    @bare.app.get("/router", dependencies=[Depends(bare.db.dependency)])
    async def route_of_db() -> int:
        bare.db.session.add(Note(text="written"))
        return 1

    app = watched(bare)
    assert (await app.get(path)).json() == 1
    assert (app.status, app.notes, app.checked_out) == (200, ["written"], 0)


@needs_function_scope
async def test_written_object_is_the_response(bare: Site) -> None:
    """The endpoint may return an object that it has written: it is read before the unit ends."""

    @bare.app.get("/", response_model=None)
    async def route(session: Annotated[AsyncSession, Depends(bare.db.dependency)]) -> dict[str, object]:
        session.add(note := Note(text="written"))
        await session.commit()
        return {"id": note.id, "text": note.text}

    assert (await bare.get()).json() == {"id": 1, "text": "written"}


@needs_function_scope
async def test_dependency_alone_takes_no_connection(bare: Site) -> None:
    """An endpoint that asks for the session and does not use it checks nothing out."""

    @bare.app.get("/")
    async def route(session: Annotated[AsyncSession, Depends(bare.db.dependency)]) -> int:
        return bare.checked_out()

    assert (await bare.get()).json() == 0
    assert not bare.db.pool_status().checked_out


def as_http_exception() -> None:
    """Fail with an answer."""
    raise HTTPException(404)


def as_handled_error() -> None:
    """Fail with an error that a handler answers."""
    raise DomainError


def as_unknown_error() -> None:
    """Fail with an error that nobody handles."""
    message = "boom"
    raise RuntimeError(message)


Failure = Callable[[], None]
each_failure = pytest.mark.parametrize(
    ("failure", "status"), [(as_http_exception, 404), (as_handled_error, 200), (as_unknown_error, 500)]
)


@needs_function_scope
@each_failure
async def test_rolled_back_when_the_endpoint_raises(
    bare: Site, failure: Failure, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that leaves the endpoint rolls back, whatever answer is made of it, and nothing is said."""

    @bare.app.exception_handler(DomainError)
    async def handle(request: Request, error: Exception) -> Response:
        return PlainTextResponse("handled")

    @bare.app.get("/")
    async def route(session: Annotated[AsyncSession, Depends(bare.db.dependency)]) -> None:
        session.add(Note(text="lost"))
        await session.flush()
        failure()

    app = watched(bare)
    assert (await app.get()).status_code == status
    assert (app.status, app.notes, app.checked_out) == (status, [], 0)
    assert complaints(caplog) == []


@needs_function_scope
async def test_rolled_back_when_another_dependency_raises(bare: Site) -> None:
    """A dependency that fails after another one has written rolls that back; the endpoint is not called."""

    async def writing(session: Annotated[AsyncSession, Depends(bare.db.dependency)]) -> None:
        session.add(Note(text="lost"))
        await session.flush()

    @bare.app.get("/", dependencies=[Depends(writing), Depends(as_http_exception)])
    async def route() -> None:
        raise AssertionError

    app = watched(bare)
    assert (await app.get()).status_code == 404
    assert (app.notes, app.checked_out) == ([], 0)


@needs_function_scope
async def test_rolled_back_when_the_request_is_not_valid(bare: Site) -> None:
    """A request that FastAPI refuses after a dependency has written rolls that back."""

    async def writing(session: Annotated[AsyncSession, Depends(bare.db.dependency)]) -> None:
        session.add(Note(text="lost"))
        await session.flush()

    @bare.app.get("/", dependencies=[Depends(writing)])
    async def route(number: int) -> int:
        return number

    app = watched(bare)
    assert (await app.get("/?number=word")).status_code == 422
    assert (app.notes, app.checked_out) == ([], 0)


@needs_function_scope
async def test_rolled_back_when_the_response_is_not_valid(bare: Site) -> None:
    """An endpoint whose return value FastAPI refuses has failed: its writes are rolled back."""

    @bare.app.get("/", response_model=int)
    async def route(session: Annotated[AsyncSession, Depends(bare.db.dependency)]) -> str:
        session.add(Note(text="lost"))
        await session.flush()
        return "no number"

    app = watched(bare)
    assert (await app.get()).status_code == 500
    assert (app.notes, app.checked_out) == ([], 0)


@needs_function_scope
async def test_error_status_that_is_returned_commits(bare: Site) -> None:
    """Without a middleware nobody looks at the status: an endpoint that returns has succeeded."""

    @bare.app.get("/")
    async def route(session: Annotated[AsyncSession, Depends(bare.db.dependency)]) -> Response:
        session.add(Note(text="written"))
        return JSONResponse("sorry", status_code=409)

    app = watched(bare)
    assert (await app.get()).status_code == 409
    assert app.notes == ["written"]


@needs_function_scope
@pytest.mark.parametrize(("handled", "status"), [(True, 409), (False, 500)])
async def test_failing_commit_is_no_success(deferring_bare: Site, *, handled: bool, status: int) -> None:
    """A COMMIT that fails never answers 200: the application's own handler does, or the server."""
    bare = deferring_bare
    if handled:

        @bare.app.exception_handler(IntegrityError)
        async def handle(request: Request, error: Exception) -> Response:
            return PlainTextResponse("conflict", status_code=409)

    @bare.app.get("/")
    async def route(session: Annotated[AsyncSession, Depends(bare.db.dependency)]) -> str:
        session.add_all([Note(text="lost"), Reply(**ORPHAN)])
        return "written"

    app = watched(bare)
    answer = await app.get()
    assert answer.status_code == status
    assert "written" not in answer.text
    assert (app.status, app.notes, app.checked_out) == (status, [], 0)


@needs_function_scope
@pytest.mark.parametrize(("path", "outcome"), [("/good", "committed"), ("/bad", "rolled back")])
async def test_hooks_run_before_the_response(bare: Site, path: str, outcome: str) -> None:
    """The hooks of the unit's outcome have run, with no connection held, when the response starts."""
    told: list[object] = []

    async def with_hooks(session: Annotated[AsyncSession, Depends(bare.db.dependency)]) -> None:
        bare.db.unit.on_commit(lambda: told.append(("committed", bare.checked_out())))
        bare.db.unit.on_rollback(lambda: told.append(("rolled back", bare.checked_out())))
        session.add(Note(text="written"))
        await session.flush()

    @bare.app.get("/good", dependencies=[Depends(with_hooks)])
    async def good() -> None:
        """Succeed."""

    @bare.app.get("/bad", dependencies=[Depends(with_hooks)])
    async def bad() -> None:
        raise HTTPException(404)

    async def outside(scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            told.append(message["type"])
            await send(message)

        await bare.app(scope, receive, sending if scope["type"] == "http" else send)

    async with asgi_client(outside) as client:
        await client.get(path)
    assert told[:2] == [(outcome, 0), "http.response.start"]


@needs_function_scope
async def test_requests_at_once_have_units_of_their_own(bare: Site) -> None:
    """Requests at the same time have a session each, and each commits its own note."""
    sessions: list[AsyncSession] = []
    barrier = asyncio.Barrier(4)

    @bare.app.get("/{number}")
    async def route(number: int, session: Annotated[AsyncSession, Depends(bare.db.dependency)]) -> None:
        sessions.append(session)
        await barrier.wait()
        assert bare.db.session is session
        session.add(Note(text=str(number)))

    async with bare.client() as client:
        await asyncio.gather(*(client.get(f"/{number}") for number in range(4)))
    assert len({id(session) for session in sessions}) == 4
    assert await bare.notes() == ["0", "1", "2", "3"]


@needs_function_scope
async def test_no_unit_is_current_after_the_request(bare_postgresql: Site) -> None:
    """The unit is current in its request only, although the client calls in the test's own context."""

    @bare_postgresql.app.get("/")
    async def route(session: Annotated[AsyncSession, Depends(bare_postgresql.db.dependency)]) -> None:
        await session.scalar(select(Note.text))

    await bare_postgresql.get()
    with pytest.raises(MissingSessionError, match=r"no unit of work here: open `async with db\(\):`"):
        _ = bare_postgresql.db.session


@needs_function_scope
async def test_inherited_unit_is_not_reused(bare_postgresql: Site) -> None:
    """A request that is made in process from inside an open unit has a unit of its own."""
    bare = bare_postgresql

    @bare.app.get("/")
    async def route(session: Annotated[AsyncSession, Depends(bare.db.dependency)]) -> None:
        session.add(Note(text="request"))

    async with bare.client() as client, bare.db() as unit:
        assert (await client.get("/")).status_code == 200
        assert bare.db.unit is unit
        assert not unit.session.new
        assert await bare.notes() == ["request"]


@needs_function_scope
async def test_request_of_a_task_that_outlived_its_unit(bare_postgresql: Site) -> None:
    """A task whose inherited unit has ended calls the application: the request has a unit of its own."""
    bare = bare_postgresql
    ended = asyncio.Event()

    @bare.app.get("/")
    async def route(session: Annotated[AsyncSession, Depends(bare.db.dependency)]) -> None:
        session.add(Note(text="request"))

    async with bare.client(raise_app_exceptions=False) as client:

        async def later() -> int:
            await ended.wait()
            return (await client.get("/")).status_code

        async with bare.db():
            task = asyncio.create_task(later())
        ended.set()
        assert await task == 200
    assert await bare.notes() == ["request"]


@needs_function_scope
async def test_cancelled_endpoint_rolls_back(bare: Site) -> None:
    """An endpoint that is cancelled gives its connection back, and what it wrote is rolled back."""
    inside = asyncio.Event()

    @bare.app.get("/")
    async def route(session: Annotated[AsyncSession, Depends(bare.db.dependency)]) -> None:
        session.add(Note(text="lost"))
        await session.flush()
        inside.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(Exchange("/").call(bare.app))
    await inside.wait()
    task.cancel("enough")
    with pytest.raises(asyncio.CancelledError, match="enough"):
        await task
    assert bare.checked_out() == 0
    assert await bare.notes() == []


@needs_function_scope
async def test_under_another_middleware(bare_postgresql: Site) -> None:
    """A middleware that runs the application in another task changes nothing."""
    bare = bare_postgresql

    async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
        return await call_next(request)

    bare.app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)

    @bare.app.get("/")
    async def route(session: Annotated[AsyncSession, Depends(bare.db.dependency)]) -> bool:
        session.add(Note(text="written"))
        return session is bare.db.session

    app = watched(bare)
    assert (await app.get()).json() is True
    assert (app.notes, app.checked_out) == (["written"], 0)


# After the endpoint.


@needs_function_scope
@pytest.mark.parametrize("path", ["/background", "/stream"])
async def test_no_connection_is_held_after_the_endpoint(bare: Site, path: str) -> None:
    """Background tasks and the body of a stream hold no connection; they open a unit of their own."""
    seen: list[int] = []

    async def tail(session: AsyncSession) -> None:
        seen.append(bare.checked_out())
        with pytest.raises(MissingSessionError, match=r"open `async with db\(\):`"):
            _ = bare.db.session
        with pytest.raises(UnitClosedError, match=r"open a new one with `async with db\(\):`"):
            await session.scalar(select(Note.text))
        async with bare.db(commit_on_exit=True) as unit:
            unit.session.add(Note(text="tail"))

    @bare.app.get("/background")
    async def with_background(
        session: Annotated[AsyncSession, Depends(bare.db.dependency)], tasks: BackgroundTasks
    ) -> str:
        session.add(Note(text="head"))
        tasks.add_task(tail, session)
        return "written"

    @bare.app.get("/stream")
    async def with_stream(session: Annotated[AsyncSession, Depends(bare.db.dependency)]) -> Response:
        session.add(Note(text="head"))

        async def body() -> AsyncGenerator[str]:
            await tail(session)
            yield "written"

        return StreamingResponse(body())

    app = watched(bare)
    assert "written" in (await app.get(path)).text
    assert (app.status, app.notes, app.checked_out) == (200, ["head"], 0)
    assert seen == [0]
    assert await bare.notes() == ["head", "tail"]


@needs_function_scope
async def test_teardown_of_function_scope_writes(bare: Site) -> None:
    """A dependency of function scope that has the session ends before the unit: its teardown is committed."""

    async def writing(
        session: Annotated[AsyncSession, Depends(bare.db.dependency)],
    ) -> AsyncGenerator[AsyncSession]:
        yield session
        session.add(Note(text="teardown"))

    function_scope: dict[str, Any] = {"scope": "function"}

    @bare.app.get("/")
    async def route(session: Annotated[AsyncSession, Depends(writing, **function_scope)]) -> bool:
        session.add(Note(text="endpoint"))
        return session is bare.db.session

    app = watched(bare)
    assert (await app.get()).json() is True
    assert (app.notes, app.checked_out) == (["endpoint", "teardown"], 0)


@needs_function_scope
async def test_teardown_of_request_scope_comes_too_late(bare_postgresql: Site) -> None:
    """A dependency of request scope ends after the response, when the unit has ended too."""
    bare = bare_postgresql
    told: list[str] = []

    async def late(
        session: Annotated[AsyncSession, Depends(bare.db.dependency)],
    ) -> AsyncGenerator[None]:
        yield
        with pytest.raises(MissingSessionError, match=r"open `async with db\(\):`"):
            _ = bare.db.session
        with pytest.raises(UnitClosedError, match=r"has ended and serves one use only"):
            session.add(Note(text="late"))
        told.append("late")

    @bare.app.get("/", dependencies=[Depends(late)])
    async def route() -> None:
        bare.db.session.add(Note(text="endpoint"))

    assert (await bare.get()).status_code == 200
    assert told == ["late"]
    assert await bare.notes() == ["endpoint"]


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
