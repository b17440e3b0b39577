"""Ways by which programs of users came past a unit: each is closed, whatever the program does."""

import asyncio
import gc
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from typing import Any
from weakref import WeakSet

import pytest
from sqlalchemy import event, insert, inspect, select, text
from sqlalchemy.exc import DBAPIError, IllegalStateChangeError, IntegrityError, InvalidRequestError
from sqlalchemy.exc import TimeoutError as SQLAlchemyTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from fastapi_async_sqlalchemy import (
    ConcurrentUseError,
    PartialCommitError,
    PoolTimeoutError,
    UnexpectedRollbackError,
    UnitClosedError,
    UnitOfWork,
    create_middleware_and_session_proxy,
)
from tests.support.databases import JudgeFor
from tests.support.hooks import BoomError, Log, boom, listening
from tests.support.site import MakeSite, Site, complaints
from tests.support.tables import ORPHAN, Note, Reply, create_tables
from tests.support.worker import open_worker

DEADLINE = 10
Reading = Callable[[], Awaitable[int]]


def own(name: str) -> Callable[[Session], str]:
    """Make a method of the user's."""
    return lambda _: f"my {name}"


Own = type(
    "Own",
    (Session,),
    {
        "reset": own("reset"),
        "invalidate": own("invalidate"),
        "exec": own("exec"),
        "delete_all": property(own("delete_all")),
        "merge_all": staticmethod(lambda: "my merge_all"),
    },
)
"""A session class of the user's with names that some releases of SQLAlchemy and SQLModel have, too."""


async def test_methods_of_the_users(sqlite_url: str, judge_for: JudgeFor) -> None:
    """They are called as they were written, end nothing, and are not called in place of SQLAlchemy's."""
    log = Log()
    async with open_worker(sqlite_url, judge_for) as worker:
        worker.db.unbind()
        worker.db.bind(worker.engine, session_args={"sync_session_class": Own})
        async with worker.db(commit_on_exit=True) as unit:
            log.both(unit)
            session: Any = unit.session.sync_session
            unit.session.add(Note(text="a"))
            await unit.session.flush()
            found = [session.reset(), session.invalidate(), session.exec(), session.merge_all()]
            assert found == ["my reset", "my invalidate", "my exec", "my merge_all"]
            assert session.delete_all == "my delete_all"
        assert log == ["committed"]
        async with worker.db() as unit:
            await unit.session.scalar(select(Note.id))
            await unit.session.close()
            assert not unit.session.in_transaction()
        assert await worker.notes() == ["a"]


@pytest.mark.parametrize(
    "limits", [{}, {"pool_timeout": 5.0}, {"multi_sessions": True, "max_concurrent": 2}, {"read_only": True}]
)
async def test_engine_of_a_session(sqlite_worker: Site, limits: dict[str, Any]) -> None:
    """What `get_bind()` returns connects, for SQLAlchemy's inspector as for the user's own code."""
    async with sqlite_worker.db(**limits):
        session = sqlite_worker.db.session
        names = await session.run_sync(lambda sync: inspect(sync.get_bind()).get_table_names())
        assert "note" in names
        bind: Any = session.get_bind()
        async with AsyncEngine(bind).connect() as connection:
            assert await connection.scalar(text("SELECT 1")) == 1


def test_classes_of_sqlalchemy() -> None:
    """Whoever handles SQLAlchemy's errors handles those that replace them."""
    assert issubclass(PoolTimeoutError, SQLAlchemyTimeoutError)
    assert issubclass(UnitClosedError, InvalidRequestError)
    assert issubclass(ConcurrentUseError, IllegalStateChangeError)


async def test_streams_that_were_read(sqlite_worker: Site) -> None:
    """They are forgotten before the unit ends, so that the thousandth costs what the first one does."""
    async with sqlite_worker.db() as unit:
        contexts = WeakSet[Any]()

        def note(*given: Any) -> None:
            contexts.add(given[4])

        event.listen(sqlite_worker.engine.sync_engine, "before_cursor_execute", note)
        for _ in range(100):
            await (await unit.session.stream(text("SELECT 1"))).all()
        gc.collect()
        assert len(contexts) <= 2


async def by_stream(connection: AsyncConnection) -> Reading:
    """Open the rows by the connection's own `stream()`."""
    result = await connection.stream(select(Note.text))
    await result.fetchone()

    async def read_on() -> int:
        return len(await result.all())

    return read_on


