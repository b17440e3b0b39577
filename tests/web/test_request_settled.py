"""A request's unit is settled before its response starts: by its status, its error, or the caller's rule."""

import asyncio
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, cast

import pytest
from fastapi import Depends, HTTPException, Request, Response
from fastapi.responses import StreamingResponse
from httpx2 import AsyncClient
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.routing import Route

from fastapi_async_sqlalchemy import ConfigurationError, create_middleware_and_session_proxy
from tests.support.requests import AROUND, DomainError, conflict, fail, pass_on
from tests.support.serving import asgi_client, raw_get, serve
from tests.support.site import MakeSite, complaints
from tests.support.tables import ORPHAN, Note, Reply

Rule = Callable[[int, BaseException | None], bool]


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
        ("/flushed", "1 statement and 0 unflushed objects"),
        ("/core", "2 statements and 0 unflushed objects"),
        ("/many", "1 statement and 0 unflushed objects"),
        ("/connection", "1 statement and 0 unflushed objects"),
        ("/committed-before", "1 statement and 0 unflushed objects"),
        ("/pending", "0 statements and 1 unflushed object"),
        ("/deleted", "0 statements and 1 unflushed object"),
        ("/changed", "0 statements and 1 unflushed object"),
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
        ConfigurationError, match=rf"^what commit_when returns must be True or False, not {decision!r}\.\n"
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
