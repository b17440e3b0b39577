"""Units inside a sandbox begin, commit and roll back as in production, by each driver; nothing stays."""

import asyncio

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import SessionProxy
from fastapi_async_sqlalchemy.testing import Sandbox
from tests.support.site import Site
from tests.support.tables import Note


class BoomError(Exception):
    """The error of a test's own."""


async def notes(db: SessionProxy[AsyncSession]) -> list[str]:
    """Return what a new unit reads."""
    async with db() as unit:
        return list(await unit.session.scalars(select(Note.text).order_by(Note.text)))


async def write(db: SessionProxy[AsyncSession], text: str) -> None:
    """Write a note in a unit that commits."""
    async with db(commit_on_exit=True) as unit:
        unit.session.add(Note(text=text))


async def test_next_unit_reads_what_was_committed(sandboxed: Site, box: Sandbox) -> None:
    """A COMMIT is seen by the next unit, a ROLLBACK is not; the sandbox counts both."""
    await write(sandboxed.db, "committed")

    async def fail() -> None:
        async with sandboxed.db(commit_on_exit=True) as unit:
            await unit.session.execute(insert(Note).values(text="rolled back"))
            raise BoomError

    with pytest.raises(BoomError):
        await fail()
    assert await notes(sandboxed.db) == ["before", "committed"]
    assert (box.commits, box.rollbacks) == (1, 1)


async def test_any_way_to_the_engine_is_undone(sandboxed: Site, box: Sandbox) -> None:
    """Text, `engine.begin()` and a COMMIT in the caller's own SQL are committed inside, and undone."""
    async with sandboxed.db() as unit:
        await unit.session.execute(text("INSERT INTO note (text) VALUES ('by text')"))
        await unit.session.commit()
    async with sandboxed.engine.begin() as connection:
        await connection.execute(insert(Note).values(text="by the engine"))
    async with sandboxed.engine.connect() as connection:
        await connection.execute(insert(Note).values(text="by words"))
        await connection.execute(text("COMMIT"))
    assert await notes(sandboxed.db) == ["before", "by text", "by the engine", "by words"]
    assert await sandboxed.notes() == ["before"]


async def test_autocommit_engine_stores_each_statement(sandboxed: Site, box: Sandbox) -> None:
    """A connection in AUTOCOMMIT commits by each statement, and that is undone, too."""
    automatic = sandboxed.engine.execution_options(isolation_level="AUTOCOMMIT")
    async with automatic.connect() as connection:
        await connection.execute(insert(Note).values(text="at once"))
        with pytest.raises(IntegrityError):
            await connection.execute(insert(Note).values(text="at once"))
        assert await notes(sandboxed.db) == ["at once", "before"]
    assert (box.commits, box.rollbacks) == (1, 1)


async def test_savepoints_and_duplicate_keys(sandboxed: Site, box: Sandbox) -> None:
    """A duplicate key undoes its savepoint alone."""
    async with sandboxed.db(commit_on_exit=True) as unit:
        unit.session.add(Note(text="kept"))
        with pytest.raises(IntegrityError):
            async with unit.savepoint():
                await unit.session.execute(insert(Note).values(text="before"))
        async with unit.savepoint():
            unit.session.add(Note(text="inner"))
    assert await notes(sandboxed.db) == ["before", "inner", "kept"]


async def test_hooks_run_at_the_outcome_of_their_unit(sandboxed: Site, box: Sandbox) -> None:
    """`on_commit` runs at the unit's own COMMIT, with no connection held, and not at the sandbox's end."""
    ran: list[str] = []

    async def hook() -> None:
        ran.append(f"commit: {await notes(sandboxed.db)}")

    async with sandboxed.db(commit_on_exit=True) as unit:
        unit.on_commit(hook)
        unit.on_rollback(lambda: ran.append("rollback"))
        unit.session.add(Note(text="hooked"))
    assert ran == ["commit: ['before', 'hooked']"]
    assert box.hooks_run == 1


async def test_gather_and_task_group_take_turns(sandboxed: Site, box: Sandbox) -> None:
    """Units at the same time wait for each other on the one connection; a failing one is undone alone."""

    async def one(name: str) -> int:
        await sandboxed.db.session.execute(insert(Note).values(text=name))
        return len(list(await sandboxed.db.session.scalars(select(Note))))

    async with sandboxed.db(commit_on_exit=True) as unit:
        await unit.session.scalars(select(Note))  # the unit around holds its transaction open
        await sandboxed.db.gather(*(one(f"gathered {number}") for number in range(3)))
        results = await sandboxed.db.gather(one("before"), one("another"), return_exceptions=True)
    assert isinstance(results[0], IntegrityError)
    async with sandboxed.db.task_group(commit_on_exit=True) as tasks:
        for number in range(3):
            tasks.create_task(one(f"grouped {number}"))
    assert len(await notes(sandboxed.db)) == 8
    assert (box.commits, box.rollbacks) == (7, 1)


async def test_each_task_of_multi_sessions_has_its_turn(sandboxed: Site, box: Sandbox) -> None:
    """Tasks of a block may begin while its own unit holds a transaction open."""

    async def one(name: str) -> None:
        sandboxed.db.session.add(Note(text=name))
        await sandboxed.db.session.flush()

    async with sandboxed.db(multi_sessions=True, commit_on_exit=True):
        await sandboxed.db.session.scalars(select(Note))
        async with asyncio.TaskGroup() as tasks:
            for number in range(3):
                tasks.create_task(one(f"task {number}"))
    assert await notes(sandboxed.db) == ["before", "task 0", "task 1", "task 2"]


