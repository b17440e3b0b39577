"""Limits: a connection is taken where SQLAlchemy asks for one, and a wait for one's turn is no deadlock."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import make_transient_to_detached

from fastapi_async_sqlalchemy import (
    PoolTimeoutError,
    PropagationError,
    SessionProxy,
    create_middleware_and_session_proxy,
)
from tests.support.databases import JudgeFor
from tests.support.narrow import DEADLINE, read
from tests.support.settings import OTHER_LEVEL, level_of, open_single
from tests.support.site import Site, checked_out
from tests.support.tables import Note, engine_with_tables
from tests.support.versions import options_after_a_savepoint

Db = SessionProxy[AsyncSession]
Act = Callable[[Db], Awaitable[None]]
DEADLOCK = r"units of this block have a connection, and all wait for this one: raise max_concurrent, or end"
LIMITS: dict[str, dict[str, Any]] = {
    "none": {},
    "pool_timeout": {"pool_timeout": 5.0},
    "max_concurrent": {"multi_sessions": True, "max_concurrent": 2},
    "both": {"multi_sessions": True, "max_concurrent": 2, "pool_timeout": 5.0},
}


def at_hand(db: Db) -> Note:
    """Return a note that the session has and the database may not."""
    note = Note(id=1, text="at hand")
    make_transient_to_detached(note)
    db.session.add(note)
    return note


async def flush(db: Db) -> None:
    """Flush nothing."""
    await db.session.flush()


async def get(db: Db) -> None:
    """Get an object at hand."""
    note = at_hand(db)
    assert await db.session.get(Note, 1) is note


async def get_one(db: Db) -> None:
    """Get it, or fail."""
    note = at_hand(db)
    assert await db.session.get_one(Note, 1) is note


async def delete(db: Db) -> None:
    """Delete an object, and forget it."""
    await db.session.delete(at_hand(db))
    db.session.expunge_all()


async def begin_nested(db: Db) -> None:
    """Begin a savepoint that nothing is sent in."""
    async with db.session.begin_nested():
        pass


async def savepoint(db: Db) -> None:
    """Begin it by the unit."""
    async with db.unit.savepoint():
        pass


async def begin(db: Db) -> None:
    """Begin a transaction that nothing is sent in."""
    async with db.session.begin():
        pass


async def merge(db: Db) -> None:
    """Merge an object at hand, without looking for it."""
    note = Note(id=1, text="at hand")
    make_transient_to_detached(note)
    await db.session.merge(note, load=False)


async def commit(db: Db) -> None:
    """Commit nothing, then roll nothing back."""
    await db.session.commit()
    await db.session.rollback()


SENDS_NOTHING = [flush, get, get_one, delete, begin_nested, savepoint, begin, merge, commit]


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("act", SENDS_NOTHING)
async def test_no_connection_for_nothing(sqlite_worker: Site, act: Act, limits: dict[str, Any]) -> None:
    """What sends nothing takes no connection, limited or not."""
    out: list[object] = []
    event.listen(sqlite_worker.engine.sync_engine, "checkout", lambda *given: out.append(given))
    async with sqlite_worker.db(**limits):
        await act(sqlite_worker.db)
        assert out == []
        assert await read(sqlite_worker.db) == 1
    assert len(out) == 1


@pytest.mark.parametrize("act", SENDS_NOTHING)
async def test_no_place_for_nothing(sqlite_worker: Site, act: Act) -> None:
    """Nor does it take a place that another task could have."""
    db, ready, done = sqlite_worker.db, asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        await act(db)
        ready.set()
        await done.wait()

    async with (
        db(multi_sessions=True, max_concurrent=1),
        asyncio.timeout(DEADLINE),
        asyncio.TaskGroup() as tasks,
    ):
        tasks.create_task(wait())
        await ready.wait()
        await tasks.create_task(read(db))
        done.set()


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize(
    "before", [None, pytest.param(begin_nested, marks=options_after_a_savepoint), flush, savepoint]
)
async def test_execution_options(
    database_url: str, judge_for: JudgeFor, before: Act | None, limits: dict[str, Any]
) -> None:
    """Those of `connection()` apply as long as there is no connection, limited or not."""
    async with open_single(database_url, judge_for) as single, single.db(**limits) as unit:
        if before is begin_nested:
            await unit.session.begin_nested()
        elif before is not None:
            await before(single.db)
        level: Any = OTHER_LEVEL[single.engine.dialect.name]
        await unit.session.connection(execution_options={"isolation_level": level})
        assert await level_of(unit.session) == level
        await unit.rollback()
        assert await level_of(unit.session) != level


# Turns.


async def test_turn_has_no_deadline(sqlite_url: str) -> None:
    """A wait for one's turn takes as long as it takes, whatever the pool's deadline for a connection."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with engine_with_tables(sqlite_url, pool_size=2, max_overflow=0, pool_timeout=0.05) as engine:
        db.bind(engine)

        async def work() -> None:
            await read(db)
            await asyncio.sleep(0.1)  # twice the deadline

        async with db(multi_sessions=True, max_concurrent=1), asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(work())
        assert checked_out(engine.pool) == 0
        db.unbind()


