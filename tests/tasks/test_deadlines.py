"""`db(pool_timeout=)` and `db.connection()`: a connection in time, or an error."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import event, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from fastapi_async_sqlalchemy import PoolTimeoutError, UnitClosedError, create_middleware_and_session_proxy
from tests.support.databases import JudgeFor
from tests.support.narrow import DEADLINE, ENDED, TIMEOUT, BoomError, held, read, write
from tests.support.site import Site
from tests.support.tables import Note, engine_with_tables

DRIVERS_TIMEOUT = 2
"""Seconds that a driver waits for each statement: also for those that must succeed on a busy machine."""
TIMED_OUT = r"had no free connection within 0\.2 seconds \(1 of 1 are checked out\)"


@asynccontextmanager
async def open_narrow(url: str, judge_for: JudgeFor, **engine_args: Any) -> AsyncGenerator[Site]:
    """Bind a fresh pair to a pool of one connection, which is in the pool on exit."""
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with engine_with_tables(url, pool_size=1, max_overflow=0, **engine_args) as engine:
        db.bind(engine)
        narrow = Site(FastAPI(), db, engine, await judge_for(url))
        yield narrow
        assert narrow.checked_out() == 0


@pytest.fixture
async def narrow(postgresql_url: str, judge_for: JudgeFor) -> AsyncIterator[Site]:
    """A process without an application and a pool of one connection, on PostgreSQL."""
    async with open_narrow(postgresql_url, judge_for) as narrow:
        yield narrow


# A connection.


async def test_connection(sqlite_worker: Site) -> None:
    """A session whose connection is checked out on entry, in a unit that ends with the block."""
    db = sqlite_worker.db
    async with db.connection(timeout=1, commit_on_exit=True) as session:
        assert sqlite_worker.checked_out() == 1
        assert db.session is session
        unit = db.unit
        await write(db, "written")
    assert unit.closed
    assert sqlite_worker.checked_out() == 0
    assert await sqlite_worker.notes() == ["written"]
    with pytest.raises(UnitClosedError, match=ENDED):
        await session.scalar(select(1))


async def test_connection_of_a_block_that_fails(sqlite_worker: Site) -> None:
    """An error that leaves the block rolls back."""

    async def block() -> None:
        async with sqlite_worker.db.connection(commit_on_exit=True):
            await write(sqlite_worker.db, "lost")
            raise BoomError

    with pytest.raises(BoomError, match="boom"):
        await block()
    assert sqlite_worker.checked_out() == 0
    assert await sqlite_worker.notes() == []


@pytest.mark.parametrize("given", [None, True, False])
@pytest.mark.parametrize("current", [True, False])
async def test_connection_inherits(sqlite_worker: Site, *, current: bool, given: bool | None) -> None:
    """It commits as the call says, else as the current unit does."""
    db = sqlite_worker.db
    async with db(commit_on_exit=current), db.connection(commit_on_exit=given):
        await write(db, "written")
    assert await sqlite_worker.notes() == (["written"] if given or (given is None and current) else [])


# Deadlines.


async def assert_whole(narrow: Site) -> None:
    """See that the connection is in the pool and serves the next unit."""
    assert narrow.checked_out() == 0
    async with narrow.db(pool_timeout=DEADLINE, commit_on_exit=True):  # it may have to connect
        await write(narrow.db, "next")
    assert await narrow.notes() == ["next"]


def assert_facts(error: PoolTimeoutError) -> None:
    """See what the error knows."""
    assert (error.timeout, error.retry_after) == (TIMEOUT, 1)
    assert (error.pool_status["checked_out"], error.pool_status["capacity"]) == (1, 1)


async def test_connection_past_its_deadline(narrow: Site) -> None:
    """Past the deadline the block is not entered, and the outer unit is current again."""
    async with narrow.db() as outer:
        async with held(narrow):
            with pytest.raises(PoolTimeoutError, match=TIMED_OUT) as raised:
                await narrow.db.connection(timeout=TIMEOUT).__aenter__()
        assert narrow.db.unit is outer
    assert_facts(raised.value)
    await assert_whole(narrow)


async def commit_pending(session: AsyncSession) -> None:
    """Commit what was only added."""
    session.add(Note(text="lost"))
    await session.commit()


async def flush_pending(session: AsyncSession) -> None:
    """Flush what was only added."""
    session.add(Note(text="lost"))
    await session.flush()


async def begin(session: AsyncSession) -> None:
    """Commit what was only added, at the end of `begin()`."""
    async with session.begin():
        session.add(Note(text="lost"))


async def savepoint(session: AsyncSession) -> None:
    """Begin a savepoint, which takes a connection with its first statement."""
    async with session.begin_nested():
        await session.execute(select(1))


Act = Callable[[AsyncSession], Awaitable[object]]
ACTS: dict[str, Act] = {
    "execute": lambda session: session.execute(select(1)),
    "scalars": lambda session: session.scalars(select(Note)),
    "get": lambda session: session.get(Note, 1),
    "stream": lambda session: session.stream(select(Note)),
    "connection": lambda session: session.connection(),
    "merge": lambda session: session.merge(Note(id=1, text="lost")),
    "flush": flush_pending,
    "commit": commit_pending,
    "begin": begin,
    "begin_nested": savepoint,
}


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
async def test_deadline(sqlite_url: str, judge_for: JudgeFor, act: Act) -> None:
    """Whatever needs a connection first waits for it no longer than `pool_timeout`."""
    async with open_narrow(sqlite_url, judge_for) as narrow:

        async def work() -> None:
            async with narrow.db(pool_timeout=TIMEOUT, commit_on_exit=True) as unit:
                await act(unit.session)

        async with held(narrow):
            async with asyncio.timeout(DEADLINE):
                with pytest.raises(PoolTimeoutError, match=TIMED_OUT) as raised:
                    await work()
            assert narrow.checked_out() == 1
        assert_facts(raised.value)
        await assert_whole(narrow)


async def test_deadline_of_what_is_committed_at_the_end(narrow: Site) -> None:
    """Objects that were only added wait no longer when the block's end commits them."""

    async def work() -> None:
        async with narrow.db(pool_timeout=TIMEOUT, commit_on_exit=True) as unit:
            unit.session.add(Note(text="lost"))

    async with held(narrow):
        with pytest.raises(PoolTimeoutError, match=TIMED_OUT) as raised:
            await work()
    assert_facts(raised.value)
    await assert_whole(narrow)


