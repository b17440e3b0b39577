"""Savepoints: an error undoes all of its block, flushed or not, and each costs as much as the first."""

import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from typing import Any

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import UnitOfWork
from tests.support.site import Site
from tests.support.tables import Note

Unit = UnitOfWork[AsyncSession]
Open = Callable[[Site], AbstractAsyncContextManager[Any]]
FEW, MANY = 50, 800


class BoomError(Exception):
    """The error of a test's own."""


def by_unit(site: Site) -> AbstractAsyncContextManager[Any]:
    """Open a savepoint by the unit."""
    return site.db.unit.savepoint()


def by_session(site: Site) -> AbstractAsyncContextManager[Any]:
    """Open a savepoint by the session."""
    return site.db.session.begin_nested()


def by_block(site: Site) -> AbstractAsyncContextManager[Any]:
    """Open a savepoint by a block."""
    return site.db(propagation="nested")


@asynccontextmanager
async def by_hand(site: Site) -> AsyncGenerator[None]:
    """Roll a savepoint back by its own method."""
    savepoint = await site.db.session.begin_nested()
    try:
        yield
    except BaseException:
        await savepoint.rollback()
        raise
    await savepoint.commit()


each_way = pytest.mark.parametrize("way", [by_unit, by_session, by_block, by_hand])
each_block = pytest.mark.parametrize("way", [by_unit, by_block])


async def fail_a_flush(session: AsyncSession) -> None:
    """Flush what is there already, and swallow that."""
    session.add(Note(text="there"))
    with pytest.raises(IntegrityError):
        await session.flush()


async def notes_there(site: Site) -> list[Note]:
    """Write three notes in the current unit."""
    notes = [Note(text=note) for note in ("there", "kept", "third")]
    site.db.session.add_all(notes)
    await site.db.session.flush()
    return notes


def add(session: AsyncSession, _: list[Note]) -> None:
    """Add an object."""
    session.add(Note(text="late"))


def add_all(session: AsyncSession, _: list[Note]) -> None:
    """Add objects at once."""
    session.add_all([Note(text="late"), Note(text="later")])


def change(_: AsyncSession, notes: list[Note]) -> None:
    """Change an object."""
    notes[1].text = "changed"


def mark_deleted(session: AsyncSession, notes: list[Note]) -> None:
    """Delete an object, on the side that awaits nothing."""
    session.sync_session.delete(notes[2])


def all_of_it(session: AsyncSession, notes: list[Note]) -> None:
    """Add, change and delete."""
    add(session, notes)
    change(session, notes)
    mark_deleted(session, notes)


told_by_sqlalchemy = pytest.mark.filterwarnings("ignore:Session's state has been changed on a non-active")
"""It warns of what its own rollback of the savepoint drops."""
each_late = pytest.mark.parametrize("late", [add, add_all, change, mark_deleted, all_of_it])


@told_by_sqlalchemy
@each_way
@each_late
async def test_after_a_failed_flush(
    worker: Site, way: Open, late: Callable[[AsyncSession, list[Note]], None]
) -> None:
    """What happened in a savepoint after its flush had failed is gone with it."""
    async with worker.db(commit_on_exit=True) as unit:
        notes = await notes_there(worker)
        with suppress(BoomError):
            async with way(worker):
                await fail_a_flush(unit.session)
                late(unit.session, notes)
                raise BoomError
        unit.session.add(Note(text="after"))
    assert await worker.notes() == ["after", "kept", "there", "third"]


@each_way
@each_late
async def test_without_a_flush(
    worker: Site, way: Open, late: Callable[[AsyncSession, list[Note]], None]
) -> None:
    """What was never flushed is gone, too, in a savepoint inside of another that goes on."""
    async with worker.db(commit_on_exit=True) as unit:
        notes = await notes_there(worker)
        async with by_unit(worker):
            with suppress(BoomError):
                async with way(worker):
                    late(unit.session, notes)
                    raise BoomError
            unit.session.add(Note(text="after"))
    assert await worker.notes() == ["after", "kept", "there", "third"]


@each_block
async def test_flush_that_was_swallowed(worker: Site, way: Open) -> None:
    """The end of the block says so, and what was added after the flush is gone."""

    async def swallow(unit: Unit) -> None:
        async with way(worker):
            await fail_a_flush(unit.session)
            unit.session.add(Note(text="late"))

    async with worker.db(commit_on_exit=True) as unit:
        await notes_there(worker)
        with pytest.raises(PendingRollbackError):
            await swallow(unit)
        unit.session.add(Note(text="after"))
    assert await worker.notes() == ["after", "kept", "there", "third"]


