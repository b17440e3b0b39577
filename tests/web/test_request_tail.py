"""What a request writes after its response has started: the tail is a transaction of its own."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

import fastapi
import pytest
from fastapi import BackgroundTasks, Depends, FastAPI, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from tests.support.requests import DomainError, conflict
from tests.support.site import MakeSite, complaints
from tests.support.tables import ORPHAN, Note, Reply

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
    assert "1 statement and 0 unflushed objects are rolled back" in complaint


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