async def test_deadline_holds_after_the_turn(sqlite_url: str) -> None:
    """Whose turn it is waits for a connection no longer than the deadline, and gives the place on."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with engine_with_tables(sqlite_url, pool_size=1, max_overflow=0) as engine:
        db.bind(engine)
        async with engine.connect(), db(multi_sessions=True, max_concurrent=1, pool_timeout=0.1):
            results = await asyncio.gather(*(read(db) for _ in range(3)), return_exceptions=True)
        assert [type(result) for result in results] == [PoolTimeoutError] * 3
        db.unbind()


async def nested_unit(db: Db) -> None:
    """Open a unit inside, which needs a place, too."""
    async with db.connection():
        pass


async def gathered(db: Db) -> None:
    """Wait for children."""
    await db.gather(read(db), read(db))


async def grouped(db: Db) -> None:
    """Wait for children of a group."""
    async with db.task_group() as tasks:
        tasks.create_task(read(db))


async def gathered_deeply(db: Db) -> None:
    """Wait for a child that waits for children."""

    async def child() -> None:
        await db.gather(read(db))

    await db.gather(child())


async def gathered_one_by_one(db: Db) -> None:
    """Wait for children that take turns."""
    await db.gather(read(db), read(db), max_concurrent=1)


def find_deadlock(error: BaseException) -> bool:
    """Whether an error is that of a deadlock, alone or in a group."""
    inside: tuple[BaseException, ...] = getattr(error, "exceptions", ())
    if inside:
        return any(map(find_deadlock, inside))
    return isinstance(error, PropagationError)


async def grouped_late(db: Db) -> None:
    """Wait for a task that a child starts while its group is being left."""

    async def start() -> None:
        tasks.create_task(read(db))

    async with db.task_group() as tasks:
        tasks.create_task(start())


@pytest.mark.parametrize(
    "wait", [nested_unit, gathered, grouped, grouped_late, gathered_deeply, gathered_one_by_one]
)
@pytest.mark.parametrize("holder", ["owner", "task"])
async def test_deadlock_with_oneself(sqlite_worker: Site, wait: Act, holder: str) -> None:
    """The holder of the last place who waits for somebody that needs it gets an error at once."""
    db = sqlite_worker.db

    async def hold() -> None:
        await read(db)
        with pytest.raises((PropagationError, BaseExceptionGroup)) as raised:
            await wait(db)
        assert find_deadlock(raised.value)
        assert await read(db) == 1

    async with asyncio.timeout(DEADLINE), db(multi_sessions=True, max_concurrent=1):
        await (hold() if holder == "owner" else asyncio.create_task(hold()))
    async with db(multi_sessions=True, max_concurrent=1):  # the block's places were its own
        await read(db)


@pytest.mark.parametrize("wait", [nested_unit, gathered, grouped])
async def test_two_holders(sqlite_worker: Site, wait: Act) -> None:
    """Two who hold both places and wait for children: one gets the error, and then the other goes on."""
    db, both = sqlite_worker.db, asyncio.Barrier(2)

    async def hold() -> None:
        await read(db)
        await both.wait()
        await wait(db)

    async with asyncio.timeout(DEADLINE), db(multi_sessions=True, max_concurrent=2):
        results = await asyncio.gather(
            *(asyncio.create_task(hold()) for _ in range(2)), return_exceptions=True
        )
    failed = [result for result in results if result is not None]
    assert len(failed) == 1
    assert find_deadlock(failed[0])


async def test_no_deadlock_while_another_works(sqlite_worker: Site) -> None:
    """As long as one of the holders goes on, whoever waits for a place waits."""
    db, waiting, done = sqlite_worker.db, asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await read(db)
        await done.wait()

    async def hold() -> None:
        await read(db)
        waiting.set()
        await db.gather(read(db), read(db))

    async with asyncio.timeout(DEADLINE), db(multi_sessions=True, max_concurrent=2):
        worker, holder = asyncio.create_task(work()), asyncio.create_task(hold())
        await waiting.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        assert not holder.done()
        done.set()
        await asyncio.gather(worker, holder)


async def test_deadlock_that_comes_last(sqlite_worker: Site) -> None:
    """It is an error as well where the others' end leaves none but those who wait for each other."""
    db, waiting, done = sqlite_worker.db, asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await read(db)
        await done.wait()

    async def hold() -> None:
        await read(db)
        waiting.set()
        await db.gather(hold_on(), hold_on())

    async def hold_on() -> None:
        await read(db)
        await db.gather(read(db))

    async with asyncio.timeout(DEADLINE), db(multi_sessions=True, max_concurrent=2):
        worker, holder = asyncio.create_task(work()), asyncio.create_task(hold())
        await waiting.wait()
        for _ in range(20):
            await asyncio.sleep(0)
        done.set()
        await worker
        with pytest.raises(PropagationError, match=DEADLOCK):
            await holder


