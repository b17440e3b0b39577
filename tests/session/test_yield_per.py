"""Rows that a result has left at MariaDB's server: another statement is refused, however it was opened."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Result, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.ext.asyncio.exc import AsyncMethodRequired
from sqlalchemy.orm import Session

from fastapi_async_sqlalchemy import ConcurrentUseError
from tests.support.databases import JudgeFor
from tests.support.site import Site
from tests.support.tables import Note
from tests.support.versions import sessions_have_options
from tests.support.worker import open_worker

TEXTS = [f"{number:03}" for number in range(300)]
"""More than the driver fetches at a time."""
NOTES: Any = select(Note).order_by(Note.text)
COLUMN: Any = select(Note.text).order_by(Note.text)
TABLE = select(Note.__table__.c.text)
"""No entity of the ORM, which would fetch all of a `stream_results` at once."""
IN_PARTS = {"yield_per": 7}
AT_THE_SERVER = {"stream_results": True}
Rows = Iterator[Any]
Opening = Callable[[AsyncSession], Awaitable[Rows]]
LOST = r"a stream has rows left, which would be lost"


def opened_by(opening: Callable[[Session], Any]) -> Opening:
    """Open a result on the synchronous side."""

    async def open_rows(session: AsyncSession) -> Rows:
        rows: Rows = iter(await session.run_sync(opening))
        return rows

    return open_rows


def by_connection_options(session: Session) -> Any:
    """Give the option to the connection."""
    session.commit()
    session.connection(execution_options=AT_THE_SERVER)
    return session.execute(TABLE)


OPENINGS: dict[str, Opening] = {
    "execute": opened_by(lambda session: session.execute(COLUMN, execution_options=IN_PARTS)),
    "statement": opened_by(lambda session: session.execute(COLUMN.execution_options(**IN_PARTS))),
    "entities": opened_by(lambda session: session.execute(NOTES, execution_options=IN_PARTS)),
    "scalars": opened_by(lambda session: session.scalars(NOTES, execution_options=IN_PARTS)),
    "scalars of the statement": opened_by(
        lambda session: session.scalars(COLUMN.execution_options(**IN_PARTS))
    ),
    "partitions": opened_by(
        lambda session: session.scalars(COLUMN, execution_options=IN_PARTS).partitions(5)
    ),
    "mappings": opened_by(lambda session: session.execute(COLUMN, execution_options=IN_PARTS).mappings()),
    "query": opened_by(lambda session: session.query(Note).order_by(Note.text).yield_per(7)),
    "query of columns": opened_by(lambda session: session.query(Note.text).yield_per(7)),
    "stream_results": opened_by(lambda session: session.execute(TABLE, execution_options=AT_THE_SERVER)),
    "text": opened_by(
        lambda session: session.execute(text("SELECT text FROM note").execution_options(**IN_PARTS))
    ),
    "connection's options": opened_by(by_connection_options),
}
each_opening = pytest.mark.parametrize("opening", OPENINGS.values(), ids=OPENINGS)
left_incomplete = pytest.mark.filterwarnings("ignore:Previous unbuffered result was left incomplete")


@pytest.fixture
async def crowded_worker(url_by_driver: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A process without an application, on MariaDB, with more notes than one fetch takes."""
    async with open_worker(url_by_driver, judge_for) as worker:
        values = ", ".join(f"('{note}')" for note in TEXTS)
        await worker.judge.execute(f"INSERT INTO note (text) VALUES {values}")
        yield worker


async def read_one(session: AsyncSession, rows: Rows) -> None:
    """Read the first row."""
    await session.run_sync(lambda _: next(rows))


async def read_on(session: AsyncSession, rows: Rows) -> int:
    """Read a result to its end, and count the rows, or the parts."""
    return await session.run_sync(lambda _: len(list(rows)))


@each_opening
async def test_statement_between_the_rows(crowded_worker: Site, opening: Opening) -> None:
    """It is refused before the rows are lost, which can still be read; afterwards it is sent."""
    async with crowded_worker.db(commit_on_exit=True) as unit:
        rows = await opening(unit.session)
        await read_one(unit.session, rows)
        with pytest.raises(ConcurrentUseError, match=LOST):
            await unit.session.scalar(select(Note.id).limit(1))
        with pytest.raises(ConcurrentUseError, match=LOST):
            await unit.commit()
        left = await read_on(unit.session, rows)
        assert left in {len(TEXTS) - 1, len(TEXTS) / 5 - 1}
        unit.session.add(Note(text="new"))
    assert await crowded_worker.notes() == [*TEXTS, "new"]


@left_incomplete
@each_opening
async def test_unit_that_ends_between_the_rows(crowded_worker: Site, opening: Opening) -> None:
    """A unit that ends before all is read leaves a clean connection."""
    for _ in range(2):
        async with crowded_worker.db(commit_on_exit=True) as unit:
            unit.session.add(Note(text=f"new {_}"))
            await unit.session.flush()
            rows = await opening(unit.session)
            await read_one(unit.session, rows)
        assert crowded_worker.checked_out() == 0
    assert len(await crowded_worker.notes()) == len(TEXTS) + 2


def open_column(session: Session) -> Result[Any]:
    """Send the statement, and leave its rows."""
    return session.execute(COLUMN)


@sessions_have_options
@pytest.mark.parametrize("by", ["session_args", "pair"])
async def test_options_of_the_session(crowded_worker: Site, by: str) -> None:
    """The session's own options are no different from a statement's, where SQLAlchemy has them."""
    given: Any = {"execution_options": IN_PARTS}
    db = crowded_worker.db
    if by == "pair":
        db.unbind()
        db.bind(crowded_worker.engine, session_args=given)
    async with db(None if by == "pair" else given) as unit:
        rows: Iterator[Any] = iter(await unit.session.run_sync(open_column))
        await read_one(unit.session, rows)
        with pytest.raises(ConcurrentUseError, match=LOST):
            await unit.session.execute(COLUMN)
        assert await read_on(unit.session, rows) == len(TEXTS) - 1


@pytest.mark.parametrize("method", ["execute", "scalars"])
async def test_method_that_buffers(crowded_worker: Site, method: str) -> None:
    """The asynchronous methods refuse such a statement, as SQLAlchemy does, and leave nothing behind."""
    async with crowded_worker.db() as unit:
        with pytest.raises(AsyncMethodRequired):
            await getattr(unit.session, method)(COLUMN, execution_options=IN_PARTS)
        assert list(await unit.session.scalars(COLUMN)) == TEXTS


async def test_elsewhere(deferring_worker: Site) -> None:
    """Where a connection has room for several results, a statement between the rows costs nothing."""
    values = ", ".join(f"('{note}')" for note in TEXTS)
    await deferring_worker.judge.execute(f"INSERT INTO note (text) VALUES {values}")
    async with deferring_worker.db() as unit:
        for opening in OPENINGS.values():
            rows = await opening(unit.session)
            await read_one(unit.session, rows)
            assert await unit.session.scalar(select(Note.text).limit(1)) is not None
            await read_on(unit.session, rows)
            await unit.rollback()
