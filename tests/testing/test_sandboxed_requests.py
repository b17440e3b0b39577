"""The deployed application inside a sandbox: its requests commit, roll back and take turns, by each driver."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import pytest
from fastapi import BackgroundTasks, FastAPI, HTTPException, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from starlette.requests import Request

from fastapi_async_sqlalchemy import SQLAlchemyMiddleware, SessionProxy, create_middleware_and_session_proxy
from fastapi_async_sqlalchemy.testing import SandboxedApp, SandboxError, sandbox
from tests.support.databases import JudgeFor
from tests.support.site import Site
from tests.support.tables import ORPHAN, Note, Reply, engine_with_tables


async def conflict(_: Request, error: Exception) -> JSONResponse:
    """Answer a duplicate key or a dangling reference."""
    return JSONResponse({"detail": type(error).__name__}, status_code=409)


def add_routes(app: FastAPI, db: SessionProxy[AsyncSession]) -> None:
    """Add the routes of a small service, as deployed."""
    app.add_exception_handler(IntegrityError, conflict)

    @app.post("/notes/{name}", status_code=201)
    async def write(name: str, tasks: BackgroundTasks) -> int:
        db.session.add(Note(text=name))
        await db.session.flush()
        await db.session.execute(text("INSERT INTO note (text) VALUES (:text)"), {"text": f"{name}, by text"})
        tasks.add_task(write_later, name)
        return len(list(await db.session.scalars(select(Note))))

    async def write_later(name: str) -> None:
        async with db(commit_on_exit=True) as unit:
            unit.session.add(Note(text=f"{name}, afterwards"))

    @app.post("/refused/{name}")
    async def refuse(name: str) -> None:
        await db.session.execute(insert(Note).values(text=name))
        raise HTTPException(403)

    @app.post("/orphan", status_code=201)
    async def orphan() -> None:
        db.session.add(Reply(**ORPHAN))

    @app.get("/notes")
    async def read() -> list[str]:
        return list(await db.session.scalars(select(Note.text).order_by(Note.text)))

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def lines() -> AsyncGenerator[str]:
            async for line in await db.session.stream_scalars(select(Note.text).order_by(Note.text)):
                yield f"{line}\n"

        return StreamingResponse(lines())

    @app.websocket("/socket")
    async def socket(websocket: WebSocket) -> None:
        await websocket.accept()
        async with db(commit_on_exit=True) as unit:
            unit.session.add(Note(text=await websocket.receive_text()))
        await websocket.send_text("written")
        await websocket.close()


@asynccontextmanager
async def deployed(url: str) -> AsyncGenerator[tuple[FastAPI, SessionProxy[AsyncSession]]]:
    """Make an application from its URL, on a database that has tables, but no rows."""
    async with engine_with_tables(url):
        middleware, db = create_middleware_and_session_proxy(AsyncSession)
        app = FastAPI()
        app.add_middleware(middleware, db_url=url, commit_on_exit=True)
        add_routes(app, db)
        yield app, db


async def test_requests_commit_and_roll_back(sandboxed: Site) -> None:
    """A 201 stays for the next request, a 403 does not, a duplicate key is the application's 409."""
    sandboxed.app.add_middleware(_middleware_of(sandboxed), custom_engine=sandboxed.engine, commit_on_exit=True)
    add_routes(sandboxed.app, sandboxed.db)
    async with sandbox(sandboxed.db) as box, sandboxed.client() as client:
        assert (await client.post("/notes/first")).json() == 3
        assert (await client.post("/notes/first")).status_code == 409
        assert (await client.post("/refused/other")).status_code == 403
        stored = ["before", "first", "first, afterwards", "first, by text"]
        assert (await client.get("/notes")).json() == stored
        assert (await client.get("/stream")).text.split("\n") == [*stored, ""]
        assert (box.commits, box.rollbacks) == (2, 2)


async def test_concurrent_requests_take_turns(sandboxed: Site) -> None:
    """Requests at the same time wait for each other, and none reads what another one has not committed."""
    sandboxed.app.add_middleware(_middleware_of(sandboxed), custom_engine=sandboxed.engine, commit_on_exit=True)
    add_routes(sandboxed.app, sandboxed.db)
    async with sandbox(sandboxed.db) as box, sandboxed.client() as client:
        answers = await asyncio.gather(*(client.post(f"/notes/{number}") for number in range(5)))
        assert all(answer.status_code == 201 for answer in answers)
        assert len((await client.get("/notes")).json()) == 16
        assert box.commits == 10


