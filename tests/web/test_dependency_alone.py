"""`Depends(db.dependency)` without any middleware: FastAPI opens the unit around the endpoint."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated, Any

import pytest
from fastapi import BackgroundTasks, Depends, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.types import Message, Receive, Scope, Send

from fastapi_async_sqlalchemy import MissingSessionError, UnitClosedError
from tests.support.databases import JudgeFor
from tests.support.dependency import (
    DomainError,
    Failure,
    add_routes,
    as_http_exception,
    each_failure,
    each_route,
    needs_function_scope,
    watched,
)
from tests.support.interruption import Exchange
from tests.support.serving import asgi_client
from tests.support.site import Site, complaints
from tests.support.tables import ORPHAN, Note, Reply
from tests.support.worker import open_worker


@pytest.fixture
async def bare(database_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """An application without any middleware, whose pair is bound to each of the three databases."""
    async with open_worker(database_url, judge_for) as bare:
        yield bare


@pytest.fixture
async def deferring_bare(deferring_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """An application without any middleware, on each of the two databases whose COMMIT can fail."""
    async with open_worker(deferring_url, judge_for) as bare:
        yield bare


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
        with pytest.raises(UnitClosedError, match=r"open a new one with `async with db\.begin\(\):`"):
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
        with pytest.raises(UnitClosedError, match=r"has ended and can be used only once"):
            session.add(Note(text="late"))
        told.append("late")

    @bare.app.get("/", dependencies=[Depends(late)])
    async def route() -> None:
        bare.db.session.add(Note(text="endpoint"))

    assert (await bare.get()).status_code == 200
    assert told == ["late"]
    assert await bare.notes() == ["endpoint"]