async def test_cancelled_while_waiting(sqlite_worker: Site) -> None:
    """A task that is cancelled in the queue, also as its turn comes, leaves the place to the next one."""
    db, held, done = sqlite_worker.db, asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        await read(db)
        held.set()
        await done.wait()

    async with asyncio.timeout(DEADLINE), db(multi_sessions=True, max_concurrent=1):
        holder = asyncio.create_task(hold())
        await held.wait()
        queue = [asyncio.create_task(read(db)) for _ in range(6)]
        for _ in range(20):
            await asyncio.sleep(0)
        queue[0].cancel()
        queue[3].cancel()
        holder.add_done_callback(lambda _: queue[1].cancel())  # its turn comes within the same moment
        done.set()
        await asyncio.wait([holder, *queue])
        assert queue[0].cancelled()
        assert queue[3].cancelled()
        assert [task.result() for task in (queue[2], queue[4], queue[5])] == [1, 1, 1]
        assert await read(db) == 1


async def test_gather_runs_so_many(sqlite_worker: Site) -> None:
    """`gather()` in a block of two places runs two coroutines at a time, whatever they wait for."""
    db, running, peak = sqlite_worker.db, 0, 0

    async def work() -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        for _ in range(5):
            await asyncio.sleep(0)
        await db.session.execute(text("SELECT 1"))
        running -= 1

    async with db(multi_sessions=True, max_concurrent=2):
        await db.gather(*(work() for _ in range(12)))
        assert peak == 2
        running = peak = 0
        await db.gather(*(work() for _ in range(12)), max_concurrent=1)
        assert peak == 1
