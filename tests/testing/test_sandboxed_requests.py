"""The deployed application inside a sandbox: requests commit, roll back and take turns, by each driver."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from fastapi import BackgroundTasks, FastAPI, HTTPException, WebSocket
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from starlette.middleware import Middleware
from starlette.requests import Request

from fastapi_async_sqlalchemy import SessionProxy, create_middleware_and_session_proxy
from fastapi_async_sqlalchemy.testing import SandboxedApp, SandboxError, sandbox
from tests.support.databases import JudgeFor
from tests.support.requests import AROUND
from tests.support.site import MakeSite
from tests.support.tables import ORPHAN, Note, Reply, engine_with_tables

if TYPE_CHECKING:
    from fastapi.testclient import TestClient


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


async def test_requests_commit_and_roll_back(driver_url: str, make_site: MakeSite) -> None:
    """A 201 stays for the next request, a 403 does not, a duplicate key is the application's 409."""
    site = await make_site(driver_url, commit_on_exit=True)
    add_routes(site.app, site.db)
    async with sandbox(site.db) as box, site.client() as client:
        assert (await client.post("/notes/first")).json() == 2
        assert (await client.post("/notes/first")).status_code == 409
        assert (await client.post("/refused/other")).status_code == 403
        stored = ["first", "first, afterwards", "first, by text"]
        assert (await client.get("/notes")).json() == stored
        assert (await client.get("/stream")).text.split("\n") == [*stored, ""]
        assert (box.commits, box.rollbacks) == (2, 2)
    assert await site.notes() == []


@pytest.mark.parametrize(("outside", "inside"), AROUND)
async def test_concurrent_requests_take_turns(
    driver_url: str, make_site: MakeSite, outside: list[Middleware], inside: list[Middleware]
) -> None:
    """Requests at the same time wait for each other, whatever middleware is around them."""
    site = await make_site(driver_url, commit_on_exit=True, outside=outside, inside=inside)
    add_routes(site.app, site.db)
    async with sandbox(site.db) as box, site.client() as client:
        answers = await asyncio.gather(*(client.post(f"/notes/{number}") for number in range(5)))
        assert all(answer.status_code == 201 for answer in answers)
        assert len((await client.get("/notes")).json()) == 15
        assert box.commits == 10
    assert await site.notes() == []


def test_test_client_sees_the_undone_world(driver_url: str, test_client: "type[TestClient]") -> None:
    """`TestClient` runs the application in a loop of its own, where the wrapper opens the sandbox."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    app = FastAPI()
    app.add_middleware(middleware, db_url=driver_url, commit_on_exit=True)
    add_routes(app, db)
    asyncio.run(_make_tables(driver_url))
    for _ in range(2):
        with test_client(SandboxedApp(app, db)) as client:
            assert client.get("/notes").json() == []
            assert client.post("/notes/first").json() == 2
            with client.websocket_connect("/socket") as socket:
                socket.send_text("by a socket")
                assert socket.receive_text() == "written"
            assert client.post("/refused/other").status_code == 403
            assert client.get("/stream").text.count("\n") == 4
    with test_client(app) as client:
        assert client.get("/notes").json() == []


async def _make_tables(url: str) -> None:
    async with engine_with_tables(url):
        pass


@pytest.mark.parametrize("mounted", [False, True])
def test_pair_that_was_left_out(sqlite_url: str, test_client: "type[TestClient]", *, mounted: bool) -> None:
    """Startup refuses an application whose other pair would write for good, that of a mounted one as well."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    forgotten, other = create_middleware_and_session_proxy(AsyncSession)
    app, inner = FastAPI(), FastAPI()
    app.add_middleware(middleware, db_url=sqlite_url)
    (inner if mounted else app).add_middleware(forgotten, db_url=sqlite_url)
    app.mount("/inner", inner)
    refused = pytest.raises(SandboxError, match="whose writes would stay: give SandboxedApp, or the fixture")
    with refused, test_client(SandboxedApp(app, db)):
        pass
    with test_client(SandboxedApp(app, db, other)):
        pass


def test_wrapper_counts_and_refuses(sqlite_url: str, test_client: "type[TestClient]") -> None:
    """The wrapper's sandbox is at hand once the application has started, and it says so before."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    app = FastAPI()
    app.add_middleware(middleware, db_url=sqlite_url, commit_on_exit=True)
    add_routes(app, db)
    asyncio.run(_make_tables(sqlite_url))
    wrapped = SandboxedApp(app, db)
    with pytest.raises(SandboxError, match=r"write `with TestClient\(\.\.\.\) as client:`"):
        test_client(wrapped).get("/notes")
    with test_client(wrapped) as client:
        client.post("/notes/first")
    assert wrapped.box.commits == 2
    with pytest.raises(SandboxError, match="or it has ended"):
        client.get("/notes")


def test_failure_that_no_request_met(sqlite_url: str, test_client: "type[TestClient]") -> None:
    """A client's block ends with the error of a failure that no request has met."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    app = FastAPI()
    app.add_middleware(middleware, db_url=sqlite_url, commit_on_exit=True)
    add_routes(app, db)
    asyncio.run(_make_tables(sqlite_url))
    wrapped = SandboxedApp(app, db)

    def read() -> None:
        with test_client(wrapped) as client:
            wrapped.box.fail_commit()
            assert client.get("/notes").json() == []

    with pytest.raises(SandboxError, match="has met no COMMIT"):
        read()


async def test_application_may_use_one_loop_only(
    undoing_ddl_url: str, test_client: "type[TestClient]"
) -> None:
    """An application in another loop than the sandbox's is told of the wrapper."""
    async with deployed(undoing_ddl_url) as (app, db), sandbox(db):

        def call() -> None:
            with test_client(app) as client, pytest.raises(SandboxError, match=r"SandboxedApp\(app, db\)"):
                client.get("/notes")

        await asyncio.to_thread(call)


def test_deferred_constraint_is_the_applications_409(
    postgresql_driver_url: str, test_client: "type[TestClient]"
) -> None:
    """A constraint that fails at COMMIT is answered as deployed, in the sandbox and without it."""
    middleware, db = create_middleware_and_session_proxy(AsyncSession)
    app = FastAPI()
    app.add_middleware(middleware, db_url=postgresql_driver_url, commit_on_exit=True)
    add_routes(app, db)
    asyncio.run(_make_tables(postgresql_driver_url))
    answers: list[object] = []
    for served in (SandboxedApp(app, db), app):
        with test_client(served) as client:
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