def _middleware_of(site: Site) -> type[SQLAlchemyMiddleware[AsyncSession]]:
    """Return a middleware for the pair of a process that had no application."""
    members = {"_database": site.db._database, "_current": site.db._current}
    return type("Middleware", (SQLAlchemyMiddleware,), members)


@pytest.fixture(params=["postgresql", "psycopg", "mariadb", "asyncmy", "sqlite"])
def app_url(request: pytest.FixtureRequest) -> str:
    """An empty database by each driver in turn."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


def test_test_client_sees_the_undone_world(app_url: str) -> None:
    """`TestClient` runs the application in a loop of its own: the wrapper opens the sandbox there, each time."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    app = FastAPI()
    app.add_middleware(middleware, db_url=app_url, commit_on_exit=True)
    add_routes(app, db)
    asyncio.run(_make_tables(app_url))
    for _ in range(2):
        with TestClient(SandboxedApp(app, db)) as client:
            assert client.get("/notes").json() == []
            assert client.post("/notes/first").json() == 2
            with client.websocket_connect("/socket") as socket:
                socket.send_text("by a socket")
                assert socket.receive_text() == "written"
            assert client.post("/refused/other").status_code == 403
            assert client.get("/stream").text.count("\n") == 4
    with TestClient(app) as client:
        assert client.get("/notes").json() == []


async def _make_tables(url: str) -> None:
    async with engine_with_tables(url):
        pass


def test_wrapper_counts_and_refuses(sqlite_url: str) -> None:
    """The wrapper's sandbox is at hand once the application has started, and it says so before."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    app = FastAPI()
    app.add_middleware(middleware, db_url=sqlite_url, commit_on_exit=True)
    add_routes(app, db)
    asyncio.run(_make_tables(sqlite_url))
    wrapped = SandboxedApp(app, db)
    with pytest.raises(SandboxError, match=r"write `with TestClient\(\.\.\.\) as client:`"):
        TestClient(wrapped).get("/notes")
    with TestClient(wrapped) as client:
        client.post("/notes/first")
        assert wrapped.box.commits == 2


@pytest.mark.parametrize("kind", ["postgresql", "sqlite"])
async def test_application_may_use_one_loop_only(kind: str, request: pytest.FixtureRequest) -> None:
    """An application in another loop than the sandbox's is told of the wrapper."""
    url: str = request.getfixturevalue(f"{kind}_url")
    async with deployed(url) as (app, db), sandbox(db):

        def call() -> None:
            with TestClient(app) as client, pytest.raises(SandboxError, match=r"SandboxedApp\(app, db\)"):
                client.get("/notes")

        await asyncio.to_thread(call)


@pytest.mark.parametrize("kind", ["postgresql", "psycopg"])
def test_deferred_constraint_is_the_applications_409(kind: str, request: pytest.FixtureRequest) -> None:
    """A constraint that fails at COMMIT is answered as deployed, in the sandbox and without it."""
    url: str = request.getfixturevalue(f"{kind}_url")
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    app = FastAPI()
    app.add_middleware(middleware, db_url=url, commit_on_exit=True)
    add_routes(app, db)
    asyncio.run(_make_tables(url))
    answers: list[object] = []
    for served in (SandboxedApp(app, db), app):
        with TestClient(served) as client:
            answer = client.post("/orphan")
            answers.append((answer.status_code, answer.json()))
    assert answers == [(409, {"detail": "IntegrityError"})] * 2


async def test_engine_given_meanwhile_is_taken_in(database_url: str, judge_for: JudgeFor) -> None:
    """An engine that is bound, or comes by `binds`, while the sandbox is open, is taken in."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    judge = await judge_for(database_url)
    async with engine_with_tables(database_url), sandbox(db):
        async with db.connect(database_url), db(commit_on_exit=True) as unit:
            unit.session.add(Note(text="by a URL"))
        bound = create_async_engine(database_url)
        async with db.connect(database_url, session_args={"binds": {Note: bound}}):
            async with db(commit_on_exit=True) as unit:
                unit.session.add(Note(text="by binds"))
            async with db() as unit:
                assert len(list(await unit.session.scalars(select(Note)))) == 2
        await bound.dispose()
    assert await judge.rows("SELECT text FROM note") == []
