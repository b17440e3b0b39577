"""Nothing is sent that does nothing: round trips, counted by a proxy in front of each database."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import Any, Final
from uuid import uuid4

import pytest
from sqlalchemy import URL, event, literal, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.util import greenlet_spawn

from fastapi_async_sqlalchemy import (
    EngineArgs,
    SessionProxy,
    WalPosition,
    atomic,
    create_middleware_and_session_proxy,
)
from tests.support.databases import Judge, JudgeFor, fresh_database
from tests.support.settings import level_of
from tests.support.tables import Note, create_tables
from tests.support.trips import Trips, counting
from tests.support.versions import asyncpg_asks_server

Proxy = SessionProxy[AsyncSession]
Work = Callable[[AsyncSession], Awaitable[object]]

by_driver: Final = pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
IDLE_IN_TRANSACTION: Final = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state LIKE 'idle in%'"
)
ONE: Final = EngineArgs(pool_size=1, max_overflow=0)


@asynccontextmanager
async def connected(url: str, **options: Any) -> AsyncGenerator[tuple[Proxy, Trips]]:
    """Connect a fresh pair through a proxy, by an engine of the package's own with one connection."""
    engine = create_async_engine(url)
    await create_tables(engine)
    await engine.dispose()
    _, db = create_middleware_and_session_proxy(AsyncSession)
    given: dict[str, Any] = {"engine_args": ONE, **options}
    async with counting(url) as trips, db.connect(trips.url, **given):
        yield db, trips


async def counted(
    db: Proxy, trips: Trips, work: Work, position: WalPosition | None = None, **options: Any
) -> int:
    """Count the round trips of a unit; another one before has prepared the statements."""
    for _ in range(2):
        trips.taken()
        async with db.after(position) if position else db.begin(**options) as unit:
            await work(unit.session)
    return trips.taken()


async def read(session: AsyncSession) -> None:
    """Read."""
    assert await session.scalar(select(literal(1))) == 1


async def write(session: AsyncSession) -> None:
    """Write."""
    await session.execute(text("INSERT INTO note (text) VALUES (:text)"), {"text": uuid4().hex})


async def read_and_write(session: AsyncSession) -> None:
    """Do both."""
    await session.scalar(select(Note.text).limit(1))
    await session.execute(update(Note).values(text=Note.text).where(Note.id == 0))


# aiomysql and asyncmy: one end of a transaction.


@pytest.mark.parametrize(("work", "trips"), [(read, 2), (write, 2), (read_and_write, 3)])
async def test_one_end_of_a_transaction(url_by_driver: str, work: Work, trips: int) -> None:
    """MariaDB is asked for one COMMIT or ROLLBACK, and not for a second one when the pool resets."""
    async with connected(url_by_driver) as (db, counter):
        assert await counted(db, counter, work) == trips


async def test_engine_of_the_caller_is_left_alone(mariadb_url: str) -> None:
    """An engine that was not made here sends what SQLAlchemy sends."""
    async with counting(mariadb_url) as counter:
        engine = create_async_engine(counter.url)
        _, db = create_middleware_and_session_proxy(AsyncSession)
        async with db.connect(engine):
            assert await counted(db, counter, read) == 3
        await engine.dispose()


async def test_writes_after_the_end_are_rolled_back(url_by_driver: str, judge_for: JudgeFor) -> None:
    """What a listener writes when the connection returns to the pool is rolled back, as always."""
    async with connected(url_by_driver) as (db, _):

        def leave_open(driver: Any, *_: object) -> None:
            driver.cursor().execute("INSERT INTO note (text) VALUES ('left open')")

        pool = db.engine.sync_engine.pool
        event.listen(pool, "reset", leave_open)
        async with db(commit_on_exit=True) as unit:
            await write(unit.session)
        event.remove(pool, "reset", leave_open)
        async with db(commit_on_exit=True) as unit:
            await write(unit.session)
        assert await (await judge_for(url_by_driver)).scalar("SELECT count(*) FROM note") == 2


async def test_failed_statement_leaves_no_lock(url_by_driver: str, judge_for: JudgeFor) -> None:
    """A statement that failed outside SQLAlchemy's sight has left a lock, which the pool's reset ends.

    The server's answer is an error, and says nothing about an open transaction.
    """
    judge = await judge_for(url_by_driver)
    async with connected(url_by_driver) as (db, _):
        await judge.execute("INSERT INTO note (text) VALUES ('there')")
        async with db(commit_on_exit=True) as unit:
            await write(unit.session)
        raw = await db.engine.raw_connection()

        def insert_again() -> None:
            raw.cursor().execute("INSERT INTO note (text) VALUES ('there')")

        with pytest.raises(Exception, match="Duplicate"):
            await greenlet_spawn(insert_again)
        await greenlet_spawn(raw.close)
        await judge.execute("SET SESSION innodb_lock_wait_timeout = 1")
        await judge.execute("DELETE FROM note WHERE text = 'there'")


async def test_isolation_level_on_mariadb(url_by_driver: str) -> None:
    """A unit's level costs a statement before its transaction and one after it, and survives a DDL."""
    async with connected(url_by_driver) as (db, counter):
        assert await counted(db, counter, read, isolation_level="SERIALIZABLE") == 4
        async with db(isolation_level="SERIALIZABLE") as unit:
            await unit.session.execute(text("CREATE TABLE ended (id INT)"))
            assert await level_of(unit.session) == "SERIALIZABLE"
        async with db() as unit:
            assert await level_of(unit.session) == "REPEATABLE READ"


