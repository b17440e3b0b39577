"""The log names what a unit discards: writes that nobody committed, and a session that was dropped."""

import asyncio
import gc
import logging
import warnings
from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy import delete, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import SessionProxy, UnitOfWork
from tests.support.site import Site, complaints
from tests.support.tables import Note

Unit = UnitOfWork[AsyncSession]


# What is said of writes that nobody committed.


Act = Callable[[AsyncSession], Awaitable[object]]
DISCARDED: dict[str, tuple[int, int, Act]] = {}
SILENT: dict[str, Act] = {}


def discards(statements: int, objects: int) -> Callable[[Act], Act]:
    """Note an act after which these counts are discarded."""

    def note(act: Act) -> Act:
        DISCARDED[act.__name__] = (statements, objects, act)
        return act

    return note


def silent(act: Act) -> Act:
    """Note an act after which there is nothing to discard."""
    SILENT[act.__name__] = act
    return act


@discards(1, 0)
async def one_statement(session: AsyncSession) -> None:
    """Write by one statement."""
    await session.execute(insert(Note).values(text="a"))


@discards(3, 0)
async def three_statements(session: AsyncSession) -> None:
    """Write by statements of each kind."""
    await session.execute(insert(Note).values(text="a"))
    await session.execute(update(Note).values(text="b"))
    await session.execute(delete(Note))


@silent
async def cursor_in_sql(session: AsyncSession) -> None:
    """Read by PostgreSQL's cursor, and describe a table as MariaDB does."""
    dialect = session.get_bind().dialect.name
    statements = {
        "postgresql": ("DECLARE c CURSOR FOR SELECT 1", "FETCH c", "MOVE c", "CLOSE c"),
        "mysql": ("DESC note",),
    }
    for statement in statements.get(dialect, ("SELECT 1",)):
        await session.execute(text(statement))


@discards(1, 0)
async def plain_sql(session: AsyncSession) -> None:
    """Write by SQL in small letters, over several lines."""
    await session.execute(text("\n  insert\n  into note (text)\n  values ('a')"))


@discards(1, 0)
async def through_the_connection(session: AsyncSession) -> None:
    """Write by the session's own connection."""
    connection = await session.connection()
    await connection.execute(insert(Note).values(text="a"))


@discards(0, 2)
async def unflushed_objects(session: AsyncSession) -> None:
    """Add objects and flush none."""
    session.add_all([Note(text="a"), Note(text="b")])


@discards(1, 0)
async def flushed_object(session: AsyncSession) -> None:
    """Add an object and flush it."""
    session.add(Note(text="a"))
    await session.flush()


@discards(1, 1)
async def flushed_and_unflushed(session: AsyncSession) -> None:
    """Flush one object, add another."""
    await flushed_object(session)
    session.add(Note(text="b"))


@discards(0, 2)
async def changed_and_deleted(session: AsyncSession) -> None:
    """Change one object that was read, and delete another."""
    session.add_all([Note(text="a"), Note(text="b")])
    await session.commit()
    first, second = await session.scalars(select(Note))
    first.text = "changed"
    await session.delete(second)


@discards(1, 0)
async def after_a_commit(session: AsyncSession) -> None:
    """Commit one write and leave another."""
    session.add(Note(text="a"))
    await session.commit()
    await session.execute(insert(Note).values(text="b"))


@discards(2, 0)
async def savepoint_released(session: AsyncSession) -> None:
    """Write before and inside a savepoint."""
    await session.execute(insert(Note).values(text="a"))
    async with session.begin_nested():
        await session.execute(insert(Note).values(text="b"))


@discards(1, 0)
async def savepoint_first(session: AsyncSession) -> None:
    """Write inside a savepoint, before anything else."""
    async with session.begin_nested():
        session.add(Note(text="a"))


@discards(2, 0)
async def around_a_savepoint_rolled_back(session: AsyncSession) -> None:
    """Write before, inside and after a savepoint that is rolled back."""
    await session.execute(insert(Note).values(text="a"))
    savepoint = await session.begin_nested()
    await session.execute(insert(Note).values(text="b"))
    await savepoint.rollback()
    await session.execute(insert(Note).values(text="c"))


@discards(1, 0)
async def outer_savepoint_rolled_back(session: AsyncSession) -> None:
    """Write inside a released savepoint of one that is rolled back."""
    await session.execute(insert(Note).values(text="a"))
    outer = await session.begin_nested()
    async with session.begin_nested():
        await session.execute(insert(Note).values(text="b"))
    await outer.rollback()