async def test_inner_unit_commits_inside_an_outer_one(sandboxed: Site, box: Sandbox) -> None:
    """The COMMIT of an inner unit outlives the ROLLBACK of an outer one that has only read before."""

    async def fail() -> None:
        async with sandboxed.db(commit_on_exit=True) as outer:
            assert len(list(await outer.session.scalars(select(Note)))) == 1
            await write(sandboxed.db, "audit")
            outer.session.add(Note(text="rolled back"))
            await outer.session.flush()
            raise BoomError

    with pytest.raises(BoomError):
        await fail()
    assert await notes(sandboxed.db) == ["audit", "before"]
    async with sandboxed.db(commit_on_exit=True) as outer:
        outer.session.add(Note(text="outer"))
        await outer.session.flush()
        await write(sandboxed.db, "inner")
    assert await notes(sandboxed.db) == ["audit", "before", "inner", "outer"]


@pytest.mark.parametrize("writes_first", [False, True])
async def test_inner_rollback_leaves_the_outer_unit(
    sandboxed: Site, box: Sandbox, *, writes_first: bool
) -> None:
    """A unit inside another one is rolled back alone."""
    async with sandboxed.db(commit_on_exit=True) as outer:
        if writes_first:
            outer.session.add(Note(text="outer"))
            await outer.session.flush()
        async with sandboxed.db() as inner:
            await inner.session.execute(insert(Note).values(text="inner"))
            await inner.rollback()
        outer.session.add(Note(text="later"))
    assert await notes(sandboxed.db) == ["before", "later", *(["outer"] if writes_first else [])]


async def test_streams(sandboxed: Site, box: Sandbox) -> None:
    """Rows stream from the server inside a unit."""
    for number in range(5):
        await write(sandboxed.db, f"row {number}")
    async with sandboxed.db() as unit:
        result = await unit.session.stream_scalars(select(Note.text).order_by(Note.text))
        assert [text async for text in result] == ["before", *(f"row {number}" for number in range(5))]


async def test_read_only_unit_refuses_to_write(sandboxed: Site, box: Sandbox) -> None:
    """A read-only unit is refused writes by an error of the driver's own, and the next unit is not."""
    for _ in range(2):
        async with sandboxed.db(read_only=True) as unit:
            assert len(list(await unit.session.scalars(select(Note)))) >= 1
            with pytest.raises(Exception, match=r"(?i)read.?only"):
                await unit.session.execute(text("INSERT INTO note (text) VALUES ('refused')"))
        async with sandboxed.db(isolation_level="SERIALIZABLE", commit_on_exit=True) as unit:
            await unit.session.execute(text("DELETE FROM note WHERE text = 'once'"))
            await unit.session.execute(text("INSERT INTO note (text) VALUES ('once')"))
    assert await notes(sandboxed.db) == ["before", "once"]


async def test_unit_may_write_inside_a_read_only_one(sandboxed: Site, box: Sandbox) -> None:
    """A unit with settings of its own inside another one gets them, and the outer one has its own again."""
    async with sandboxed.db() as outer:
        await outer.session.scalars(select(Note))
        async with sandboxed.db(read_only=True) as inner:
            with pytest.raises(Exception, match=r"(?i)read.?only"):
                await inner.session.execute(text("INSERT INTO note (text) VALUES ('refused')"))
        await outer.session.execute(insert(Note).values(text="outer"))
        await outer.commit()
    assert await notes(sandboxed.db) == ["before", "outer"]


async def test_statements_are_counted(sandboxed: Site, box: Sandbox) -> None:
    """The sandbox lists what was sent, and refuses more than a test allows."""
    async with sandboxed.db(read_only=True) as unit:
        for _ in range(3):
            await unit.session.scalars(select(Note))
    assert len(box.statements) == 3
    box.assert_statements(at_most=3)
    with pytest.raises(AssertionError, match=r"3 statements were sent, and at most 2 expected:\n1\. SELECT"):
        box.assert_statements(at_most=2)
    box.statements.clear()
    async with sandboxed.db() as unit, unit.savepoint():
        await unit.session.scalars(select(Note))
    box.assert_statements(at_most=1)


async def test_counters_are_reset(sandboxed: Site, box: Sandbox) -> None:
    """What happened before is forgotten; what is to fail next still fails."""
    async with sandboxed.db(commit_on_exit=True) as unit:
        unit.session.add(Note(text="counted"))
        unit.on_commit(lambda: None)
    async with sandboxed.db() as unit:
        await unit.session.execute(insert(Note).values(text="undone"))
    assert (box.commits, box.rollbacks, box.hooks_run, len(box.statements)) == (1, 1, 1, 2)
    box.fail_commit()
    box.reset()
    assert (box.commits, box.rollbacks, box.hooks_run, box.statements) == (0, 0, 0, [])
    with pytest.raises(IntegrityError):
        await write(sandboxed.db, "refused")
    assert await notes(sandboxed.db) == ["before", "counted"]
