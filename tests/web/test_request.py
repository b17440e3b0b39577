"""A request has one unit of work of its own, which is settled before its response starts."""

import asyncio
import functools
import gc
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Annotated, Any, NoReturn, cast
from weakref import WeakSet

import fastapi
import pytest
from anyio import from_thread
from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from httpx2 import AsyncClient
from sqlalchemy import event, func, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_async_sqlalchemy import (
    ConfigurationError,
    MissingSessionError,
    UnexpectedRollbackError,
    create_middleware_and_session_proxy,
)
from tests.support.databases import Judge
from tests.support.serving import asgi_client, raw_get, serve
from tests.support.site import MakeSite, complaints
from tests.support.tables import ORPHAN, Note, Reply, engine_with_tables

Rule = Callable[[int, BaseException | None], bool]


class DomainError(Exception):
    """An error of the application's own."""


def fail() -> NoReturn:
    """Fail with an error of the application's own."""
    raise DomainError


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Do nothing, from another task, as every BaseHTTPMiddleware does."""
    return await call_next(request)


AROUND = [
    pytest.param([], [], id="alone"),
    pytest.param([Middleware(BaseHTTPMiddleware, dispatch=pass_on)], [], id="BaseHTTP outside"),
    pytest.param([], [Middleware(BaseHTTPMiddleware, dispatch=pass_on)], id="BaseHTTP inside"),
    pytest.param([Middleware(GZipMiddleware, minimum_size=0)], [], id="GZip outside"),
    pytest.param([], [Middleware(GZipMiddleware, minimum_size=0)], id="GZip inside"),
    pytest.param([Middleware(CORSMiddleware, allow_origins=["*"])], [], id="CORS outside"),
    pytest.param([], [Middleware(CORSMiddleware, allow_origins=["*"])], id="CORS inside"),
]
"""Other middlewares, outside and inside of the pair's own."""
around = pytest.mark.parametrize(("outside", "inside"), AROUND)


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


# The settle table


@pytest.mark.parametrize(
    ("status", "kept"),
    [
        *[(status, True) for status in (200, 201, 204, 302, 304, 399)],
        *[(status, False) for status in (400, 404, 409, 422, 500, 503)],
    ],
)
async def test_returned_status(make_site: MakeSite, database_url: str, status: int, *, kept: bool) -> None:
    """A status below 400 commits what was written, one from 400 on rolls it back."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.get("/")
    async def write() -> Response:
        site.db.session.add(Note(text="new"))
        await site.db.session.flush()
        return Response(status_code=status)

    assert (await site.get()).status_code == status
    assert await site.notes() == ["new"] * kept


async def fail_by_http_exception() -> None:
    """Fail with an answer that says so."""
    raise HTTPException(404)


async def redirect_by_http_exception() -> None:
    """Answer by an exception whose status is no error."""
    raise HTTPException(302, headers={"location": "/elsewhere"})


async def fail_by_mapped_error() -> None:
    """Fail with an error that a handler maps to 200."""
    raise DomainError


async def fail_by_unknown_error() -> None:
    """Fail with an error that nobody handles."""
    raise LookupError


async def fail_by_validation(number: int) -> None:
    """Ask for an argument that the request does not have."""


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        (fail_by_http_exception, 404),
        (redirect_by_http_exception, 302),
        (fail_by_mapped_error, 200),
        (fail_by_unknown_error, 500),
        (fail_by_validation, 422),
    ],
)
@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_raised_error(
    make_site: MakeSite,
    database_url: str,
    caplog: pytest.LogCaptureFixture,
    ending: Callable[..., Awaitable[None]],
    status: int,
    *,
    commit_on_exit: bool,
) -> None:
    """An error rolls back, whatever answer it is turned into, and that is nothing to warn of."""
    site = await make_site(database_url, commit_on_exit=commit_on_exit)

    @site.app.exception_handler(DomainError)
    async def answer(request: Request, error: Exception) -> Response:
        return Response()

    async def write() -> None:
        site.db.session.add(Note(text="new"))
        await site.db.session.flush()

    site.app.get("/", dependencies=[Depends(write)])(ending)
    assert (await site.get(raise_app_exceptions=False)).status_code == status
    assert await site.notes() == []
    assert complaints(caplog) == []


@pytest.mark.parametrize(("outside", "inside"), [case for case in AROUND if case.id != "BaseHTTP inside"])
@pytest.mark.parametrize("threaded", [True, False])
async def test_mapped_error_among_other_middlewares(
    make_site: MakeSite,
    postgresql_url: str,
    outside: list[Middleware],
    inside: list[Middleware],
    *,
    threaded: bool,
) -> None:
    """An error that a handler, `async` or not, maps to 200 rolls back with other middlewares around, too."""
    site = await make_site(postgresql_url, outside=outside, inside=inside, commit_on_exit=True)

    async def answer(request: Request, error: Exception) -> Response:
        return Response("mended")

    def answer_in_thread(request: Request, error: Exception) -> Response:
        return Response("mended")

    site.app.add_exception_handler(DomainError, answer_in_thread if threaded else answer)

    @site.app.get("/")
    async def write() -> None:
        site.db.session.add(Note(text="new"))
        await site.db.session.flush()
        fail()

    response = await site.get()
    assert (response.status_code, response.text) == (200, "mended")
    assert await site.notes() == []


async def test_error_that_the_route_handled_itself(make_site: MakeSite, database_url: str) -> None:
    """An error that the route caught and answered by itself does not keep a 200 from committing."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.get("/")
    async def write() -> str:
        site.db.session.add(Note(text="new"))
        try:
            fail()
        except DomainError:
            return "mended"

    assert (await site.get()).status_code == 200
    assert await site.notes() == ["new"]