async def by_yield_per(connection: AsyncConnection) -> Reading:
    """Open them by an option, on the synchronous side."""
    result = await connection.run_sync(
        lambda sync: sync.execute(select(Note.text), execution_options={"yield_per": 7})
    )
    await connection.run_sync(lambda _: result.fetchone())

    async def read_on() -> int:
        return await connection.run_sync(lambda _: len(result.all()))

    return read_on


@pytest.mark.parametrize("opening", [by_stream, by_yield_per])
async def test_rows_of_the_connection(
    url_by_driver: str, judge_for: JudgeFor, opening: Callable[[AsyncConnection], Awaitable[Reading]]
) -> None:
    """Rows that a result of the session's connection has left are not lost: another statement is refused."""
    async with open_worker(url_by_driver, judge_for) as worker:
        values = ", ".join(f"('{number:03}')" for number in range(300))
        await worker.judge.execute(f"INSERT INTO note (text) VALUES {values}")
        async with worker.db() as unit:
            connection = await unit.session.connection()
            read_on = await opening(connection)
            for refused in (unit.session.scalar, connection.scalar):
                with pytest.raises(ConcurrentUseError, match="a stream has rows left"):
                    await refused(text("SELECT 1"))
            assert await read_on() == 299
            assert await unit.session.scalar(text("SELECT 1")) == 1
            await unit.rollback()


@pytest.mark.parametrize("moment", ["before_commit", "on_commit"])
async def test_hook_that_waits_for_its_child(make_site: MakeSite, sqlite_url: str, moment: str) -> None:
    """The child's use of the session is refused, instead of waiting for the settlement that waits for it."""
    site = await make_site(sqlite_url, commit_on_exit=True)
    found: list[object] = []

    async def child() -> None:
        await site.db.session.scalar(select(Note.id))

    async def hook() -> None:
        found.extend(await asyncio.gather(asyncio.create_task(child()), return_exceptions=True))

    @site.app.get("/")
    async def route() -> None:
        site.db.session.add(Note(text="a"))
        getattr(site.db.unit, moment)(hook)

    async with asyncio.timeout(DEADLINE):
        assert (await site.get()).status_code == 200
    assert [type(one) for one in found] == [ConcurrentUseError]
    assert await site.notes() == ["a"]


async def test_listeners_after_their_application(sqlite_url: str) -> None:
    """A pair leaves no listener on the user's engine, and listens again when it is bound again."""
    engine = create_async_engine(sqlite_url)
    await create_tables(engine)
    dispatch: Any = engine.sync_engine.dialect.dispatch
    before = len(list(dispatch.do_execute)), len(list(dispatch.handle_error))
    for _ in range(3):
        _, db = create_middleware_and_session_proxy(AsyncSession)
        for _ in range(2):
            async with db.connect(engine), db() as unit:
                assert await unit.session.scalar(select(Note.id)) is None
                assert len(list(dispatch.do_execute)) == before[0] + 1
            assert (len(list(dispatch.do_execute)), len(list(dispatch.handle_error))) == before
    await engine.dispose()


async def test_session_that_outlives_the_lifespan(sqlite_url: str, judge_for: JudgeFor) -> None:
    """A session that is open as its engine is released is watched when it goes on: its writes are told."""
    async with open_worker(sqlite_url, judge_for) as worker:
        db = worker.db
        async with db(commit_on_exit=True) as unit:
            await unit.session.scalar(select(Note.id))
            db.unbind()
            with pytest.raises(IntegrityError, match="UNIQUE"):
                async with unit.savepoint():
                    await unit.session.execute(text("INSERT INTO note (text) VALUES ('a'), ('a')"))
            await unit.session.execute(text("INSERT INTO note (text) VALUES ('b')"))
        assert await worker.notes() == ["b"]
        dispatch: Any = worker.engine.sync_engine.dialect.dispatch
        assert len(list(dispatch.do_execute)) == 1


async def leave_an_orphan(unit: UnitOfWork[AsyncSession]) -> None:
    """Write to both engines of a session; COMMIT fails on one."""
    unit.session.add_all([Note(text="a"), Reply(**ORPHAN)])
    await unit.session.flush()


async def test_half_of_a_session(
    postgresql_url: str, judge_for: JudgeFor, caplog: pytest.LogCaptureFixture
) -> None:
    """COMMIT fails on one engine of a session: if another has committed, the error says so, no hook runs."""
    log, second = Log(), create_async_engine(postgresql_url.replace("asyncpg", "psycopg"))
    async with open_worker(postgresql_url, judge_for) as worker:
        worker.db.unbind()
        worker.db.bind(worker.engine, session_args={"binds": {Reply: second}})
        error: BaseException | None = None
        try:
            async with worker.db(commit_on_exit=True) as unit:
                log.both(unit)
                await leave_an_orphan(unit)
        except (IntegrityError, PartialCommitError) as failed:
            error = failed
        committed = await worker.notes() == ["a"]  # SQLAlchemy commits them in any order
        assert isinstance(error, PartialCommitError) == committed
        assert log == ([] if committed else ["rolled back"])
        assert complaints(caplog) == ([f"ERROR: {error}"] if committed else [])
        await second.dispose()