# PostgreSQL: log positions and two-phase commit.


@by_driver
async def test_position_of_the_log(postgresql_url: str, driver: str) -> None:
    """The primary's position is one query, and a unit that waits for it has one more."""
    async with connected(postgresql_url.replace("asyncpg", driver)) as (db, counter):
        for _ in range(6):  # psycopg prepares a statement at its sixth use
            await db.commit_position()
        counter.taken()
        position = await db.commit_position()
        assert counter.taken() == 1
        assert await counted(db, counter, read, position) == 4


async def two_databases(server: URL, databases: ExitStack) -> list[str]:
    """Make two databases; a thread does it, because that has an event loop of its own."""
    return await asyncio.to_thread(
        lambda: [databases.enter_context(fresh_database(server)) for _ in range(2)]
    )


@by_driver
async def test_two_phase_commit(postgresql_server: URL, databases: ExitStack, driver: str) -> None:
    """Two databases commit together in nine round trips: two by each statement, and one question."""
    if driver == "asyncpg" and not asyncpg_asks_server:
        pytest.skip("asyncpg before 0.32 streams in transactions of its own only, with more round trips")
    async with AsyncExitStack() as stack:
        urls = await two_databases(postgresql_server, databases)
        sides = [await stack.enter_async_context(connected(url.replace("asyncpg", driver))) for url in urls]
        for _ in range(7):
            for _, counter in sides:
                counter.taken()
            async with atomic(*(db for db, _ in sides)):
                for db, _ in sides:
                    await db.session.execute(update(Note).values(text="changed").where(Note.id == 0))
        assert sum(counter.taken() for _, counter in sides) == 9


async def write_to_both(first: Proxy, second: Proxy, note: str) -> None:
    """Write to two databases in one unit."""
    async with atomic(first, second):
        await write(first.session)
        second.session.add(Note(text=note))


@by_driver
async def test_two_phase_rollback_leaves_nothing_open(
    postgresql_server: URL, databases: ExitStack, judge_for: JudgeFor, driver: str
) -> None:
    """After an error in the block no transaction is open or prepared, and the connections serve the next."""
    urls = await two_databases(postgresql_server, databases)
    async with AsyncExitStack() as stack:
        sides = [await stack.enter_async_context(connected(url.replace("asyncpg", driver))) for url in urls]
        judges = [await judge_for(url) for url in urls]
        (first, _), (second, _) = sides
        await judges[1].execute("INSERT INTO note (text) VALUES ('there')")
        for _ in range(2):
            with pytest.raises(IntegrityError):
                await write_to_both(first, second, "there")
            for judge in judges:
                assert await judge.scalar(IDLE_IN_TRANSACTION) == 0
                assert await judge.scalar("SELECT count(*) FROM pg_prepared_xacts") == 0
            await write_to_both(first, second, uuid4().hex)
        assert [await judge.scalar("SELECT count(*) FROM note") for judge in judges] == [2, 3]


# Connections that the server has closed.


async def end_connections(url: str, judge: Judge) -> None:
    """Have the server close all connections to the database but the judge's."""
    if url.startswith("postgresql"):
        await judge.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return
    others = "SELECT id FROM information_schema.processlist WHERE db = DATABASE() AND id <> connection_id()"
    for (thread,) in await judge.rows(others):
        await judge.execute(f"KILL {thread}")


@pytest.mark.parametrize("driver_url", ["postgresql", "psycopg", "mariadb", "asyncmy"], indirect=True)
async def test_dead_connection_is_replaced(driver_url: str, judge_for: JudgeFor) -> None:
    """A connection that the server has closed fails no unit, and no question is sent to find that out."""
    async with connected(driver_url) as (db, counter):
        trips = await counted(db, counter, read)
        judge = await judge_for(driver_url)
        await end_connections(driver_url, judge)
        await counter.ended()
        await judge.scalar("SELECT 1")  # meanwhile the event loop learns of it
        async with db() as unit:
            await read(unit.session)
        assert await counted(db, counter, read) == trips


@pytest.mark.parametrize("driver_url", ["postgresql", "psycopg", "mariadb", "asyncmy"], indirect=True)
async def test_pre_ping_stays(driver_url: str) -> None:
    """A user's ``pool_pre_ping`` goes on asking the server."""
    async with connected(driver_url) as (db, counter):
        without = await counted(db, counter, read)
    async with connected(driver_url, engine_args={**ONE, "pool_pre_ping": True}) as (db, counter):
        assert await counted(db, counter, read) > without


async def test_notification_is_no_end(psycopg_url: str, judge_for: JudgeFor) -> None:
    """A message that arrives on an idle connection of psycopg does not cost the connection."""
    judge = await judge_for(psycopg_url)
    pid = text("SELECT pg_backend_pid()")
    async with connected(psycopg_url) as (db, _):
        async with db(commit_on_exit=True) as unit:
            await unit.session.execute(text("LISTEN news"))
            first = await unit.session.scalar(pid)
        await judge.execute("NOTIFY news")
        async with db() as unit:
            assert await unit.session.scalar(pid) == first