async def test_error_of_the_caller(make_site: MakeSite, database_url: str) -> None:
    """An exception that was being handled when the application was called is not the request's."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.get("/")
    async def write() -> None:
        site.db.session.add(Note(text="new"))

    async with site.client() as client:
        try:
            fail()
        except DomainError:
            await client.get("/")
    assert await site.notes() == ["new"]


@pytest.mark.parametrize(("status", "kept"), [(200, ["new"]), (404, [])])
async def test_inner_base_http_middleware_hides_the_error(
    make_site: MakeSite, database_url: str, status: int, kept: list[str]
) -> None:
    """Below an inner BaseHTTPMiddleware the status alone decides: an error mapped to 200 is committed."""
    site = await make_site(
        database_url, commit_on_exit=True, inside=[Middleware(BaseHTTPMiddleware, dispatch=pass_on)]
    )

    @site.app.exception_handler(DomainError)
    async def answer(request: Request, error: Exception) -> Response:
        return Response(status_code=status)

    @site.app.get("/")
    async def write() -> None:
        site.db.session.add(Note(text="new"))
        raise DomainError

    assert (await site.get()).status_code == status
    assert await site.notes() == kept


@pytest.mark.parametrize(
    ("path", "counts"),
    [
        ("/flushed", "1 statements and 0 unflushed objects"),
        ("/core", "2 statements and 0 unflushed objects"),
        ("/many", "1 statements and 0 unflushed objects"),
        ("/connection", "1 statements and 0 unflushed objects"),
        ("/committed-before", "1 statements and 0 unflushed objects"),
        ("/pending", "0 statements and 1 unflushed objects"),
        ("/deleted", "0 statements and 1 unflushed objects"),
        ("/changed", "0 statements and 1 unflushed objects"),
    ],
)
async def test_write_that_nobody_commits(
    make_site: MakeSite, database_url: str, caplog: pytest.LogCaptureFixture, path: str, counts: str
) -> None:
    """Without commit_on_exit a write is rolled back, and a WARNING counts it and tells how to commit it."""
    site = await make_site(database_url)
    await site.judge.execute("INSERT INTO note (id, text) VALUES (77, 'old')")

    @site.app.get("/flushed")
    async def flushed() -> None:
        site.db.session.add(Note(text="new"))
        await site.db.session.flush()

    @site.app.get("/pending")
    async def pending() -> None:
        site.db.session.add(Note(text="new"))

    @site.app.get("/core")
    async def core() -> None:
        await site.db.session.execute(insert(Note).values(text="new"))
        await site.db.session.execute(text("UPDATE note SET text = 'newer' WHERE text = 'new'"))

    @site.app.get("/many")
    async def many() -> None:
        await site.db.session.execute(insert(Note), [{"text": "new"}, {"text": "newer"}])

    @site.app.get("/connection")
    async def connection() -> None:
        connection = await site.db.session.connection()
        await connection.execute(insert(Note).values(text="new"))

    @site.app.get("/committed-before")
    async def committed_before() -> None:
        await site.db.session.execute(text("UPDATE note SET text = 'old'"))
        await site.db.session.commit()
        await site.db.session.execute(text("UPDATE note SET text = 'new'"))

    @site.app.get("/deleted")
    async def deleted() -> None:
        await site.db.session.delete(await site.db.session.get_one(Note, 77))

    @site.app.get("/changed")
    async def changed() -> None:
        (await site.db.session.get_one(Note, 77)).text = "new"

    assert (await site.get(path)).status_code == 200
    assert await site.notes() == ["old"]
    (complaint,) = complaints(caplog)
    assert complaint.startswith("WARNING: ")
    assert counts in complaint
    assert "commit_on_exit=True" in complaint
    assert "await db.session.commit()" in complaint


@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_write_that_the_route_commits(
    make_site: MakeSite, database_url: str, caplog: pytest.LogCaptureFixture, *, commit_on_exit: bool
) -> None:
    """What a route commits itself is there at once and stays, even if the request fails later."""
    site = await make_site(database_url, commit_on_exit=commit_on_exit)

    @site.app.get("/")
    async def write() -> None:
        site.db.session.add(Note(text="kept"))
        await site.db.session.commit()
        assert await site.notes() == ["kept"]
        assert site.checked_out() == 0
        await site.db.session.scalars(select(Note))
        raise HTTPException(400)

    assert (await site.get()).status_code == 400
    assert await site.notes() == ["kept"]
    assert complaints(caplog) == []


@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_read_gives_its_connection_back_before_the_body(
    make_site: MakeSite, database_url: str, caplog: pytest.LogCaptureFixture, *, commit_on_exit: bool
) -> None:
    """A request that only read holds no connection while its body goes out, and its objects stay readable."""
    site = await make_site(database_url, commit_on_exit=commit_on_exit)
    await site.judge.execute("INSERT INTO note (text) VALUES ('old')")
    out: list[int] = []

    @site.app.get("/")
    async def read() -> StreamingResponse:
        notes = (await site.db.session.scalars(select(Note))).all()
        out.append(site.checked_out())

        async def body() -> AsyncIterator[str]:
            out.append(site.checked_out())
            for note in notes:
                yield note.text

        return StreamingResponse(body())

    assert (await site.get()).text == "old"
    assert out == [1, 0]
    assert complaints(caplog) == []


RULES: dict[str, tuple[Rule, list[str]]] = {
    "always": (lambda status, error: True, ["/failed", "/mapped", "/missing", "/ok"]),
    "never": (lambda status, error: False, []),
    "by status": (lambda status, error: status == 404, ["/failed", "/missing"]),
    "by exception": (lambda status, error: isinstance(error, DomainError), ["/mapped"]),
    "without exception": (lambda status, error: error is None, ["/missing", "/ok"]),
}
"""Rules of callers, and which paths they commit."""


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_rule_of_the_callers_own(
    make_site: MakeSite,
    database_url: str,
    caplog: pytest.LogCaptureFixture,
    name: str,
    *,
    commit_on_exit: bool,
) -> None:
    """With `commit_when` the status and the exception being handled decide as the caller says."""
    rule, kept = RULES[name]
    site = await make_site(database_url, commit_when=rule, commit_on_exit=commit_on_exit)

    @site.app.exception_handler(DomainError)
    async def answer(request: Request, error: Exception) -> Response:
        return Response()

    @site.app.get("/{path}")
    async def write(path: str) -> Response:
        site.db.session.add(Note(text=f"/{path}"))
        await site.db.session.flush()
        if path == "mapped":
            raise DomainError
        if path == "failed":
            raise HTTPException(404)
        return Response(status_code=404 if path == "missing" else 200)

    async with site.client() as client:
        for path in ("/ok", "/missing", "/failed", "/mapped"):
            await client.get(path)
    assert await site.notes() == kept
    assert complaints(caplog) == []


async def test_rule_that_fails(make_site: MakeSite, database_url: str) -> None:
    """An error in `commit_when` reaches the server, and nothing is committed."""

    def rule(status: int, error: BaseException | None) -> bool:
        message = "no rule"
        raise LookupError(message)

    site = await make_site(database_url, commit_when=rule)

    @site.app.get("/")
    async def write() -> None:
        site.db.session.add(Note(text="new"))

    with pytest.raises(LookupError, match="no rule"):
        await site.get()
    assert await site.notes() == []


@pytest.mark.parametrize("decision", [None, "yes", 1], ids=str)
async def test_rule_that_says_neither(make_site: MakeSite, database_url: str, decision: Any) -> None:
    """A `commit_when` that returns neither True nor False is a mistake: 500, and nothing is committed."""

    def rule(status: int, error: BaseException | None) -> Any:
        return decision

    site = await make_site(database_url, commit_when=rule)

    @site.app.get("/")
    async def write() -> str:
        site.db.session.add(Note(text="new"))
        await site.db.session.flush()
        return "written"

    with pytest.raises(
        ConfigurationError, match=rf"^what commit_when returns must be True or False, not {decision!r}\.$"
    ):
        await site.get()
    response = await site.get(raise_app_exceptions=False)
    assert response.status_code == 500
    assert "written" not in response.text
    assert await site.notes() == []


async def test_starlette_application(make_site: MakeSite, deferring_url: str) -> None:
    """All of it holds for a Starlette application without FastAPI."""
    site = await make_site(deferring_url)
    middleware, db = create_middleware_and_session_proxy(AsyncSession)

    async def write(request: Request) -> Response:
        status = int(request.path_params["status"])
        db.session.add(Reply(**ORPHAN) if status == 202 else Note(text=str(status)))
        return Response(status_code=status)

    app = Starlette(
        routes=[Route("/{status}", write)],
        middleware=[Middleware(cast("Any", middleware), custom_engine=site.engine, commit_on_exit=True)],
        exception_handlers={IntegrityError: conflict},
    )
    async with asgi_client(app) as client:
        answers = [(await client.get(f"/{status}")).status_code for status in (200, 202, 404)]
    assert answers == [200, 409, 404]
    assert await site.notes() == ["200"]


# A transaction or a result that user code holds


@pytest.mark.parametrize(("path", "kept"), [("/ok", ["/ok"]), ("/returned", ["/returned"]), ("/raised", [])])
@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_transaction_that_a_dependency_holds(
    make_site: MakeSite,
    database_url: str,
    caplog: pytest.LogCaptureFixture,
    path: str,
    kept: list[str],
    *,
    commit_on_exit: bool,
) -> None:
    """`async with db.session.begin()` around a route decides alone, as it does everywhere else."""
    site = await make_site(database_url, commit_on_exit=commit_on_exit)

    async def transaction() -> AsyncGenerator[AsyncSession]:
        async with site.db.session.begin():
            yield site.db.session

    @site.app.get("/{ending}")
    async def write(ending: str, session: Annotated[AsyncSession, Depends(transaction)]) -> Response:
        session.add(Note(text=f"/{ending}"))
        if ending == "raised":
            raise HTTPException(404)
        return Response(status_code=200 if ending == "ok" else 404)

    await site.get(path)
    assert await site.notes() == kept
    assert complaints(caplog) == []


@pytest.mark.parametrize("by", ["unit", "session", "propagation"])
async def test_savepoint_first_of_all_leaves_nothing_held(
    make_site: MakeSite, database_url: str, by: str
) -> None:
    """A request whose first work is in a savepoint is committed before its response starts, as any other."""
    site = await make_site(database_url, commit_on_exit=True)

    async def seen_from_outside() -> AsyncIterator[str]:
        yield ", ".join(str(note) for note in await site.notes())

    @site.app.get("/")
    async def write() -> StreamingResponse:
        blocks: dict[str, Callable[[], Any]] = {
            "unit": site.db.unit.savepoint,
            "session": site.db.session.begin_nested,
            "propagation": functools.partial(site.db, propagation="nested"),
        }
        async with blocks[by]():
            site.db.session.add(Note(text="new"))
        return StreamingResponse(seen_from_outside())

    assert (await site.get()).text == "new"


async def test_savepoint_first_of_all_keeps_no_error_back(make_site: MakeSite, deferring_url: str) -> None:
    """The client of a request whose first work is in a savepoint hears of the COMMIT that fails."""
    site = await make_site(deferring_url, commit_on_exit=True)
    site.app.add_exception_handler(IntegrityError, conflict)

    @site.app.get("/")
    async def write() -> None:
        async with site.db.unit.savepoint():
            site.db.session.add(Reply(**ORPHAN))

    assert (await site.get()).status_code == 409


async def test_transaction_that_nobody_ends(make_site: MakeSite, database_url: str) -> None:
    """A transaction begun by hand and never ended is committed when the application returns."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.get("/")
    async def write() -> None:
        await site.db.session.begin()
        site.db.session.add(Note(text="new"))

    await site.get()
    assert await site.notes() == ["new"]


