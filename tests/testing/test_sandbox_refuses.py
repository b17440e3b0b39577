"""What a sandbox cannot have it refuses, and what ends it before its time it says: a test must not lie."""

import asyncio
import gc
from contextlib import nullcontext, suppress

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from fastapi_async_sqlalchemy import ConfigurationError, SessionProxy, create_middleware_and_session_proxy
from fastapi_async_sqlalchemy.testing import Sandbox, SandboxError, sandbox
from tests.support.databases import JudgeFor
from tests.support.site import Site
from tests.support.tables import Note, engine_with_tables
from tests.support.worker import open_worker
from tests.testing.test_sandbox import BoomError, notes, write

OUTLIVES = "another one had been committed inside it meanwhile"


async def fail_around_a_commit(db: SessionProxy[AsyncSession]) -> None:
    """Write in a unit, let another one inside it commit, and fail."""
    async with db(commit_on_exit=True) as outer:
        outer.session.add(Note(text="outer"))
        await outer.session.flush()
        await write(db, "inner")
        raise BoomError


async def test_inner_commit_cannot_outlive_writes_that_are_undone(sandboxed: Site) -> None:
    """In production the inner COMMIT would stay: the sandbox is over, and its end says so."""

    async def try_out() -> None:
        async with sandbox(sandboxed.db):
            with pytest.raises(BoomError):
                await fail_around_a_commit(sandboxed.db)
            with pytest.raises(SandboxError, match=OUTLIVES):
                await notes(sandboxed.db)

    with pytest.raises(SandboxError, match=OUTLIVES):
        await try_out()


async def test_savepoint_around_a_commit_cannot_be_rolled_back(sandboxed: Site) -> None:
    """A savepoint that was set before the inner COMMIT would undo it; one that is set after it would not."""

    async def try_out() -> None:
        async with sandbox(sandboxed.db), sandboxed.db() as outer, outer.savepoint() as around:
            await outer.session.scalars(select(Note))
            await write(sandboxed.db, "inner")
            async with outer.savepoint() as after:
                await outer.session.execute(insert(Note).values(text="undone"))
                await after.rollback()
            assert len(list(await outer.session.scalars(select(Note)))) == 2
            await around.rollback()

    with pytest.raises(SandboxError, match=OUTLIVES):
        await try_out()


async def test_commit_that_fails_around_a_commit(sandboxed: Site) -> None:
    """A COMMIT that is refused would undo the inner one, too."""

    async def try_out() -> None:
        async with sandbox(sandboxed.db) as box:
            with suppress(SandboxError, IntegrityError):
                async with sandboxed.db(commit_on_exit=True) as outer:
                    outer.session.add(Note(text="outer"))
                    await outer.session.flush()
                    await write(sandboxed.db, "inner")
                    box.fail_commit()

    with pytest.raises(SandboxError, match=OUTLIVES):
        await try_out()


@pytest.mark.filterwarnings("ignore:.*garbage collector is trying to clean up:sqlalchemy.exc.SAWarning")
@pytest.mark.filterwarnings("ignore:.*was garbage-collected with its transaction open:ResourceWarning")
async def test_forgotten_connection_ends_the_sandbox(postgresql_url: str, judge_for: JudgeFor) -> None:
    """A connection that nobody closes cannot be rolled back from the garbage collector."""
    async with open_worker(postgresql_url, judge_for) as worker:

        async def forget() -> None:
            connection = await worker.engine.connect()
            await connection.execute(insert(Note).values(text="forgotten"))

        async def try_out() -> None:
            async with sandbox(worker.db):
                await forget()
                gc.collect()

        with pytest.raises(SandboxError, match="was discarded"):
            await try_out()
        assert await notes(worker.db) == []


async def test_outer_unit_cannot_go_on_inside_an_inner_one(sandboxed: Site, box: Sandbox) -> None:
    """One task cannot use two open transactions in turn: its statement is refused at once."""
    async with sandboxed.db() as outer:
        await outer.session.scalars(select(Note))
        async with sandboxed.db() as inner:
            await inner.session.scalars(select(Note))
            with pytest.raises(SandboxError, match="end the inner one first"):
                await outer.session.scalars(select(Note))
        assert len(list(await outer.session.scalars(select(Note)))) == 1


