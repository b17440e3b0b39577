"""Results of `session.stream()`: of every kind of statement, read late, dropped, or with another between."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import Depends, Response
from fastapi.responses import StreamingResponse
from sqlalchemy import String, func, literal, literal_column, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import ConcurrentUseError, UnexpectedRollbackError
from tests.support.databases import JudgeFor
from tests.support.site import MakeSite, Site, complaints
from tests.support.tables import Note
from tests.support.worker import open_worker

TEXTS = [f"{number:03}" for number in range(300)]
"""More than the driver fetches at a time."""
ROWS = text("SELECT text FROM note ORDER BY text")
STATEMENTS: dict[str, Any] = {
    "text": ROWS,
    "columns": ROWS.columns(Note.text),
    "table": select(Note.__table__.c.text).order_by(Note.__table__.c.text),
    "labelled": select(literal_column("text", String(100)))
    .select_from(Note.__table__)
    .order_by(text("text")),
    "attribute": select(Note.text).order_by(Note.text),
    "in parts": select(Note.text).order_by(Note.text).execution_options(yield_per=7),
    "table, in parts": ROWS.execution_options(yield_per=7),
}
left_incomplete = pytest.mark.filterwarnings("ignore:Previous unbuffered result was left incomplete")
"""What MariaDB's drivers say where they skip the rows that nobody will read."""
statements = pytest.mark.parametrize("statement", STATEMENTS.values(), ids=STATEMENTS)


