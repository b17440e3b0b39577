"""A read-only unit reads, and is refused every write; the next unit writes by the same connection."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
from sqlalchemy import delete, event, insert, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from fastapi_async_sqlalchemy import ConfigurationError, ReadOnlyError, UnitOfWork
from tests.support.databases import JudgeFor
from tests.support.settings import (
    REFUSED,
    REFUSED_BY_DATABASE,
    BoomError,
    End,
    by_error,
    each_end,
    open_single,
    run,
    well,
    write,
    write_by_text,
)
from tests.support.site import Site, complaints
from tests.support.tables import Note

Unit = UnitOfWork[AsyncSession]


def statements_of(engine: AsyncEngine) -> list[str]:
    """Return a list that all statements of an engine will be added to."""
    sent: list[str] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        sent.append(statement)

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    return sent


# Read-only.


@pytest.mark.parametrize("commit_on_exit", [True, False])
async def test_read_only_unit_reads(
    single: Site, caplog: pytest.LogCaptureFixture, *, commit_on_exit: bool
) -> None:
    """A read-only unit reads what is committed, with or without a COMMIT at its end, and nothing is said."""
    await write(single.db)
    async with single.db(commit_on_exit=commit_on_exit, read_only=True) as unit:
        assert await unit.session.scalar(select(Note.text)) == "written"
        note = await unit.session.get(Note, 1)
    assert note is not None
    assert note.text == "written"
    assert complaints(caplog) == []


Change = Callable[[AsyncSession, Note], Awaitable[None]]


async def new(session: AsyncSession, note: Note) -> None:
    """Add an object."""
    session.add(Note(text="new"))


async def changed(session: AsyncSession, note: Note) -> None:
    """Change an object."""
    note.text = "changed"


async def deleted(session: AsyncSession, note: Note) -> None:
    """Delete an object."""
    await session.delete(note)


Flush = Callable[[Unit], Awaitable[object]]
FLUSHES: dict[str, Flush] = {
    "session.flush": lambda unit: unit.session.flush(),
    "session.commit": lambda unit: unit.session.commit(),
    "unit.commit": lambda unit: unit.commit(),
    "autoflush": lambda unit: unit.session.scalar(select(Note.text)),
    "savepoint": lambda unit: unit.savepoint().start(),
}


@pytest.mark.parametrize("flush", FLUSHES.values(), ids=FLUSHES)
@pytest.mark.parametrize("change", [new, changed, deleted])
async def test_changed_object_is_refused_before_any_sql(
    single: Site, change: Change, flush: Flush, caplog: pytest.LogCaptureFixture
) -> None:
    """A flush of a new, changed or deleted object raises, whatever asked for it, and sends nothing."""
    await write(single.db)
    sent = statements_of(single.engine)
    async with single.db(read_only=True) as unit:
        note = await unit.session.get_one(Note, 1)
        await change(unit.session, note)
        sent.clear()
        with pytest.raises(ReadOnlyError, match=REFUSED):
            await flush(unit)
        assert sent == []
    assert await single.notes() == ["written"]
    assert complaints(caplog) == []


async def test_new_object_takes_no_connection(single: Site) -> None:
    """A flush that is refused before the first statement has not even checked a connection out."""
    checkouts: list[object] = []
    event.listen(single.engine.sync_engine, "checkout", lambda *arguments: checkouts.append(arguments))
    async with single.db(read_only=True) as unit:
        unit.session.add(Note(text="new"))
        with pytest.raises(ReadOnlyError, match=REFUSED):
            await unit.session.flush()
        assert checkouts == []


async def test_changed_object_is_refused_at_the_end(single: Site) -> None:
    """The commit at the block's end raises as a flush inside it would."""

    async def leave() -> None:
        async with single.db(commit_on_exit=True, read_only=True) as unit:
            unit.session.add(Note(text="new"))

    with pytest.raises(ReadOnlyError, match=REFUSED):
        await leave()
    await write(single.db)
    assert await single.notes() == ["written"]


async def test_refused_objects_are_counted(single: Site) -> None:
    """The error says how many objects were changed in any way."""
    await write(single.db)
    await write(single.db, "second")
    async with single.db(read_only=True) as unit:
        first, second = (await unit.session.scalars(select(Note).order_by(Note.id))).all()
        first.text = "changed"
        await unit.session.delete(second)
        unit.session.add_all([Note(text="new"), Note(text="newer")])
        with pytest.raises(ReadOnlyError, match=r"^4 changed objects of "):
            await unit.session.flush()


async def test_expunged_object_is_refused_no_more(single: Site) -> None:
    """The remedy in the error works: after `expunge()` the unit goes on."""
    async with single.db(read_only=True) as unit:
        note = Note(text="new")
        unit.session.add(note)
        with pytest.raises(ReadOnlyError, match=r"or expunge\(\) what is not meant to be stored"):
            await unit.session.flush()
        unit.session.expunge(note)
        assert await unit.session.scalar(select(Note.text)) is None
        await unit.commit()


async def test_same_value_is_no_change(single: Site) -> None:
    """An attribute that is set to the value it has makes no change, so that nothing is refused."""
    await write(single.db)
    async with single.db(commit_on_exit=True, read_only=True) as unit:
        note = await unit.session.get_one(Note, 1)
        note.text = "written"
        assert note in unit.session.dirty
        await unit.session.flush()
        await unit.commit()
    assert await single.notes() == ["written"]