async def test_deadline_caught(narrow: Site) -> None:
    """Who catches the error may go on in the same unit, when he has rolled back."""
    async with narrow.db(pool_timeout=TIMEOUT, commit_on_exit=True) as unit:
        async with held(narrow):
            with pytest.raises(PoolTimeoutError, match=TIMED_OUT):
                await read(narrow.db)
        await unit.rollback()
        await write(narrow.db, "in the end")
    assert await narrow.notes() == ["in the end"]


async def test_begin(narrow: Site) -> None:
    """`async with session.begin():` works under a deadline, and again after it."""
    async with narrow.db(pool_timeout=TIMEOUT) as unit:
        for note in "ab":
            async with unit.session.begin():
                unit.session.add(Note(text=note))
            assert narrow.checked_out() == 0
    assert await narrow.notes() == ["a", "b"]


async def test_begin_with_places(sqlite_worker: Site) -> None:
    """`async with session.begin():` gives its place back at its end."""
    db = sqlite_worker.db

    async def work(note: str) -> None:
        async with db.session.begin():
            db.session.add(Note(text=note))
        await entered.wait()

    entered = asyncio.Barrier(3)
    async with asyncio.timeout(DEADLINE), db(multi_sessions=True, max_concurrent=1):
        await asyncio.gather(*(work(note) for note in "abc"))
    assert await sqlite_worker.notes() == ["a", "b", "c"]


