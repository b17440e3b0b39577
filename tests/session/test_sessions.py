"""What an application does to the session itself: closes it, discards its connection, listens to it."""

from collections.abc import Awaitable, Callable

import pytest
from fastapi import Response
from sqlalchemy import event, select
from sqlalchemy.exc import ResourceClosedError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import object_session
from starlette.background import BackgroundTask

from fastapi_async_sqlalchemy import UnitOfWork
from tests.support.databases import JudgeFor
from tests.support.site import MakeSite, Site, complaints
from tests.support.tables import Note
from tests.support.worker import open_worker

Unit = UnitOfWork[AsyncSession]
Act = Callable[[AsyncSession], Awaitable[None]]


class BoomError(Exception):
    """A listener's mistake."""


def boom(_: object) -> None:
    """Fail."""
    message = "boom"
    raise BoomError(message)


async def leave(_: Unit) -> None:
    """Leave COMMIT to the unit's end."""


async def commit(unit: Unit) -> None:
    """Commit by the unit."""
    await unit.commit()


async def commit_session(unit: Unit) -> None:
    """Commit by the session."""
    await unit.session.commit()


@pytest.mark.parametrize("act", [leave, commit, commit_session])
@pytest.mark.parametrize("hooked", [False, True])
async def test_listener_that_fails_after_commit(
    worker: Site, act: Callable[[Unit], Awaitable[None]], *, hooked: bool
) -> None:
    """Its error reaches the caller, what is committed stays so, and no connection is lost to the pool."""
    told: list[str] = []

    async def write(note: str) -> None:
        async with worker.db(commit_on_exit=True) as unit:
            event.listen(unit.session.sync_session, "after_commit", boom)
            if hooked:
                unit.on_rollback(lambda: told.append("rolled back"))
            unit.session.add(Note(text=note))
            await act(unit)

    for note in "abc":
        with pytest.raises(BoomError, match="boom"):
            await write(note)
        assert worker.checked_out() == 0
    assert await worker.notes() == ["a", "b", "c"]
    assert told == []


async def test_listener_that_fails_in_a_request(make_site: MakeSite, database_url: str) -> None:
    """A request whose listener fails after COMMIT is answered 500, and the next ones find connections."""
    site = await make_site(database_url, commit_on_exit=True)

    @site.app.get("/{note}")
    async def write(note: str) -> None:
        event.listen(site.db.session.sync_session, "after_commit", boom)
        site.db.session.add(Note(text=note))

    async with site.client(raise_app_exceptions=False) as client:
        for note in "abc":
            assert (await client.get(f"/{note}")).status_code == 500
            assert site.checked_out() == 0
    assert await site.notes() == ["a", "b", "c"]


async def close(session: AsyncSession) -> None:
    """Close the session."""
    await session.close()


async def reset(session: AsyncSession) -> None:
    """Reset the session."""
    await session.reset()


async def use_as_a_block(session: AsyncSession) -> None:
    """Leave the session's own block."""
    async with session:
        await session.scalar(select(1))


closings = pytest.mark.parametrize("act", [close, reset, use_as_a_block])
LOST = (
    " rolls back {lost}, because nothing committed them: "
    "call `await db.session.commit()` before, or leave the session for its unit to close."
)


@closings
@pytest.mark.parametrize("commit_on_exit", [False, True])
@pytest.mark.parametrize("flushed", [False, True])
async def test_session_closed_over_writes(
    worker: Site, act: Act, caplog: pytest.LogCaptureFixture, *, commit_on_exit: bool, flushed: bool
) -> None:
    """SQLAlchemy rolls back what is closed over; it is said what was lost, and the unit goes on."""
    async with worker.db(commit_on_exit=commit_on_exit) as unit:
        unit.session.add(Note(text="lost"))
        if flushed or act is use_as_a_block:
            await unit.session.flush()
        written = flushed or act is use_as_a_block
        await act(unit.session)
        (told,) = complaints(caplog)
        assert told.startswith("WARNING: close() on AsyncSession (")
        one, other = "1 statement and 0 unflushed objects", "0 statements and 1 unflushed object"
        assert told.endswith(LOST.format(lost=one if written else other))
        unit.session.add(Note(text="kept"))
        await unit.commit()
    assert await worker.notes() == ["kept"]
    assert len(complaints(caplog)) == 1