@pytest.mark.parametrize(
    ("commit_on_exit", "kept"), [(True, ["1", "2", "3", "new"]), (False, ["1", "2", "3"])]
)
async def test_unread_result_is_read_by_the_body(
    make_site: MakeSite, database_url: str, kept: list[str], *, commit_on_exit: bool
) -> None:
    """A result of `session.stream()` can be read by the body; the unit is settled when it has been."""
    site = await make_site(database_url, commit_on_exit=commit_on_exit)
    await site.judge.execute("INSERT INTO note (text) VALUES ('1'), ('2'), ('3')")
    out: list[int] = []

    @site.app.get("/")
    async def read() -> StreamingResponse:
        site.db.session.add(Note(text="new"))
        await site.db.session.flush()
        result = await site.db.session.stream_scalars(select(Note.text).order_by(Note.text))

        async def body() -> AsyncIterator[str]:
            async for note in result:
                out.append(site.checked_out())
                yield note

        return StreamingResponse(body())

    assert (await site.get()).text == "123new"
    assert out == [1, 1, 1, 1]
    assert await site.notes() == kept


@pytest.mark.parametrize("status", [200, 404])
async def test_unread_result_that_nobody_reads(make_site: MakeSite, database_url: str, status: int) -> None:
    """A result that is left unread costs no connection once the request has ended."""
    site = await make_site(database_url, commit_on_exit=True)
    await site.judge.execute("INSERT INTO note (text) VALUES ('1'), ('2'), ('3')")
    kept: list[object] = []

    @site.app.get("/")
    async def read() -> Response:
        kept.append(await site.db.session.stream(select(Note)))
        return Response(status_code=status)

    async with site.client() as client:
        for _ in range(3):
            assert (await client.get("/")).status_code == status
            assert site.checked_out() == 0