async def test_deadline_is_for_the_connection_alone(narrow: Site) -> None:
    """A statement that runs longer than the deadline is no timeout of the pool."""
    async with narrow.db(pool_timeout=TIMEOUT) as unit:
        assert await unit.session.scalar(text("SELECT 1 FROM pg_sleep(0.4)")) == 1
        assert await unit.session.scalar(text("SELECT 1 FROM pg_sleep(0.4)")) == 1


async def test_deadline_is_not_for_what_begins_the_transaction(narrow: Site) -> None:
    """An `on_begin` hook may run longer than the deadline: its connection has come in time."""
    async with narrow.db(pool_timeout=TIMEOUT, commit_on_exit=True) as unit:
        unit.on_begin(lambda connection: connection.execute(text("SELECT 1 FROM pg_sleep(0.4)")))
        await write(narrow.db, "first")
        await unit.commit()
        await unit.session.connection()
        await write(narrow.db, "second")
    assert await narrow.notes() == ["first", "second"]


@pytest.mark.parametrize(
    "options",
    [{"pool_timeout": DEADLINE}, {"multi_sessions": True, "max_concurrent": 1}],
    ids=["deadline", "places"],
)
async def test_connection_with_options(narrow: Site, options: dict[str, Any]) -> None:
    """`session.connection()` has the options that it is given, also where it is waited for."""
    async with narrow.db(**options) as unit:
        await unit.session.connection(execution_options={"isolation_level": "SERIALIZABLE"})
        assert await unit.session.scalar(text("SHOW transaction_isolation")) == "serializable"
        await unit.commit()
        assert await unit.session.scalar(text("SHOW transaction_isolation")) == "read committed"


async def test_deadline_longer_than_the_pool_s(postgresql_url: str, judge_for: JudgeFor) -> None:
    """A unit that asks for more time than the pool's own has the pool's."""
    async with open_narrow(postgresql_url, judge_for, pool_timeout=TIMEOUT) as narrow, held(narrow):
        with pytest.raises(PoolTimeoutError, match=f"within {TIMEOUT} seconds"):
            async with narrow.db(pool_timeout=DEADLINE) as unit:
                await unit.session.scalar(select(1))


async def test_timeout_of_the_driver(postgresql_url: str, judge_for: JudgeFor) -> None:
    """A statement that the driver gives up is the driver's error, deadline or not."""
    connect_args = {"command_timeout": DRIVERS_TIMEOUT}
    async with open_narrow(postgresql_url, judge_for, connect_args=connect_args) as narrow:

        async def work() -> None:
            async with narrow.db(pool_timeout=TIMEOUT) as unit:
                await unit.session.execute(text("SELECT pg_sleep(60)"))

        with pytest.raises(TimeoutError, match=r"^$|(?i:timeout)") as raised:
            await work()
        assert not isinstance(raised.value, PoolTimeoutError)
        await assert_whole(narrow)


async def test_timeout_of_the_driver_while_it_connects(postgresql_url: str, judge_for: JudgeFor) -> None:
    """A driver that gives connecting up raises its own error, deadline or not."""
    async with open_narrow(postgresql_url, judge_for) as narrow:

        def refuse(*_: object) -> None:
            raise TimeoutError

        await narrow.engine.dispose()
        event.listen(narrow.engine.sync_engine, "do_connect", refuse)
        with pytest.raises(TimeoutError, match=r"^$") as raised:
            async with narrow.db(pool_timeout=TIMEOUT) as unit:
                await unit.session.scalar(select(1))
        assert type(raised.value) is TimeoutError
        event.remove(narrow.engine.sync_engine, "do_connect", refuse)
        await assert_whole(narrow)


async def test_timeout_of_the_caller_s_own(narrow: Site) -> None:
    """An `asyncio.timeout()` around it that ends first is the caller's."""
    async with held(narrow):
        with pytest.raises(TimeoutError, match=r"^$") as raised:
            async with asyncio.timeout(TIMEOUT / 10), narrow.db(pool_timeout=DEADLINE) as unit:
                await unit.session.scalar(select(1))
    assert type(raised.value) is TimeoutError
    await assert_whole(narrow)