@each_way
async def test_objects_from_before(worker: Site, way: Open) -> None:
    """What was added before a savepoint, and is flushed by it, stays when it is undone."""
    async with worker.db(commit_on_exit=True) as unit:
        before = Note(text="before")
        unit.session.add(before)
        with suppress(BoomError):
            async with way(worker):
                unit.session.add(Note(text="inside"))
                raise BoomError
        assert before in unit.session
    assert await worker.notes() == ["before"]


@each_way
async def test_outer_savepoint_is_undone(worker: Site, way: Open) -> None:
    """What an inner savepoint has released is gone with the outer one."""
    async with worker.db(commit_on_exit=True) as unit:
        await notes_there(worker)
        with suppress(BoomError):
            async with by_unit(worker):
                async with way(worker):
                    unit.session.add(Note(text="inner"))
                await fail_a_flush(unit.session)
                unit.session.add(Note(text="late"))
                raise BoomError
    assert await worker.notes() == ["kept", "there", "third"]


@told_by_sqlalchemy
@each_way
async def test_objects_are_readable_afterwards(worker: Site, way: Open) -> None:
    """Objects that were loaded before and changed inside have their old values, or can be refreshed."""
    async with worker.db(commit_on_exit=True) as unit:
        notes = await notes_there(worker)
        with suppress(BoomError):
            async with way(worker):
                await fail_a_flush(unit.session)
                notes[1].text = "changed"
                raise BoomError
        await unit.session.refresh(notes[1])
        assert notes[1].text == "kept"
        assert list(await unit.session.scalars(select(Note.text).order_by(Note.text))) == [
            "kept",
            "there",
            "third",
        ]


# What the nth one costs: lines of Python that are called, for a clock would tell of the machine.


async def calls_of(act: Callable[[], Awaitable[object]]) -> int:
    """Count the function calls that an act takes."""
    count = 0

    def note(_frame: object, event: str, _argument: object) -> None:
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(note)
    try:
        await act()
    finally:
        sys.setprofile(None)
    return count


async def released(site: Site) -> None:
    """Write in a savepoint."""
    async with site.db.session.begin_nested():
        await site.db.session.execute(text("INSERT INTO other DEFAULT VALUES"))


async def failed(site: Site) -> None:
    """Fail in a savepoint."""
    with suppress(IntegrityError):
        async with site.db.session.begin_nested():
            await site.db.session.execute(insert(Note).values(text="there"))


async def flushed(site: Site) -> None:
    """Fail in a flush in a savepoint."""
    with suppress(IntegrityError):
        async with site.db.unit.savepoint():
            site.db.session.add(Note(text="there"))
            await site.db.session.flush()


async def hooked(site: Site) -> None:
    """Register a hook in a savepoint."""
    async with site.db.session.begin_nested():
        site.db.unit.on_commit(list)
        await site.db.session.execute(text("INSERT INTO other DEFAULT VALUES"))


async def joined(site: Site) -> None:
    """Write in a nested block."""
    async with site.db(propagation="nested"):
        await site.db.session.execute(text("INSERT INTO other DEFAULT VALUES"))


async def hook_alone(site: Site) -> None:
    """Register hooks without a savepoint."""
    site.db.unit.on_commit(list)
    site.db.unit.before_commit(list)


async def failed_alone(site: Site) -> None:
    """Fail without a savepoint, which SQLite forgives."""
    with suppress(IntegrityError):
        await site.db.session.execute(insert(Note).values(text="there"))


@pytest.mark.parametrize("act", [released, failed, flushed, hooked, joined, hook_alone, failed_alone])
async def test_cost_of_many(sqlite_worker: Site, act: Callable[[Site], Awaitable[None]]) -> None:
    """The last of many costs no more calls than the first few."""
    await sqlite_worker.judge.execute("CREATE TABLE other (id INTEGER PRIMARY KEY)")
    await sqlite_worker.judge.execute("INSERT INTO note (text) VALUES ('there')")

    async def some() -> None:
        for _ in range(FEW):
            await act(sqlite_worker)

    async with sqlite_worker.db() as unit:
        await some()
        first = await calls_of(some)
        for _ in range(MANY):
            await act(sqlite_worker)
        last = await calls_of(some)
        state: Any = unit.session.sync_session
        assert state._fastapi_async_sqlalchemy.ledger.savepoints == []  # noqa: SLF001  # what it is about
        await unit.rollback()
    assert last <= first * 1.05