# The response's start


@pytest.mark.parametrize("first", [b"first", b""])
async def test_client_with_a_2xx_can_read_what_it_wrote(
    make_site: MakeSite, database_url: str, first: bytes
) -> None:
    """The head of a response goes out when the commit is done, not before and not with the first chunk."""
    site = await make_site(database_url, commit_on_exit=True)
    read = asyncio.Event()

    @site.app.get("/")
    async def write() -> StreamingResponse:
        site.db.session.add(Note(text="new"))

        async def body() -> AsyncIterator[bytes]:
            if first:
                yield first
            await read.wait()
            yield b"last"

        return StreamingResponse(body())

    async with serve(site.app) as address, raw_get(address, "/") as response:
        assert await response.status() == 200
        if first:
            await response.until(first)
        assert await site.notes() == ["new"]
        assert site.checked_out() == 0
        read.set()
        await response.until(b"last")


async def test_next_request_reads_what_the_first_wrote(make_site: MakeSite, database_url: str) -> None:
    """Over a real server a client that has its 201 finds the row by its next request, each of many times."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.get("/write/{number}", status_code=201)
    async def write(number: int) -> None:
        site.db.session.add(Note(text=str(number)))

    @site.app.get("/read/{number}")
    async def read(number: int) -> bool:
        return await site.db.session.scalar(select(Note).where(Note.text == str(number))) is not None

    async with serve(site.app) as address, AsyncClient(base_url=address.url, timeout=30) as client:
        for number in range(20):
            await client.get(f"/write/{number}")
            assert (await client.get(f"/read/{number}")).json() is True


# COMMIT fails


async def conflict(request: Request, error: Exception) -> Response:
    """Answer for an error, in the loop."""
    return PlainTextResponse(f"conflict: {type(error).__name__}", 409)


def conflict_in_thread(request: Request, error: Exception) -> Response:
    """Answer for an error, in a thread."""
    return PlainTextResponse(f"conflict: {type(error).__name__}", 409)


class Conflict:
    """Answers for an error, as an object."""

    async def __call__(self, request: Request, error: Exception) -> Response:
        """Answer in the loop."""
        return await conflict(request, error)


@pytest.mark.parametrize("kind", [IntegrityError, DBAPIError, SQLAlchemyError])
@pytest.mark.parametrize(
    "handler",
    [conflict, conflict_in_thread, Conflict(), functools.partial(conflict)],
    ids=["async", "def", "object", "partial"],
)
async def test_commit_error_is_answered_by_the_applications_handler(
    make_site: MakeSite, deferring_url: str, handler: Any, kind: type[Exception]
) -> None:
    """A failed commit is answered by the handler of its class or of the nearest base, of whatever form."""
    site = await make_site(deferring_url, commit_on_exit=True)
    site.app.add_exception_handler(kind, handler)

    @site.app.get("/")
    async def write() -> None:
        site.db.session.add_all([Note(text="new"), Reply(**ORPHAN)])

    response = await site.get()
    assert (response.status_code, response.text) == (409, "conflict: IntegrityError")
    assert await site.notes() == []


async def test_flush_error_at_the_commit_is_answered_by_the_handler(
    make_site: MakeSite, database_url: str
) -> None:
    """An object that cannot be written fails when the commit flushes it, and the handler answers."""
    site = await make_site(database_url, commit_on_exit=True)
    site.app.add_exception_handler(IntegrityError, conflict)
    await site.judge.execute("INSERT INTO note (text) VALUES ('old')")

    @site.app.get("/")
    async def write() -> None:
        site.db.session.add_all([Note(text="new"), Note(text="old")])

    response = await site.get()
    assert (response.status_code, response.text) == (409, "conflict: IntegrityError")
    assert await site.notes() == ["old"]


async def test_nearest_handler_answers(make_site: MakeSite, deferring_url: str) -> None:
    """Of two handlers along the error's bases the nearer one answers."""
    site = await make_site(deferring_url, commit_on_exit=True)

    @site.app.exception_handler(SQLAlchemyError)
    async def far(request: Request, error: Exception) -> Response:
        return Response(status_code=503)

    site.app.add_exception_handler(IntegrityError, conflict)

    @site.app.get("/")
    async def write() -> None:
        site.db.session.add(Reply(**ORPHAN))

    assert (await site.get()).status_code == 409