@pytest.fixture
async def crowded_worker(url_by_driver: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A process without an application, on MariaDB, whose connections have room for one result."""
    async with open_worker(url_by_driver, judge_for) as worker:
        yield worker


async def fill(site: Site) -> None:
    """Write the notes."""
    values = ", ".join(f"('{note}')" for note in TEXTS)
    await site.judge.execute(f"INSERT INTO note (text) VALUES {values}")


@statements
async def test_every_statement_can_be_streamed(worker: Site, statement: Any) -> None:
    """All rows come, as rows and as scalars, in a unit that then goes on and commits."""
    await fill(worker)
    async with worker.db(commit_on_exit=True) as unit:
        assert [note async for (note,) in await unit.session.stream(statement)] == TEXTS
        assert [note async for note in await unit.session.stream_scalars(statement)] == TEXTS
        unit.session.add(Note(text="new"))
    assert await worker.notes() == [*TEXTS, "new"]


@statements
async def test_body_reads_what_the_route_has_opened(
    make_site: MakeSite, database_url: str, statement: Any
) -> None:
    """The unit stays with the result until the body has read it, and commits then."""
    site = await make_site(database_url, commit_on_exit=True)
    await fill(site)
    out: list[int] = []

    @site.app.get("/")
    async def read() -> StreamingResponse:
        await site.db.session.execute(text("INSERT INTO note (text) VALUES ('999')"))
        result = await site.db.session.stream_scalars(statement)

        async def body() -> AsyncIterator[str]:
            async for note in result:
                out.append(site.checked_out())
                yield f"{note} "

        return StreamingResponse(body())

    assert (await site.get()).text.split() == [*TEXTS, "999"]
    assert set(out) == {1}
    assert await site.notes() == [*TEXTS, "999"]


@left_incomplete
@statements
async def test_result_that_was_dropped(make_site: MakeSite, database_url: str, statement: Any) -> None:
    """A result that nobody has any more does not put the commit off: a client with the head can read it."""
    site = await make_site(database_url, commit_on_exit=True)
    await fill(site)
    seen: list[object] = []

    async def look() -> AsyncIterator[str]:
        seen.append(await site.judge.scalar("SELECT count(*) FROM note WHERE text = 'new'"))
        yield "done"

    @site.app.get("/")
    async def write() -> StreamingResponse:
        site.db.session.add(Note(text="new"))
        await site.db.session.flush()
        result = await site.db.session.stream(statement)
        assert await result.fetchone() == (TEXTS[0],)
        return StreamingResponse(look())

    assert (await site.get()).text == "done"
    assert seen == [1]


async def finish(session: AsyncSession, statement: Any, way: str) -> object:
    """Open a result, read it to its end or close it, and return it."""
    if way == "scalars":
        scalars = await session.stream_scalars(statement)
        assert await scalars.all() == TEXTS
        return scalars
    result = await session.stream(statement)
    if way == "all":
        assert len(await result.all()) == len(TEXTS)
    elif way == "one by one":
        assert [note async for (note,) in result] == TEXTS
    else:
        assert await result.fetchone() == (TEXTS[0],)
        await result.close()
    return result


@left_incomplete
@statements
async def test_result_that_is_kept_when_it_has_ended(
    make_site: MakeSite, database_url: str, statement: Any
) -> None:
    """One that was read to its end, or closed, keeps no transaction, though a dependency still has it."""
    site = await make_site(database_url, commit_on_exit=True)
    await fill(site)
    kept: list[object] = []

    async def read(way: str) -> AsyncIterator[None]:
        kept.append(await finish(site.db.session, statement, way))
        yield

    async def look() -> AsyncIterator[str]:
        new = await site.judge.scalar("SELECT count(*) FROM note WHERE text > '300'")
        yield f"{new} stored, {site.checked_out()} checked out"

    @site.app.get("/{way}", dependencies=[Depends(read)])
    async def write(way: str) -> StreamingResponse:
        site.db.session.add(Note(text=way))
        return StreamingResponse(look())

    async with site.client() as client:
        for way in ("all", "one by one", "scalars", "closed"):
            assert (await client.get(f"/{way}")).text == "1 stored, 0 checked out", way
            await site.judge.execute("DELETE FROM note WHERE text > '300'")


@statements
@pytest.mark.parametrize("read", [0, 1])
async def test_result_that_is_kept_unread(
    make_site: MakeSite, database_url: str, statement: Any, read: int
) -> None:
    """One that somebody keeps, begun or not, costs neither the write nor the connection in the end."""
    site = await make_site(database_url, commit_on_exit=True)
    await fill(site)
    kept: list[object] = []

    @site.app.get("/")
    async def write() -> Response:
        site.db.session.add(Note(text="new"))
        await site.db.session.flush()
        result = await site.db.session.stream(statement)
        assert len(await result.fetchmany(read)) == read
        kept.append(result)
        return Response()

    assert (await site.get()).status_code == 200
    assert site.checked_out() == 0
    assert await site.notes() == [*TEXTS, "new"]


async def test_one_value(worker: Site) -> None:
    """A value without a table can be streamed, too."""
    async with worker.db() as unit:
        assert await (await unit.session.stream_scalars(select(literal(5)))).all() == [5]


REST_IS_LOST = (
    r"^{task} called {operation}\(\) on a session of .+ on which a stream has rows left, which would be lost "
    r"\(read it to its end, or `await result.close\(\)`\)"
)


def rest_is_lost(operation: str, task: str = "'.+'") -> str:
    """Return the pattern of the refusal of an operation."""
    return REST_IS_LOST.format(operation=operation, task=f"task {task}")


async def count(session: AsyncSession) -> object:
    """Send another statement."""
    return await session.scalar(select(func.count()).select_from(Note))


@statements
@pytest.mark.parametrize("read", [0, 1])
async def test_statement_between_the_rows(crowded_worker: Site, statement: Any, read: int) -> None:
    """MariaDB's drivers forget the rows that are left: whoever sends it is told, and no row is lost."""
    await fill(crowded_worker)
    async with crowded_worker.db() as unit:
        result = await unit.session.stream_scalars(statement)
        rows = list(await result.fetchmany(read))
        # all rows of one that is loaded whole are there with the first
        if not (read and statement is STATEMENTS["attribute"]):
            with pytest.raises(ConcurrentUseError, match=rest_is_lost("scalar")):
                await count(unit.session)
            with pytest.raises(ConcurrentUseError, match=rest_is_lost("scalar", "'other'")):
                await asyncio.create_task(count(unit.session), name="other")
            unit.session.add(Note(text="new"))
            with pytest.raises(ConcurrentUseError, match=rest_is_lost("flush")):
                await unit.session.flush()
            with pytest.raises(ConcurrentUseError, match=rest_is_lost("commit")):
                await unit.commit()
            unit.session.expunge_all()
        rows.extend([note async for note in result])
        assert rows == TEXTS
        assert await count(unit.session) == len(TEXTS)


@left_incomplete
@pytest.mark.parametrize("end", ["close", "drop"])
async def test_statement_after_a_stream_that_was_given_up(crowded_worker: Site, end: str) -> None:
    """A stream that was closed, or that nobody has any more, has no rows to lose."""
    await fill(crowded_worker)
    async with crowded_worker.db() as unit:
        result = await unit.session.stream(ROWS)
        await result.fetchone()
        if end == "close":
            await result.close()
        else:
            del result
        assert await count(unit.session) == len(TEXTS)


@statements
async def test_statement_between_the_rows_elsewhere(deferring_worker: Site, statement: Any) -> None:
    """PostgreSQL and SQLite answer another statement between the rows of a stream."""
    await fill(deferring_worker)
    async with deferring_worker.db() as unit:
        result = await unit.session.stream_scalars(statement)
        rows = list(await result.fetchmany(1))
        assert await count(unit.session) == len(TEXTS)
        rows.extend([note async for note in result])
        assert rows == TEXTS


@pytest.mark.parametrize("by", ["session", "connection", "run_sync"])
async def test_rows_that_fail_have_lost_the_transaction(
    make_site: MakeSite, postgresql_url: str, by: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the error of a later row is swallowed, the client hears that the writes before it are gone."""
    site = await make_site(postgresql_url, commit_on_exit=True)
    failing = text("SELECT 1 / (2000 - number) FROM generate_series(1, 3000) AS number")

    async def read(session: AsyncSession) -> None:
        if by == "run_sync":
            options = {"stream_results": True}
            await session.run_sync(lambda sync: list(sync.execute(failing, execution_options=options)))
            return
        result = await (session if by == "session" else await session.connection()).stream(failing)
        async for _ in result:
            pass

    @site.app.get("/")
    async def write() -> None:
        site.db.session.add(Note(text="new"))
        await site.db.session.flush()
        with pytest.raises(Exception, match="division by zero"):
            await read(site.db.session)

    with pytest.raises(UnexpectedRollbackError, match="has aborted the transaction"):
        await site.get()
    assert (await site.get(raise_app_exceptions=False)).status_code == 500
    assert await site.notes() == []
    assert complaints(caplog) == []