async def test_wait_for_the_connection_has_an_end(sandboxed: Site) -> None:
    """A transaction that another task does not end is named, with the deadline."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with sandboxed.db() as unit:
            await unit.session.scalars(select(Note))
            begun.set()
            await ended.wait()

    async with sandbox(sandboxed.db, timeout=0.1):
        holder = asyncio.create_task(hold(), name="holder")
        await begun.wait()
        with pytest.raises(SandboxError, match=r"waited 0\.1 seconds for task 'holder'"):
            await notes(sandboxed.db)
        ended.set()
        await holder
        assert await notes(sandboxed.db) == ["before"]


SLOW = {"postgresql": "SELECT pg_sleep(10)", "mysql": "SELECT SLEEP(10)"}


async def test_cancelled_statement(server_driver_url: str, judge_for: JudgeFor) -> None:
    """After a statement was cancelled, the sandbox goes on without its transaction or says it is over."""
    async with open_worker(server_driver_url, judge_for) as worker:
        is_mariadb = worker.engine.dialect.name == "mysql"

        async def cancel() -> None:
            async with worker.db(commit_on_exit=True) as unit:
                unit.session.add(Note(text="cancelled"))
                await unit.session.flush()
                async with asyncio.timeout(0.2):
                    await unit.session.execute(text(SLOW[worker.engine.dialect.name]))

        async def try_out() -> None:
            async with sandbox(worker.db):
                await write(worker.db, "before")
                with pytest.raises(TimeoutError):
                    await cancel()
                assert await notes(worker.db) == ["before"]
            assert not is_mariadb

        # MariaDB's drivers close a connection whose statement is cancelled
        with pytest.raises(SandboxError) if is_mariadb else nullcontext():
            await try_out()
        assert await notes(worker.db) == []


async def test_connection_that_breaks_ends_the_sandbox(
    postgresql_driver_url: str, judge_for: JudgeFor
) -> None:
    """When the server drops the connection, nothing goes on with an empty database."""
    async with open_worker(postgresql_driver_url, judge_for) as worker:

        async def try_out() -> None:
            async with sandbox(worker.db):
                await write(worker.db, "gone")
                async with worker.db() as unit:
                    process = await unit.session.scalar(text("SELECT pg_backend_pid()"))
                    await worker.judge.rows("SELECT pg_terminate_backend(:process, 5000)", process=process)
                    with pytest.raises(DBAPIError):
                        await unit.session.scalars(select(Note))
                with pytest.raises(SandboxError):
                    await notes(worker.db)

        with pytest.raises(SandboxError, match="a broken connection"):
            await try_out()
        assert await notes(worker.db) == []


async def test_schema_of_mariadb_is_refused(mariadb_url: str, judge_for: JudgeFor) -> None:
    """MariaDB would commit by DDL: it is refused before it is sent, a temporary table is not."""
    async with open_worker(mariadb_url, judge_for) as worker:
        async with sandbox(worker.db):
            async with worker.db() as unit:
                await unit.session.execute(insert(Note).values(text="not committed by DDL"))
                with pytest.raises(SandboxError, match="MariaDB would commit the whole sandbox by CREATE"):
                    await unit.session.execute(text("CREATE TABLE other (id INTEGER)"))
                await unit.session.execute(text("CREATE TEMPORARY TABLE passing (id INTEGER)"))
                await unit.commit()
            assert await notes(worker.db) == ["not committed by DDL"]
        assert await worker.notes() == []


async def test_schema_is_undone_elsewhere(undoing_ddl_url: str, judge_for: JudgeFor) -> None:
    """PostgreSQL and SQLite undo DDL, too."""
    async with open_worker(undoing_ddl_url, judge_for) as worker:
        async with sandbox(worker.db), worker.engine.begin() as connection:
            await connection.execute(text("CREATE TABLE other (id INTEGER)"))
        with pytest.raises(DBAPIError):
            await worker.judge.rows("SELECT * FROM other")


async def test_one_sandbox_at_a_time(sqlite_url: str, judge_for: JudgeFor) -> None:
    """A second one on the same database is refused, and the first one goes on."""
    async with open_worker(sqlite_url, judge_for) as worker, sandbox(worker.db):
        with pytest.raises(SandboxError, match="another one is open on the same database"):
            async with sandbox(worker.db):
                pass
        await write(worker.db, "in the first")
        assert await notes(worker.db) == ["in the first"]


async def test_two_urls_of_one_database_are_refused(
    postgresql_url: str, psycopg_server: object, judge_for: JudgeFor
) -> None:
    """Two drivers would have two connections, of which neither sees what the other commits."""
    _, other = create_middleware_and_session_proxy(AsyncSession)
    by_psycopg = postgresql_url.replace("asyncpg", "psycopg")
    async with open_worker(postgresql_url, judge_for) as worker, engine_with_tables(by_psycopg) as engine:
        other.bind(engine)
        async with sandbox(worker.db, other):
            await write(worker.db, "by asyncpg")
            with pytest.raises(SandboxError, match="give both the same URL"):
                await notes(other)


async def test_wrong_arguments_are_refused() -> None:
    """Nothing to undo, what is no database, and a deadline of no time are told at once."""
    _, db = create_middleware_and_session_proxy()
    with pytest.raises(ConfigurationError, match="takes at least one database"):
        sandbox()
    with pytest.raises(ConfigurationError, match="databases must be proxies such as `db`, or engines, not "):
        sandbox("db")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  # the mistake
    with pytest.raises(ConfigurationError, match="timeout must be a finite number above 0, not 0"):
        sandbox(db, timeout=0)


async def test_engine_without_a_proxy(database_url: str, judge_for: JudgeFor) -> None:
    """An engine that no proxy has can be given itself."""
    async with engine_with_tables(database_url) as engine:
        judge = await judge_for(database_url)
        async with sandbox(engine) as box:
            async with engine.begin() as connection:
                await connection.execute(insert(Note).values(text="by the engine"))
            async with engine.connect() as connection:
                assert (await connection.scalars(select(Note.text))).all() == ["by the engine"]
            assert box.commits == 1
        assert await judge.rows("SELECT text FROM note") == []


async def test_memory_of_sqlite(sqlite_url: str) -> None:
    """A database in memory is as before, although one connection is all of it."""
    engine = create_async_engine("sqlite+aiosqlite://")
    async with engine.begin() as connection:
        await connection.run_sync(Note.metadata.create_all)
    _, db = create_middleware_and_session_proxy(AsyncSession)
    async with db.connect(engine):
        for _ in range(2):
            async with sandbox(db):
                await db.gather(write(db, "one"), write(db, "two"))
                assert await notes(db) == ["one", "two"]
        assert await notes(db) == []
    await engine.dispose()