async def test_handler_may_read(make_site: MakeSite, deferring_url: str) -> None:
    """A handler that answers for a failed commit can use the session, which is clean; it commits nothing."""
    site = await make_site(deferring_url, commit_on_exit=True)

    @site.app.exception_handler(IntegrityError)
    async def answer(request: Request, error: Exception) -> Response:
        count = await site.db.session.scalar(select(func.count()).select_from(Reply))
        site.db.session.add(Note(text="handler"))
        await site.db.session.flush()
        return JSONResponse(count, 409)

    @site.app.get("/")
    async def write() -> None:
        site.db.session.add(Reply(**ORPHAN))

    response = await site.get()
    assert (response.status_code, response.json()) == (409, 0)
    assert await site.notes() == []


async def test_handler_that_fails_itself(make_site: MakeSite, deferring_url: str) -> None:
    """An error of the handler that answers for a failed commit reaches the server, and nothing is kept."""
    site = await make_site(deferring_url, commit_on_exit=True)

    @site.app.exception_handler(IntegrityError)
    async def answer(request: Request, error: Exception) -> Response:
        site.db.session.add(Note(text="handler"))
        await site.db.session.flush()
        message = "no answer"
        raise DomainError(message)

    @site.app.get("/")
    async def write() -> None:
        site.db.session.add(Reply(**ORPHAN))

    with pytest.raises(DomainError, match="no answer"):
        await site.get()
    assert await site.notes() == []


async def test_commit_error_without_handler(make_site: MakeSite, deferring_url: str) -> None:
    """A failed commit that nobody handles leaves the application, and the client gets a 500."""
    site = await make_site(deferring_url, commit_on_exit=True)

    @site.app.get("/")
    async def write() -> Response:
        site.db.session.add(Reply(**ORPHAN))
        return Response("original", headers={"x-original": "yes"})

    with pytest.raises(IntegrityError, match=r"(?i)foreign key"):
        await site.get()
    response = await site.get(raise_app_exceptions=False)
    assert (response.status_code, response.text) == (500, "Internal Server Error")
    assert "x-original" not in response.headers


async def test_handler_for_everything_answers_and_the_error_goes_on(
    make_site: MakeSite, deferring_url: str
) -> None:
    """A handler for Exception answers a failed commit as any other error: the server hears of it too."""
    site = await make_site(deferring_url, commit_on_exit=True)
    site.app.add_exception_handler(Exception, conflict)

    @site.app.get("/")
    async def write() -> None:
        site.db.session.add(Reply(**ORPHAN))

    assert (await site.get(raise_app_exceptions=False)).text == "conflict: IntegrityError"
    with pytest.raises(IntegrityError, match=r"(?i)foreign key"):
        await site.get()


@around
@pytest.mark.parametrize("handled", [True, False])
@pytest.mark.parametrize("streamed", [True, False])
async def test_nothing_of_the_original_response_is_left(
    make_site: MakeSite,
    deferring_url: str,
    outside: list[Middleware],
    inside: list[Middleware],
    *,
    handled: bool,
    streamed: bool,
) -> None:
    """After a failed commit no header or byte of the original response goes out, and no task of it runs."""
    site = await make_site(deferring_url, outside=outside, inside=inside, commit_on_exit=True)
    ran: list[str] = []
    if handled:
        site.app.add_exception_handler(IntegrityError, conflict)

    async def body() -> AsyncIterator[str]:
        ran.append("body")
        yield "original"

    @site.app.get("/")
    async def write() -> Response:
        site.db.session.add_all([Note(text="new"), Reply(**ORPHAN)])
        response = StreamingResponse(body()) if streamed else Response("original")
        response.headers["x-original"] = "yes"
        response.set_cookie("original", "yes")
        response.background = BackgroundTask(ran.append, "background")
        return response

    response = await site.get(raise_app_exceptions=False)
    expected = (409, "conflict: IntegrityError") if handled else (500, "Internal Server Error")
    assert (response.status_code, response.text) == expected
    assert not {"x-original", "set-cookie"} & set(response.headers)
    assert "background" not in ran
    if not inside:
        assert ran == []
    assert await site.notes() == []
    gc.collect()  # older BaseHTTPMiddlewares leave their streams open when any error passes them


