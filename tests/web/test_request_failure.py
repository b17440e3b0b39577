"""A request whose COMMIT fails, or whose failed statement was swallowed, gets no success."""

import functools
import gc
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from sqlalchemy import func, insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastapi_async_sqlalchemy import UnexpectedRollbackError, create_middleware_and_session_proxy
from tests.support.databases import Judge
from tests.support.requests import DomainError, around, conflict
from tests.support.serving import asgi_client
from tests.support.site import MakeSite, complaints
from tests.support.tables import ORPHAN, Note, Reply, engine_with_tables

# COMMIT fails


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

    with pytest.raises(UnexpectedRollbackError, match=r"has aborted the transaction.*savepoint") as caught:
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