@closings
async def test_session_closed_over_nothing(worker: Site, act: Act, caplog: pytest.LogCaptureFixture) -> None:
    """Who closes a session that has only read, or has committed or rolled back, loses nothing."""
    async with worker.db() as unit:
        await unit.session.scalar(select(Note.text))
        await act(unit.session)
        unit.session.add(Note(text="kept"))
        await unit.commit()
        await act(unit.session)
        unit.session.add(Note(text="given up"))
        await unit.session.flush()
        await unit.rollback()
        await act(unit.session)
    assert await worker.notes() == ["kept"]
    assert complaints(caplog) == []


@pytest.mark.parametrize("depth", [0, 1, 2])
async def test_connection_discarded_by_name(worker: Site, depth: int) -> None:
    """`invalidate()` costs the transaction and its connection; the session is good for the next one."""
    async with worker.db() as unit:
        unit.session.add(Note(text="lost"))
        await unit.session.flush()
        for _ in range(depth):
            await unit.session.begin_nested()
        await unit.session.invalidate()
        assert worker.checked_out() == 0
        await unit.session.invalidate()
        unit.session.add(Note(text="kept"))
        await unit.commit()
    assert await worker.notes() == ["kept"]


async def test_value_that_stays_the_same(
    make_site: MakeSite, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """To assign what an attribute holds is no write: no WARNING, and the connection is given back."""
    site = await make_site(database_url)
    await site.judge.execute("INSERT INTO note (text) VALUES ('same')")
    out: list[int] = []

    @site.app.get("/")
    async def update() -> Response:
        note = (await site.db.session.scalars(select(Note))).one()
        note.text = f"{note.text}"

        async def look() -> None:
            out.append(site.checked_out())

        return Response(background=BackgroundTask(look))

    assert (await site.get()).status_code == 200
    assert out == [0]
    assert complaints(caplog) == []


async def test_value_that_changes_is_a_write(
    sqlite_url: str, judge_for: JudgeFor, caplog: pytest.LogCaptureFixture
) -> None:
    """To assign another value is one, flushed or not."""
    async with open_worker(sqlite_url, judge_for) as worker:
        await worker.judge.execute("INSERT INTO note (text) VALUES ('old')")
        async with worker.db() as unit:
            note = (await unit.session.scalars(select(Note))).one()
            note.text = "new"
        assert "0 statements and 1 unflushed object are rolled back" in complaints(caplog)[0]


class FalseNote(Note):
    """An object that counts as false."""

    def __bool__(self) -> bool:
        return False


@pytest.mark.parametrize("kind", [Note, FalseNote])
async def test_objects_outlive_their_unit(worker: Site, kind: type[Note]) -> None:
    """What a unit leaves belongs to no session, also where somebody has that still: the next takes it."""
    note = kind(text="first")
    async with worker.db(commit_on_exit=True) as unit:
        kept = unit.session
        kept.add(note)
        await unit.commit()
    assert (object_session(note), list(kept)) == (None, [])
    async with worker.db(commit_on_exit=True) as unit:
        unit.session.add(note)
        note.text = "second"
    assert await worker.notes() == ["second"]


@pytest.mark.parametrize("nested", [False, True])
async def test_transaction_that_is_over(worker: Site, *, nested: bool) -> None:
    """What `begin()` returns tells by an error of SQLAlchemy's own that it has been ended before."""
    async with worker.db() as unit:
        session = unit.session
        transaction = await (session.begin_nested() if nested else session.begin())
        await session.rollback()
        for end in (transaction.commit, transaction.rollback):
            with pytest.raises(ResourceClosedError, match="This transaction is closed"):
                await end()