@pytest.mark.parametrize("streamed", [True, False])
async def test_application_that_goes_on_sending(
    make_site: MakeSite, deferring_url: str, *, streamed: bool
) -> None:
    """An application that ignores the failure of its response's start talks to nobody."""

    class Stubborn:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def send_on(message: Message) -> None:
                with suppress(SQLAlchemyError):
                    await send(message)

            await self.app(scope, receive, send_on)

    site = await make_site(deferring_url, inside=[Middleware(Stubborn)], commit_on_exit=True)
    site.app.add_exception_handler(IntegrityError, conflict)

    async def body() -> AsyncIterator[str]:
        site.db.session.add(Note(text="later"))
        yield "original"

    @site.app.get("/")
    async def write() -> Response:
        site.db.session.add(Reply(**ORPHAN))
        return StreamingResponse(body()) if streamed else Response("original")

    response = await site.get()
    assert (response.status_code, response.text) == (409, "conflict: IntegrityError")
    assert await site.notes() == []


@pytest.mark.parametrize(("owner", "handling"), [("outer", "outer"), ("outer", "inner"), ("inner", "inner")])
async def test_failed_commit_of_a_mounted_application(
    make_site: MakeSite, deferring_url: str, owner: str, handling: str
) -> None:
    """An application mounted in the unit's owner, or mounted with its own unit, answers by its own handler.

    What a mounted application does not handle itself it answers with 500, as Starlette does for every error.
    """
    site = await make_site(deferring_url, commit_on_exit=True)
    other = FastAPI()
    outer, inner = (site.app, other) if owner == "outer" else (other, site.app)
    outer.mount("/inner", inner)
    (outer if handling == "outer" else inner).add_exception_handler(IntegrityError, conflict)

    @inner.get("/")
    async def write() -> None:
        site.db.session.add(Reply(**ORPHAN))

    async with asgi_client(outer) as client:
        response = await client.get("/inner/")
    assert (response.status_code, response.text) == (409, "conflict: IntegrityError")


async def test_mounted_applications_handler_comes_first(make_site: MakeSite, deferring_url: str) -> None:
    """The application that the request reached answers before the one that it is mounted in."""
    site = await make_site(deferring_url, commit_on_exit=True)
    inner = FastAPI()
    site.app.mount("/inner", inner)
    inner.add_exception_handler(IntegrityError, conflict)

    @site.app.exception_handler(IntegrityError)
    async def unavailable(request: Request, error: Exception) -> Response:
        return Response(status_code=503)

    async def write() -> None:
        site.db.session.add(Reply(**ORPHAN))

    site.app.get("/")(write)
    inner.get("/")(write)
    async with site.client() as client:
        assert [(await client.get(path)).status_code for path in ("/", "/inner/")] == [503, 409]


# An error that was swallowed


@pytest.mark.parametrize("handled", [True, False])
async def test_flush_error_that_the_route_swallows(
    make_site: MakeSite, database_url: str, *, handled: bool
) -> None:
    """After a flush failed the client gets an error, not a 200 whose other writes are gone."""
    site = await make_site(database_url, commit_on_exit=True)
    if handled:
        site.app.add_exception_handler(PendingRollbackError, conflict)
        site.app.add_exception_handler(UnexpectedRollbackError, conflict)
    await site.judge.execute("INSERT INTO note (text) VALUES ('old')")

    @site.app.get("/")
    async def write() -> None:
        site.db.session.add(Note(text="new"))
        await site.db.session.flush()
        site.db.session.add(Note(text="old"))
        with suppress(IntegrityError):
            await site.db.session.flush()

    if handled:
        response = await site.get()
        assert response.status_code == 409
    else:
        refused = (PendingRollbackError, UnexpectedRollbackError)
        with pytest.raises(refused, match=r"rolled back due to a previous exception|cannot be committed"):
            await site.get()
        assert (await site.get(raise_app_exceptions=False)).status_code == 500
    assert await site.notes() == ["old"]


async def test_rollback_after_a_flush_error(make_site: MakeSite, database_url: str) -> None:
    """A route that rolls back after a failed flush can start again, and what it writes then is committed."""
    site = await make_site(database_url, commit_on_exit=True)
    await site.judge.execute("INSERT INTO note (text) VALUES ('old')")

    @site.app.get("/")
    async def write() -> None:
        site.db.session.add(Note(text="old"))
        with suppress(IntegrityError):
            await site.db.session.flush()
        await site.db.session.rollback()
        site.db.session.add(Note(text="new"))

    assert (await site.get()).status_code == 200
    assert await site.notes() == ["new", "old"]


async def test_statement_error_that_aborts_the_transaction(make_site: MakeSite, postgresql_url: str) -> None:
    """Where a failed statement has made COMMIT a silent ROLLBACK, the client gets an error that says so."""
    site = await make_site(postgresql_url, commit_on_exit=True)

    @site.app.get("/")
    async def write() -> None:
        site.db.session.add(Note(text="new"))
        await site.db.session.flush()
        with suppress(DBAPIError):
            await site.db.session.execute(text("SELECT 1 FROM missing"))

    with pytest.raises(
        UnexpectedRollbackError, match=r"(gave|has given) the transaction up.*savepoint"
    ) as caught:
        await site.get()
    assert 'relation "missing" does not exist' in str(caught.value.__cause__)
    assert (await site.get(raise_app_exceptions=False)).status_code == 500
    assert await site.notes() == []