Write = Callable[[AsyncSession], Awaitable[object]]


async def through_the_connection(session: AsyncSession) -> None:
    """Write by the session's own connection."""
    await (await session.connection()).execute(insert(Note).values(text="new"))


async def inside_a_savepoint(session: AsyncSession) -> None:
    """Write inside a savepoint that begins the transaction."""
    async with session.begin_nested():
        await write_by_text(session)


async def after_commit(session: AsyncSession) -> None:
    """Write in the second transaction."""
    await session.scalar(select(Note.text))
    await session.commit()
    await write_by_text(session)


async def after_rollback(session: AsyncSession) -> None:
    """Write in the transaction after one that was rolled back."""
    await session.scalar(select(Note.text))
    await session.rollback()
    await write_by_text(session)


async def in_a_block_of_the_session(session: AsyncSession) -> None:
    """Write in a transaction begun by hand."""
    async with session.begin():
        await write_by_text(session)


WRITES: dict[str, Write] = {
    "text": write_by_text,
    "insert": lambda session: session.execute(insert(Note).values(text="new")),
    "bulk": lambda session: session.execute(insert(Note), [{"text": "new"}, {"text": "newer"}]),
    "update": lambda session: session.execute(update(Note).values(text="changed")),
    "delete": lambda session: session.execute(delete(Note)),
    "connection": through_the_connection,
    "savepoint": inside_a_savepoint,
    "after commit": after_commit,
    "after rollback": after_rollback,
    "session.begin": in_a_block_of_the_session,
}


@pytest.mark.parametrize("act", WRITES.values(), ids=WRITES)
async def test_sql_by_hand_is_refused_by_the_database(
    single: Site, act: Write, caplog: pytest.LogCaptureFixture
) -> None:
    """SQL that writes reaches the database, which refuses it; afterwards the same connection writes."""
    await write(single.db)
    async with single.db(read_only=True) as unit:
        with pytest.raises(DBAPIError, match=REFUSED_BY_DATABASE):
            await act(unit.session)
    await write(single.db, "afterwards")
    assert await single.notes() == ["afterwards", "written"]
    assert complaints(caplog) == []


async def test_sql_by_hand_is_refused_in_two_phases(mariadb_url: str, judge_for: JudgeFor) -> None:
    """A read-only unit that was asked for two-phase commit does not write: it is refused, here or there."""
    async with open_single(mariadb_url, judge_for) as single:

        async def insert_note() -> None:
            async with single.db({"twophase": True}, commit_on_exit=True, read_only=True) as unit:
                await write_by_text(unit.session)

        with pytest.raises((ConfigurationError, DBAPIError), match=r"(?i)read.?only"):
            await insert_note()
        assert await single.notes() == []


# Read-only on MariaDB, by each of its drivers: CREATE, DROP and TRUNCATE end a transaction there.


@each_end
async def test_same_connection_writes_afterwards(
    single: Site, end: End, caplog: pytest.LogCaptureFixture
) -> None:
    """However a read-only unit ends, the next unit writes by the very same connection."""
    await run(single, end, read_only=True)
    await write(single.db)
    assert await single.notes() == ["written"]
    assert complaints(caplog) == []


async def test_units_in_turn(single: Site) -> None:
    """Read-only and ordinary units take turns on one connection, and each has what it asked for."""
    for number in range(3):
        await write(single.db, str(number))
        async with single.db(read_only=True) as unit:
            assert len((await unit.session.scalars(select(Note))).all()) == number + 1
            with pytest.raises(DBAPIError, match=REFUSED_BY_DATABASE):
                await write_by_text(unit.session)
    assert await single.notes() == ["0", "1", "2"]


async def test_read_only_false_writes(single: Site) -> None:
    """`read_only=False` is an ordinary unit."""
    async with single.db(commit_on_exit=True, read_only=False) as unit:
        unit.session.add(Note(text="written"))
    assert await single.notes() == ["written"]


async def test_commit_of_a_read_only_unit_is_harmless(single: Site) -> None:
    """An explicit commit succeeds and runs the hooks as committed; with no statement before, too."""
    told: list[str] = []
    async with single.db(read_only=True) as unit:
        for name in ("empty", "read"):
            unit.on_commit(partial(told.append, f"{name} committed"))
            unit.on_rollback(partial(told.append, f"{name} rolled back"))
            if name == "read":
                await unit.session.scalar(select(Note.text))
            await unit.commit()
            assert single.checked_out() == 0
    assert told == ["empty committed", "read committed"]


@pytest.mark.parametrize(("end", "outcome"), [(well, "committed"), (by_error, "rolled back")])
async def test_hooks_of_a_read_only_unit(single: Site, end: End, outcome: str) -> None:
    """A read-only unit that commits at its end runs the hooks of its outcome."""
    told: list[str] = []

    async def with_hooks(site: Site, unit: Unit) -> None:
        unit.on_commit(lambda: told.append("committed"))
        unit.on_rollback(lambda: told.append("rolled back"))
        await end(site, unit)

    async def work() -> None:
        async with single.db(commit_on_exit=True, read_only=True) as unit:
            await unit.session.scalar(select(Note.text))
            await with_hooks(single, unit)

    await asyncio.wait([task := asyncio.create_task(work())])
    assert isinstance(task.exception(), BoomError if end is by_error else type(None))
    assert told == [outcome]
