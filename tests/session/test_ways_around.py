"""Ways by which programs of users came past a unit: each is closed, whatever the program does."""

import asyncio
from typing import Any

import pytest
from sqlalchemy import inspect, select, text
from sqlalchemy.exc import IllegalStateChangeError, InvalidRequestError
from sqlalchemy.exc import TimeoutError as SQLAlchemyTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from fastapi_async_sqlalchemy import (
    ConcurrentUseError,
    PartialCommitError,
    PoolTimeoutError,
    UnexpectedRollbackError,
    UnitClosedError,
    create_middleware_and_session_proxy,
)
from tests.support.databases import JudgeFor
from tests.support.hooks import Log
from tests.support.site import MakeSite, Site, complaints
from tests.support.tables import ORPHAN, Note, Reply, create_tables
from tests.support.worker import open_worker

DEADLINE = 10


class Own(Session):
    """A session class of the user's with methods that newer releases of SQLAlchemy have, too."""

    def reset(self) -> str:
        """Do something else than SQLAlchemy's."""
        return "my reset"

    def invalidate(self) -> str:
        """Do something else than SQLAlchemy's."""
        return "my invalidate"

    def exec(self) -> str:
        """Take no statement, unlike SQLModel's."""
        return "my exec"

    delete_all = property(lambda _: "my delete_all")
    merge_all = staticmethod(lambda: "my merge_all")


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
    """They are forgotten, so that the thousandth costs what the first one does."""
    async with sqlite_worker.db() as unit:
        session: Any = unit.session.sync_session
        for _ in range(10):
            await (await unit.session.stream(text("SELECT 1"))).all()
        assert len(session._fastapi_async_sqlalchemy.streams) == 1


@pytest.mark.parametrize("by", ["stream", "yield_per"])
async def test_rows_of_the_connection(url_by_driver: str, judge_for: JudgeFor, by: str) -> None:
    """Rows that a result of the session's connection has left are not lost: another statement is refused."""
    async with open_worker(url_by_driver, judge_for) as worker:
        values = ", ".join(f"('{number:03}')" for number in range(300))
        await worker.judge.execute(f"INSERT INTO note (text) VALUES {values}")
        async with worker.db() as unit:
            connection = await unit.session.connection()
            if by == "stream":
                result = await connection.stream(select(Note.text))
                assert await result.fetchone() is not None
            else:
                rows = await connection.run_sync(
                    lambda sync: iter(sync.execute(select(Note.text), execution_options={"yield_per": 7}))
                )
                assert await connection.run_sync(lambda _: next(rows)) is not None
            for refused in (unit.session.scalar, connection.scalar):
                with pytest.raises(ConcurrentUseError, match="a stream has rows left"):
                    await refused(text("SELECT 1"))
            if by == "stream":
                assert len(await result.all()) == 299
            else:
                assert len(await connection.run_sync(lambda _: list(rows))) == 299
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


async def test_session_that_outlives_the_binding(sqlite_worker: Site) -> None:
    """A session of a unit that is open as its engine is released is watched when it goes on."""
    db = sqlite_worker.db
    async with db() as unit:
        await unit.session.scalar(select(Note.id))
        await db._database.release(sqlite_worker.engine, owned=False)
        await unit.session.execute(text("INSERT INTO note (text) VALUES ('a')"))
        assert unit.session.sync_session._fastapi_async_sqlalchemy.ledger.written == 1  # type: ignore[attr-defined]  # ours
        await unit.rollback()


async def test_half_of_a_session(
    postgresql_url: str, judge_for: JudgeFor, caplog: pytest.LogCaptureFixture
) -> None:
    """One engine of a session has committed when COMMIT fails on the other: the error names both, no hook runs."""
    log, second = Log(), create_async_engine(postgresql_url.replace("asyncpg", "psycopg"))
    async with open_worker(postgresql_url, judge_for) as worker:
        worker.db.unbind()
        worker.db.bind(worker.engine, session_args={"binds": {Reply: second}})
        with pytest.raises((PartialCommitError, Exception)) as raised:
            async with worker.db(commit_on_exit=True) as unit:
                log.both(unit)
                unit.session.add_all([Note(text="a"), Reply(**ORPHAN)])
        notes = await worker.notes()
        if notes:  # SQLAlchemy commits them in any order
            assert isinstance(raised.value, PartialCommitError)
            assert "psycopg" in raised.value.failed
            assert log == []
            assert complaints(caplog) == [str(raised.value)]
        else:
            assert log == ["rolled back"]
        await second.dispose()


async def test_savepoint_that_another_task_has_ended(sqlite_worker: Site) -> None:
    """An error in a block whose savepoint another task's block has released undoes the unit: it cannot less."""
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