async def test_statement_error_that_undoes_itself_alone(make_site: MakeSite, forgiving_url: str) -> None:
    """Where a failed statement leaves the transaction whole, the rest of it is committed."""
    site = await make_site(forgiving_url, commit_on_exit=True)

    @site.app.get("/")
    async def write() -> None:
        site.db.session.add(Note(text="new"))
        await site.db.session.flush()
        with suppress(DBAPIError):
            await site.db.session.execute(text("SELECT 1 FROM missing"))

    assert (await site.get()).status_code == 200
    assert await site.notes() == ["new"]


@pytest.mark.parametrize("later", [[], ["later"]])
async def test_statement_error_that_undoes_everything(
    make_site: MakeSite, sqlite_url: str, later: list[str]
) -> None:
    """Where a failed statement has rolled its transaction back, what came after is not committed."""
    site = await make_site(sqlite_url, commit_on_exit=True)

    @site.app.get("/")
    async def write() -> None:
        site.db.session.add(Note(text="new"))
        await site.db.session.flush()
        with suppress(IntegrityError):
            await site.db.session.execute(text("INSERT OR ROLLBACK INTO note (text) VALUES ('new')"))
        site.db.session.add_all(Note(text=note) for note in later)

    with pytest.raises(UnexpectedRollbackError, match="has rolled it back"):
        await site.get()
    assert (await site.get(raise_app_exceptions=False)).status_code == 500
    assert await site.notes() == []


@pytest.mark.parametrize("writing", ["INSERT", "REPLACE"])
@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_write_behind_a_with_belongs_to_the_transaction(
    make_site: MakeSite,
    sqlite_url: str,
    writing: str,
    caplog: pytest.LogCaptureFixture,
    *,
    commit_on_exit: bool,
) -> None:
    """What a WITH writes on SQLite, whose driver would store it at once, is the unit's to commit or not."""
    site = await make_site(sqlite_url, commit_on_exit=commit_on_exit)

    @site.app.get("/{status}")
    async def write(status: int) -> Response:
        new = f"WITH new AS (SELECT {status} AS text) {writing} INTO note (text) SELECT text FROM new"
        await site.db.session.execute(text(new))
        return Response(status_code=status)

    async with site.client() as client:
        await client.get("/409")
        assert await site.notes() == []
        await client.get("/200")
    assert await site.notes() == (["200"] if commit_on_exit else [])
    assert len(complaints(caplog)) == (0 if commit_on_exit else 1)


async def test_with_that_writes_by_itself(sqlite_url: str) -> None:
    """On an engine that commits each statement by itself a WITH that writes is stored at once, too."""
    async with engine_with_tables(sqlite_url, isolation_level="AUTOCOMMIT") as engine:
        _, db = create_middleware_and_session_proxy(AsyncSession)
        async with db.connect(engine), db() as unit:
            await unit.session.execute(text("WITH new AS (SELECT 1) INSERT INTO note (text) SELECT 'new'"))
            async with Judge(sqlite_url) as judge:
                assert await judge.rows("SELECT text FROM note") == [("new",)]


async def test_statement_error_before_anything_was_begun(make_site: MakeSite, sqlite_url: str) -> None:
    """Statements that fail before SQLite has begun a transaction have undone nothing."""
    site = await make_site(sqlite_url, commit_on_exit=True)

    @site.app.get("/")
    async def write() -> None:
        for _ in range(2):
            with suppress(DBAPIError):
                await site.db.session.execute(text("INSERT INTO missing VALUES (1)"))
        site.db.session.add(Note(text="new"))

    assert (await site.get()).status_code == 200
    assert await site.notes() == ["new"]


@pytest.mark.parametrize("failing", ["flush", "statement"])
@pytest.mark.parametrize("by", ["unit", "session"])
async def test_error_in_a_savepoint(make_site: MakeSite, database_url: str, failing: str, by: str) -> None:
    """An error that leaves a savepoint undoes the savepoint alone, and the rest is committed."""
    site = await make_site(database_url, commit_on_exit=True)
    await site.judge.execute("INSERT INTO note (text) VALUES ('old')")

    @site.app.get("/")
    async def write() -> None:
        session = site.db.session
        session.add(Note(text="before"))
        await session.flush()
        with suppress(IntegrityError):
            async with site.db.unit.savepoint() if by == "unit" else session.begin_nested():
                session.add(Note(text="inside"))
                await session.flush()
                if failing == "flush":
                    session.add(Note(text="old"))
                    await session.flush()
                else:
                    await session.execute(insert(Note).values(text="old"))
        session.add(Note(text="after"))

    assert (await site.get()).status_code == 200
    assert await site.notes() == ["after", "before", "old"]