@silent
async def nothing(session: AsyncSession) -> None:
    """Do nothing."""


@silent
async def reads(session: AsyncSession) -> None:
    """Read in every way."""
    await session.get(Note, 1)
    await session.scalars(select(Note))
    await session.execute(select(Note.id).with_for_update())
    await session.execute(select(select(Note.id).cte("notes")))
    await session.execute(text("select\n  1"))
    await session.execute(text("\n    SELECT\n        id\n    FROM note"))
    await session.execute(text("/* by the list page */ SELECT 1"))
    await session.execute(text("-- by the list page\nSELECT 1"))


@silent
async def explicit_commit(session: AsyncSession) -> None:
    """Write and commit."""
    await three_statements(session)
    await session.commit()


@silent
async def explicit_rollback(session: AsyncSession) -> None:
    """Write and roll back."""
    await flushed_object(session)
    await session.rollback()


@silent
async def begun_block(session: AsyncSession) -> None:
    """Write in a block that commits itself."""
    async with session.begin():
        await session.execute(insert(Note).values(text="a"))


@silent
async def savepoint_rolled_back(session: AsyncSession) -> None:
    """Write inside a savepoint that is rolled back, and nowhere else."""
    await session.execute(select(1))
    savepoint = await session.begin_nested()
    session.add(Note(text="a"))
    await session.flush()
    await savepoint.rollback()


@silent
async def expunged(session: AsyncSession) -> None:
    """Add an object and take it out again."""
    note = Note(text="a")
    session.add(note)
    session.expunge(note)


@pytest.mark.parametrize(("statements", "objects", "act"), DISCARDED.values(), ids=DISCARDED)
async def test_discarded_writes_are_told(
    worker: Site, statements: int, objects: int, act: Act, caplog: pytest.LogCaptureFixture
) -> None:
    """Writes that nobody committed are rolled back with one WARNING: how many, and how to commit them."""
    async with worker.db() as unit:
        await act(unit.session)
        committed = await worker.notes()
    (complaint,) = complaints(caplog)
    sent, pending = "s" * (statements != 1), "s" * (objects != 1)
    assert f": {statements} statement{sent} and {objects} unflushed object{pending} are rolled" in complaint
    assert complaint.startswith("WARNING: ")
    assert "commit_on_exit=True" in complaint
    assert "await db.session.commit()" in complaint
    assert await worker.notes() == committed


@pytest.mark.parametrize("act", SILENT.values(), ids=SILENT)
async def test_nothing_to_discard_is_not_told(
    worker: Site, act: Act, caplog: pytest.LogCaptureFixture
) -> None:
    """A unit that read, or whose writes were committed or rolled back by hand, ends in silence."""
    caplog.set_level(logging.INFO)
    async with worker.db() as unit:
        await act(unit.session)
    assert complaints(caplog) == []


# What is said of a session that was dropped.


async def enter(db: SessionProxy[AsyncSession]) -> Unit:
    """Open a unit that nobody will ever end.

    In a task of its own: a driver's timers may keep the context of a statement, and with it its unit.
    """
    return await db().__aenter__()


async def send_statement(session: AsyncSession) -> None:
    """Begin a transaction by a statement."""
    await session.execute(insert(Note).values(text="dropped"))


async def take_connection(session: AsyncSession) -> None:
    """Begin a transaction by asking for the connection."""
    await session.connection()


async def begin(session: AsyncSession) -> None:
    """Begin a transaction by hand."""
    await session.begin()
    await send_statement(session)


@pytest.mark.parametrize("act", [send_statement, take_connection, begin])
async def test_dropped_session_warns(worker: Site, act: Act) -> None:
    """A session that is garbage-collected in its transaction warns, and its pool slot comes back."""
    unit = await asyncio.create_task(enter(worker.db))
    await act(unit.session)
    await asyncio.sleep(0)  # the loop lets go of the task, whose result is the unit
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del unit
        gc.collect()
        told = [str(warning.message) for warning in caught if warning.category is ResourceWarning]
        caught.clear()  # a recorded warning holds the session
        gc.collect()  # now its connection, of which the driver may say a word too
    ours = "was garbage-collected with its transaction open: leave the unit of work, `async with db():`"
    assert any(ours in message for message in told)
    assert worker.checked_out() == 0