@pytest.mark.parametrize("failing", [0, 1])
async def test_half_of_a_session_by_a_listener(
    postgresql_url: str, judge_for: JudgeFor, caplog: pytest.LogCaptureFixture, failing: int
) -> None:
    """So it is where an engine's listener fails before its COMMIT, and the other engine's is done or not."""
    log, second = Log(), create_async_engine(postgresql_url.replace("asyncpg", "psycopg"))
    async with open_worker(postgresql_url, judge_for) as worker:
        worker.db.unbind()
        worker.db.bind(worker.engine, session_args={"binds": {Reply: second}})
        error: BaseException | None = None
        await worker.judge.execute("INSERT INTO note (id, text) VALUES (404, 'old')")
        with listening([worker.engine, second][failing].sync_engine, "commit", boom):
            try:
                async with worker.db(commit_on_exit=True) as unit:
                    log.both(unit)
                    await leave_an_orphan(unit)
            except (BoomError, PartialCommitError) as failed:
                error = failed
        stored = (
            await worker.notes() != ["old"] or await worker.judge.scalar("SELECT count(*) FROM reply") == 1
        )
        assert type(error) is (PartialCommitError if stored else BoomError)
        assert log == ([] if stored else ["rolled back"])
        assert complaints(caplog) == ([f"ERROR: {error}"] if stored else [])
        await second.dispose()


async def test_savepoint_that_another_task_has_ended(sqlite_worker: Site) -> None:
    """An error in a block whose savepoint another task's block has released undoes the whole unit."""
    db, first_in, second_in, first_out = sqlite_worker.db, asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def first() -> None:
        async with db(propagation="nested") as unit:
            unit.session.add(Note(text="first"))
            first_in.set()
            await second_in.wait()
        first_out.set()

    async def second() -> None:
        await first_in.wait()
        async with db(propagation="nested") as unit:
            unit.session.add(Note(text="second"))
            second_in.set()
            await first_out.wait()
            raise LookupError

    async with asyncio.timeout(DEADLINE):
        with pytest.raises(UnexpectedRollbackError, match="a block that had joined it failed"):
            async with db(commit_on_exit=True):
                await asyncio.gather(first(), second(), return_exceptions=True)
    assert await sqlite_worker.notes() == []


async def test_event_that_uses_another_units_connection(driver_url: str, judge_for: JudgeFor) -> None:
    """A mapper's event writes on the connection of an audit unit: what fails there fails that unit alone."""
    log, audited = Log(), Log()
    async with open_worker(driver_url, judge_for) as worker:
        db = worker.db
        if worker.engine.dialect.name == "sqlite":
            await worker.judge.execute("PRAGMA journal_mode = WAL")

        async def write() -> None:
            async with db.begin(propagation="requires_new") as unit:
                log.both(unit)
                unit.session.add(Note(text="order"))

        async with db() as audit:
            audited.both(audit)
            connection = (await audit.session.connection()).sync_connection
            assert connection is not None

            def trail(*_: object) -> None:
                with suppress(DBAPIError):
                    connection.exec_driver_sql("INSERT INTO nowhere VALUES (1)")

            with listening(Note, "after_insert", trail):
                await write()
            aborts = worker.engine.dialect.name == "postgresql"
            with pytest.raises(UnexpectedRollbackError) if aborts else nullcontext():
                await audit.commit()
        assert log == ["committed"]
        assert audited == ["rolled back" if aborts else "committed"]
        assert await worker.notes() == ["order"]


async def test_read_that_fails_on_a_used_connection(sqlite_worker: Site) -> None:
    """A SELECT that fails and is swallowed loses nothing, whatever an earlier unit did on that connection."""
    for text_ in "ab":
        async with sqlite_worker.db.begin() as unit:
            with suppress(DBAPIError):
                await unit.session.execute(text("SELECT plugin FROM nowhere"))
            for half in ("1", "2"):  # the second finds SQLite in a transaction
                await unit.session.execute(insert(Note).values(text=f"{text_}{half}"))
    assert await sqlite_worker.notes() == ["a1", "a2", "b1", "b2"]