async def test_savepoints_of_one_name(
    make_site: MakeSite, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A savepoint by the name of an earlier one takes back what came after itself and no more."""
    site = await make_site(database_url)

    @site.app.get("/")
    async def write() -> None:
        session = site.db.session
        for note in ("first", "second", "second"):
            await session.execute(text("SAVEPOINT mine"))
            try:
                await session.execute(insert(Note).values(text=note))
            except IntegrityError:
                await session.execute(text("ROLLBACK TO SAVEPOINT mine"))

    assert (await site.get()).status_code == 200
    assert await site.notes() == []
    [complaint] = complaints(caplog)
    assert "2 statements" in complaint


# The tail


TAILS = [
    "background task",
    "body",
    pytest.param(
        "teardown",
        marks=pytest.mark.skipif(
            tuple(map(int, fastapi.__version__.split(".")[:2])) < (0, 118),
            reason="before 0.118 FastAPI's dependencies are torn down before the response starts",
        ),
    ),
]
"""What an application still does after its response has started."""


def respond_with_tail(
    app: FastAPI, kind: str, head: Callable[[], Awaitable[None]], tail: Callable[[], Awaitable[None]]
) -> None:
    """Give the application a route that runs `head`, starts its response, and runs `tail`."""

    async def teardown() -> AsyncGenerator[None]:
        yield
        if kind == "teardown":
            await tail()

    @app.get("/", dependencies=[Depends(teardown)])
    async def route(background: BackgroundTasks) -> Response:
        async def body() -> AsyncIterator[str]:
            if kind == "body":
                await tail()
            yield "done"

        await head()
        if kind == "background task":
            background.add_task(tail)
        return StreamingResponse(body())


@pytest.mark.parametrize("kind", TAILS)
@pytest.mark.parametrize("written_first", [True, False])
async def test_tail_is_committed(
    make_site: MakeSite, database_url: str, kind: str, *, written_first: bool
) -> None:
    """What the tail writes is committed when the application has returned, in a transaction of its own."""
    site = await make_site(database_url, commit_on_exit=True)
    sessions: list[AsyncSession] = []

    async def head() -> None:
        sessions.append(site.db.session)
        if written_first:
            site.db.session.add(Note(text="head"))

    async def tail() -> None:
        assert site.checked_out() == 0
        assert await site.notes() == ["head"] * written_first
        assert site.db.session is sessions[0]
        sessions[0].add(Note(text="tail"))
        await site.db.session.flush()
        assert site.checked_out() == 1
        assert await site.notes() == ["head"] * written_first

    respond_with_tail(site.app, kind, head, tail)
    assert (await site.get()).text == "done"
    assert await site.notes() == ["head"] * written_first + ["tail"]


@pytest.mark.parametrize("kind", TAILS)
async def test_tail_is_discarded_without_commit_on_exit(
    make_site: MakeSite, database_url: str, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Without commit_on_exit what the tail writes is discarded, with the WARNING that counts it."""
    site = await make_site(database_url)

    async def head() -> None:
        site.db.session.add(Note(text="head"))
        await site.db.session.commit()

    async def tail() -> None:
        await site.db.session.execute(insert(Note).values(text="tail"))

    respond_with_tail(site.app, kind, head, tail)
    assert (await site.get()).text == "done"
    assert await site.notes() == ["head"]
    (complaint,) = complaints(caplog)
    assert "1 statements and 0 unflushed objects are rolled back" in complaint


@pytest.mark.parametrize("kind", TAILS)
@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_tail_that_commits_itself(
    make_site: MakeSite,
    database_url: str,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    *,
    commit_on_exit: bool,
) -> None:
    """What was written before the start without commit_on_exit can still be committed by the tail."""
    site = await make_site(database_url, commit_on_exit=commit_on_exit)

    async def head() -> None:
        site.db.session.add(Note(text="head"))
        await site.db.session.flush()

    async def tail() -> None:
        site.db.session.add(Note(text="tail"))
        await site.db.session.commit()

    respond_with_tail(site.app, kind, head, tail)
    assert (await site.get()).text == "done"
    assert await site.notes() == ["head", "tail"]
    assert complaints(caplog) == []


@pytest.mark.parametrize("kind", TAILS)
async def test_tail_that_only_reads(
    make_site: MakeSite, database_url: str, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """A tail that only reads sees what the head has committed, and ends without a word."""
    site = await make_site(database_url, commit_on_exit=True)

    async def head() -> None:
        site.db.session.add(Note(text="head"))

    async def tail() -> None:
        assert (await site.db.session.scalars(select(Note.text))).all() == ["head"]

    respond_with_tail(site.app, kind, head, tail)
    assert (await site.get()).text == "done"
    assert complaints(caplog) == []


@pytest.mark.parametrize("kind", TAILS)
async def test_tail_that_fails(make_site: MakeSite, database_url: str, kind: str) -> None:
    """An error in the tail rolls the tail back, reaches the server, and leaves the head as committed."""
    site = await make_site(database_url, commit_on_exit=True)

    async def head() -> None:
        site.db.session.add(Note(text="head"))

    async def tail() -> None:
        site.db.session.add(Note(text="tail"))
        await site.db.session.flush()
        message = "no tail"
        raise DomainError(message)

    respond_with_tail(site.app, kind, head, tail)
    error = pytest.RaisesExc(DomainError, match="no tail")
    with pytest.RaisesGroup(error, allow_unwrapped=True):  # older Starlette groups the errors of a body
        await site.get()
    assert await site.notes() == ["head"]


@pytest.mark.parametrize("kind", TAILS)
async def test_tail_whose_commit_fails(
    make_site: MakeSite, deferring_url: str, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """The client has its answer when the tail's commit fails: the error is logged and reaches the server."""
    site = await make_site(deferring_url, commit_on_exit=True)
    site.app.add_exception_handler(IntegrityError, conflict)

    async def head() -> None:
        site.db.session.add(Note(text="head"))

    async def tail() -> None:
        site.db.session.add_all([Note(text="tail"), Reply(**ORPHAN)])

    respond_with_tail(site.app, kind, head, tail)
    with pytest.raises(IntegrityError, match=r"(?i)foreign key"):
        await site.get()
    (complaint,) = complaints(caplog)
    assert complaint.startswith("ERROR: COMMIT on ")
    assert "failed after the response had started" in complaint
    assert await site.notes() == ["head"]


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
